"""Show runs on one page: what was transferred where, and what it brought.

    python -m l2t_jax.report RUN [RUN ...] --output=report.html

RUN is the folder of a run, finished or not, or one that is searched for runs,
such as that of a table. The page is one file that needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
import shlex

from flax import traverse_util
import jinja2
from plotly import io as plotly_io
from plotly import offline

from l2t_jax import errors
import l2t_jax.config
from l2t_jax.method import objectives
from l2t_jax.results import plotly_figures, run_reader, run_warnings
from l2t_jax.run import saliency_images

_TEMPLATES = {"light": "plotly_white", "dark": "plotly_dark"}
_CLEAR = "rgba(0,0,0,0)"


def make_page(runs: Sequence[run_reader.Run], num_images: int) -> str:
  """Put everything together, as HTML.

  Args:
    runs: from `find_runs`.
    num_images: that saliency is shown of; 0 for none.

  Returns:
    The page, which needs no other file.
  """
  warnings = run_warnings.find_warnings(runs)
  factor, unit = (100, " %") if runs[0].is_classifier else (1, "")
  figures = {
    "loss": plotly_figures.draw_curves(runs, "train_loss", "training loss"),
    "accuracy": plotly_figures.draw_curves(
      runs, "val_accuracy", f"validation accuracy{unit}", factor
    ),
  }
  sections = []
  runs = [
    run._replace(map=None)
    if run.map and not run_warnings.is_current(run.map)
    else run
    for run in runs
  ]
  # Seeds of one experiment look alike: one of them is looked at closely.
  experiments = run_reader.by_experiment(
    [run for run in runs if run.learned_channels]
  )
  looked_at = {group[0].workdir for group in experiments if num_images}
  shown = next((run for run in runs if run.learned_pairs), runs[0])
  for i, run in enumerate(runs):
    plots, pictures, no_pictures = {}, None, ""
    if run.map:
      plots["map"] = plotly_figures.draw_map(run.map)
      if run.learned_pairs:
        plots["history"] = plotly_figures.draw_history(run.map)
      if not run.map["channels_fixed"]:
        plots["channels"] = plotly_figures.draw_channels(run.map)
      if "source_shares" in run.map:
        plots["shares"] = plotly_figures.draw_shares(run.map)
      if run.workdir in looked_at:
        try:
          pictures = saliency_images.compute_saliency(run, num_images)
        except errors.InputError as error:
          no_pictures = str(error)
    figures |= {f"{name}-{i}": figure for name, figure in plots.items()}
    method = objectives.METHODS[run.config["method"]]
    sections.append(
      {
        "open": run is shown,
        "run": run,
        "plots": {name: f"{name}-{i}" for name in plots},
        "saliency": pictures,
        "no_saliency": no_pictures,
        "fields": _fields(run.config),
        "command": _command(run),
        "matches": "matching" in method.losses,
      }
    )
  for figure in figures.values():
    figure.update_layout(
      paper_bgcolor=_CLEAR,
      plot_bgcolor=_CLEAR,
      modebar_bgcolor=_CLEAR,
      template=None,  # The page chooses one.
    )
    if figure.layout.margin.t is None:
      figure.update_layout(margin=plotly_figures.MARGIN)
    if figure.layout.height is None:
      figure.update_layout(height=380)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
  )
  # In script elements nothing is escaped.
  quote = lambda text: text.replace("<", "\\u003c")
  templates = {
    name: plotly_io.templates[template].to_plotly_json()
    for name, template in _TEMPLATES.items()
  }
  return environment.get_template("report.html.jinja").render(
    runs=runs,
    warnings=warnings,
    rows=run_reader.results(runs),
    sections=sections,
    figures={name: quote(fig.to_json()) for name, fig in figures.items()},
    templates=quote(json.dumps(templates)),
    plotly=offline.get_plotlyjs(),
  )


def _fields(config):
  """Field -> (its value, whether it is not the default one)."""
  flat = lambda nested: traverse_util.flatten_dict(
    nested, sep=".", keep_empty_nodes=False
  )
  usual = flat(json.loads(l2t_jax.config.get_config().to_json()))
  return {
    name: (json.dumps(value), name not in usual or usual[name] != value)
    for name, value in flat(config).items()
  }


def _command(run):
  if run.config["data"]["source"] == "arrays":
    return ""
  path = run.workdir / "config.json"
  if path.is_relative_to(pathlib.Path.cwd()):
    path = path.relative_to(pathlib.Path.cwd())
  config = shlex.quote(str(path))
  return f"python train.py --config={config} --workdir=runs/again"
