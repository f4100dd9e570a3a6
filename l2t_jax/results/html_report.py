"""The report of runs: one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
import shlex
from typing import Any

import jinja2
from plotly import graph_objects, offline
from plotly import io as plotly_io

from l2t_jax.results import plotly_figures, run_reader, run_warnings, tables
from l2t_jax.runtime import run_folder

_TEMPLATES = {"light": "plotly_white", "dark": "plotly_dark"}
_CLEAR = "rgba(0,0,0,0)"
_MARGIN = {"l": 60, "r": 20, "t": 30, "b": 50}


def make_page(
  runs: Sequence[run_reader.Run],
  *,
  default_config: Mapping[str, Any],
  saliency: Mapping[str, Any],
  reference: str = "",
) -> str:
  """Lay out runs as an HTML page.

  Args:
    runs: from `run_reader.find_runs`.
    default_config: the default fields; where a run differs, its field is bold.
    saliency: name of a run -> its `run.saliency_images.Saliency`, or the reason
      why there is none.
    reference: see `tables.run_rows`.

  Returns:
    The content of the page.
  """
  unit = " %" if all(run.in_percent for run in runs) else ""
  figures = {
    "loss": plotly_figures.draw_curves(runs, "train_loss", "training loss"),
    "accuracy": plotly_figures.draw_curves(
      runs, "val_accuracy", f"validation accuracy{unit}"
    ),
  }
  defaults = run_reader.flatten(default_config)
  # The run whose section is open when the page is loaded.
  shown = next((run for run in runs if run.learned_pairs), runs[0])
  sections = []
  for i, run in enumerate(runs):
    plots = _draw_map(run)
    figures |= {f"{name}-{i}": figure for name, figure in plots.items()}
    sections.append(
      {
        "open": run is shown,
        "run": run,
        "plots": {name: f"{name}-{i}" for name in plots},
        "saliency": saliency.get(run.name),
        # Field -> (its value, whether it differs from the default). `...` is
        # different from any value, for fields without a default.
        "fields": {
          name: (json.dumps(value), defaults.get(name, ...) != value)
          for name, value in run_reader.flatten(run.config).items()
        },
        "recipe": {
          name: value
          for name, value in run_reader.recipe(run.config).items()
          if value != defaults.get(name)
        },
        "command": _command(run),
        "no_map": _why_no_map(run),
      }
    )
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
  )
  templates = {
    name: plotly_io.templates[template].to_plotly_json()
    for name, template in _TEMPLATES.items()
  }
  return environment.get_template("report.html.jinja").render(
    runs=runs,
    warnings=run_warnings.find_warnings(runs),
    rows=tables.run_rows(runs, reference),
    reference=reference,
    sections=sections,
    figures={name: _to_script(figure) for name, figure in figures.items()},
    # Both templates: the page follows the reader's light or dark mode.
    templates=_in_script(json.dumps(templates)),
    plotly=offline.get_plotlyjs(),
  )


def _draw_map(run: run_reader.Run) -> dict[str, graph_objects.Figure]:
  """Draw the figures of a transfer map, if there is one."""
  if not run.map:
    return {}
  plots = {"map": plotly_figures.draw_map(run.map)}
  if run.learned_pairs:
    plots["history"] = plotly_figures.draw_history(run.map)
  if not run.map["channels_fixed"]:
    plots["channels"] = plotly_figures.draw_channels(run.map)
  if "source_shares" in run.map:
    plots["shares"] = plotly_figures.draw_shares(run.map)
  return plots


def _why_no_map(run: run_reader.Run) -> str:
  """Say why a run has no transfer map."""
  if run.summary is None and not run.epochs:
    return "no epoch is finished yet"
  if run.epochs and run.epochs[-1].get("pair_weights"):
    return "it is drawn when the run is finished"
  return "the method has no pair weights"


def _to_script(figure: graph_objects.Figure) -> str:
  """Return a figure as JavaScript; the page chooses its template."""
  layout = figure.layout
  # The background of the page shows through, light or dark.
  layout.paper_bgcolor = layout.plot_bgcolor = layout.modebar.bgcolor = _CLEAR
  layout.template = None
  layout.margin = {**_MARGIN, **layout.margin.to_plotly_json()}
  layout.height = layout.height or 380
  return _in_script(figure.to_json())


def _in_script(text: str) -> str:
  """Escape JSON for a script element, where HTML's escapes have no effect."""
  return text.replace("<", "\\u003c")


def _command(run: run_reader.Run) -> str:
  """Return the command that repeats a run; "" if it was made from arrays."""
  if run.config["data"]["source"] == "arrays":
    return ""
  path = run.workdir / run_folder.CONFIG
  if path.is_relative_to(pathlib.Path.cwd()):
    path = path.relative_to(pathlib.Path.cwd())
  config = shlex.quote(str(path))
  return f"python train.py --config={config} --workdir=runs/again"
