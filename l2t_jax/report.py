"""Show runs on one page: what was transferred where, and what it brought.

    python -m l2t_jax.report RUN [RUN ...] --output=report.html

RUN is the folder of a run, finished or not, or one that is searched for runs,
such as that of a table. The page is one file that needs no network.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Mapping, Sequence
import html
import io
import itertools
import json
import os
import pathlib
import shlex
import statistics
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import jinja2
from matplotlib import colormaps
import numpy as np
from PIL import Image
from plotly import graph_objects, offline
from plotly import io as plotly_io

from l2t_jax import (
  arguments,
  build,
  checkpoint,
  commands,
  compilation,
  defaults,
  experiment,
  files,
  logs,
  objectives,
  run_folder,
  saliency,
  training,
  transfer,
  transfer_map,
  types,
)

_SATURATED = 5.9  # A pair weight above this is at relu6's ceiling.
_PICTURE_SIZE = 208  # Pixels at most; twice of what is shown.
_NUM_PAIRS_SHOWN = 3  # Those whose saliency is shown, the strongest.
_TEMPLATES = {"light": "plotly_white", "dark": "plotly_dark"}
_CLEAR = "rgba(0,0,0,0)"
_EPOCHS = {"tickformat": "d", "minallowed": 0}
_MARGIN = {"l": 60, "r": 20, "t": 30, "b": 50}


class Run(NamedTuple):
  """What a run left in its folder."""

  workdir: pathlib.Path
  name: str  # Tells it apart from the others.
  config: dict[str, Any]
  summary: dict[str, Any] | None  # None where it is not finished.
  epochs: list[dict[str, Any]]  # Records of metrics.jsonl.
  map: dict[str, Any] | None  # transfer_map.json, where there is one.

  @property
  def best(self) -> dict[str, Any]:
    """The record of the best epoch so far; empty before the first."""
    best = [record for record in self.epochs if "test_accuracy" in record]
    return best[-1] if best else {}

  @property
  def is_classifier(self) -> bool:
    """Whether its accuracies are shares of images."""
    return objectives.is_classification(self.config["target"])

  @property
  def learned_pairs(self) -> bool:
    """Whether its pair weights were learned, and not given."""
    frozen = self.config["transfer"].get("map")
    return self.map is not None and not self.map["fixed"] and not frozen

  @property
  def learned_channels(self) -> bool:
    frozen = self.config["transfer"].get("map")
    learned = self.map is not None and not self.map["channels_fixed"]
    return learned and not frozen


class Pictures(NamedTuple):
  """Saliency of some images for one pair."""

  pair: str
  uniform: tuple[str, ...]  # Data URLs, image by image.
  learned: tuple[str, ...]


class Saliency(NamedTuple):
  """What the source looks at, with uniform and with learned weights."""

  images: tuple[str, ...]  # Data URLs.
  pairs: tuple[Pictures, ...]


def find_runs(folders: Sequence[pathlib.Path]) -> list[Run]:
  """Read runs.

  Args:
    folders: of runs, or folders that are searched for some.

  Returns:
    The runs, sorted by path within each folder.

  Raises:
    types.InputError: a folder does not exist or has no run, or a file of a run
      is damaged.
  """
  found: list[pathlib.Path] = []
  for folder in folders:
    configs = sorted(folder.rglob("config.json"))
    runs = [path.parent for path in configs if _is_run(path)]
    if not runs:
      raise types.InputError(
        f"there is no run in {folder}: no config.json of one; name the"
        " --workdir of train.py or of a table"
      )
    found += runs
  found = list(dict.fromkeys(path.resolve() for path in found))
  common = os.path.commonpath(found)
  names = [os.path.relpath(path, common) for path in found]
  if names == ["."]:
    names = [found[0].name]
  return [_read(path, name) for path, name in zip(found, names, strict=True)]


def _is_run(config_file):
  """Other programs leave files of that name, too."""
  config = _read_json(config_file)
  return isinstance(config, dict) and {"method", "epochs", "data"} <= set(
    config
  )


def _read(workdir, name):
  metrics = []
  if (workdir / logs.METRICS).exists():
    metrics = logs.read_metrics(workdir)
  return Run(
    workdir,
    name,
    _read_json(workdir / "config.json"),
    _read_json(workdir / "summary.json"),
    [record for record in metrics if record.get("kind") == "epoch"],
    _read_json(workdir / transfer_map.FILE),
  )


def _read_json(path):
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise types.InputError(f"{path} is damaged: {error}") from error


def find_warnings(runs: Sequence[Run]) -> list[str]:
  """Say what a reader should not overlook.

  Args:
    runs: from `find_runs`.

  Returns:
    A sentence each; runs of which the same is to be said share one.
  """
  about: dict[str, list[str]] = {}
  for run in runs:
    for text in _about(run):
      about.setdefault(text, []).append(run.name)
  return _negative_transfer(runs) + [
    f"{_listed(names)}: {text}" for text, names in about.items()
  ]


def _listed(names):
  if len(names) > 3:
    return f"{', '.join(names[:2])} and {len(names) - 2} other runs"
  return ", ".join(names)


def _about(run):
  if run.summary is None:
    done = run.epochs[-1]["epoch"] if run.epochs else 0
    yield f"not finished, {done} of {run.config['epochs']} epochs"
  if run.map and not _is_current(run.map):
    yield "its transfer map is of an older version and not shown; train again"
  elif run.learned_pairs:
    weights = [pair["pair_weight"] for pair in run.map["pairs"]]
    dead = sum(weight < transfer_map.IGNORED for weight in weights)
    if dead == len(weights):
      yield "all pair weights went to 0; nothing is transferred any more"
    elif dead:
      limit = transfer_map.IGNORED
      yield f"{dead} of {len(weights)} pairs are dead (weight below {limit})"
    activation = run.config["transfer"].get("pair_activation", "relu6")
    saturated = sum(weight > _SATURATED for weight in weights)
    if saturated and activation == "relu6":
      yield (
        f"{saturated} of {len(weights)} pair weights are at relu6's ceiling of"
        " 6; a larger transfer.beta, or pair_activation=softplus, gives room"
      )


def _is_current(content):
  return all("channel_weights" in pair for pair in content["pairs"])


def _negative_transfer(runs):
  """Compare each experiment with scratch on the same labelled images."""
  groups = [
    [run for run in group if run.summary] for group in _by_experiment(runs)
  ]
  groups = [group for group in groups if group]
  mean = lambda group: statistics.mean(r.summary["val_accuracy"] for r in group)
  baselines = {
    _task_of(group[0]): group
    for group in groups
    if group[0].config["method"] == "scratch"
  }
  found = []
  for group in groups:
    scratch = baselines.get(_task_of(group[0]))
    if scratch and mean(group) < mean(scratch):
      show = lambda group: (
        f"{_accuracy(group[0], mean(group))} on validation"
        f" (mean of {len(group)})"
      )
      found.append(
        f"negative transfer: {_name_of(group)} reaches {show(group)},"
        f" {_name_of(scratch)} {show(scratch)}"
      )
  return found


def _task_of(run):
  """What a run and its baseline have in common: all that scratch reads."""
  fields = {
    name: run.config[name]
    for name in ("target", "epochs", "batch_size", "optimizer")
  }
  fields["target"] = {k: v for k, v in fields["target"].items() if k != "taps"}
  fields["data"] = {
    name: value
    for name, value in run.config["data"].items()
    if not name.startswith("unlabeled") and name != "num_workers"
  }
  return json.dumps(fields, sort_keys=True)


def results(runs: Sequence[Run]) -> list[dict[str, str]]:
  """List the rows of the table of runs.

  Args:
    runs: from `find_runs`.

  Returns:
    Column -> text, a row each run; and a row of means after those that differ
    in their seed alone.
  """
  rows = []
  for group in _by_experiment(runs):
    rows += [_row(run) for run in group]
    finished = [run for run in group if run.summary]
    if len(finished) > 1:
      row = dict.fromkeys(rows[0], "")
      row |= {
        "run": f"{_name_of(group)}: mean ± std",
        "method": group[0].config["method"],
        "seed": f"{len(finished)} seeds",
        "validation": _mean_and_std(finished, "val_accuracy"),
        "test": _mean_and_std(finished, "test_accuracy"),
      }
      rows.append(row)
  return rows


def _row(run):
  summary, best = run.summary or {}, run.best
  seconds, memory = summary.get("seconds"), summary.get("memory_bytes")
  return {
    "run": run.name,
    "method": run.config["method"],
    "seed": str(run.config["seed"]),
    "validation": _accuracy(run, best.get("val_accuracy")),
    "test": _accuracy(run, best.get("test_accuracy")),
    "best epoch": str(best.get("epoch", "")),
    "epochs": f"{len(run.epochs)} of {run.config['epochs']}",
    "seconds": "" if seconds is None else f"{seconds:,.0f}",
    "memory": f"{memory / 2**20:,.0f} MiB" if memory else "",
  }


def _by_experiment(runs):
  """Group runs that differ in their seed alone."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    fields = traverse_util.flatten_dict(run.config, sep=".")
    for free in ("seed", *run_folder.FREE_FIELDS):
      fields.pop(free, None)
    groups.setdefault(json.dumps(fields, sort_keys=True), []).append(run)
  return list(groups.values())


def _name_of(group):
  """What the names of some runs have in common."""
  if len(group) == 1:
    return group[0].name
  return os.path.commonpath([run.name for run in group]) or "all"


def _accuracy(run, value):
  if value is None:
    return ""
  return f"{100 * value:.1f} %" if run.is_classifier else f"{value:.4g}"


def _mean_and_std(runs, name):
  values = [run.summary[name] for run in runs]
  mean, std = statistics.mean(values), statistics.stdev(values)
  if runs[0].is_classifier:
    return f"{100 * mean:.1f} ± {100 * std:.1f} %"
  return f"{mean:.4g} ± {std:.2g}"


def compute_saliency(run: Run, num_images: int) -> Saliency:
  """Build a run again and look at validation images through its source.

  Args:
    run: one that learned channel weights.
    num_images: how many images, evenly spaced in the validation split.

  Returns:
    Pictures of the run's strongest pairs.

  Raises:
    types.InputError: data, weights or checkpoints are no longer there, or the
      run was made from objects in a notebook.
  """
  if run.config["data"]["source"] == "arrays":
    raise types.InputError("the run was made from arrays, which are not kept")
  config = commands.load_config(str(run.workdir / "config.json"))
  built = build.build(config)
  meta_params = _restore(run, built.create_state(config.seed)).meta_params
  images = _spread_images(built.dataset, num_images)

  @jax.jit
  def features_fn(images):
    _, features = training.run_sources(built.source_fns, built.sources, images)
    return features

  source = transfer.prepare_source(
    features_fn(images), built.pairs, built.target_taps
  )
  assert built.weights_fn is not None  # The run has a transfer map.
  weights = built.weights_fn(meta_params, source.pooled)

  def look(tap, channel_weights):
    seen = saliency.saliency(
      lambda images: features_fn(images)[tap], images, channel_weights
    )
    return tuple(_heat(one) for one in np.asarray(seen))

  pairs = []
  for strong in _strongest_first(run.map)[:_NUM_PAIRS_SHOWN]:
    learned = weights.channel[f"{strong['source']}->{strong['target']}"]
    uniform = np.full_like(learned, 1 / learned.shape[-1])
    pairs.append(
      Pictures(
        _pair_name(strong),
        look(strong["source"], uniform),
        look(strong["source"], learned),
      )
    )
  mean, std = built.image_format.mean, built.image_format.std
  pixels = np.asarray(images) * np.array(std) + np.array(mean)
  return Saliency(tuple(_picture(image) for image in pixels), tuple(pairs))


def _restore(run, state):
  folder = run.workdir / experiment.CHECKPOINTS
  if not folder.is_dir():
    raise types.InputError(f"{folder} does not exist any more")
  with checkpoint.Checkpoints(folder) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      raise types.InputError(f"{folder} has no checkpoint any more")
    try:
      return checkpoints.restore(steps[-1], state)[0]
    except checkpoint.DamagedError as error:
      raise types.InputError(f"{folder} cannot be read: {error}") from error


def _spread_images(dataset, count):
  """Validation images are often sorted by class: take some of all of them."""
  wanted = np.unique(np.linspace(0, dataset.num_val - 1, count).round())
  found, start = [], 0
  for batch in dataset.eval_batches("val"):
    inside = wanted[(wanted >= start) & (wanted < start + len(batch.images))]
    found.append(batch.images[(inside - start).astype(int)])
    start += len(batch.images)
  return jnp.concatenate(found)


def _heat(values):
  """A map of values as a picture, its largest the brightest."""
  # One pixel that stands out would leave the others black.
  scale = np.quantile(values, 0.99) or values.max() or 1.0
  return _picture(colormaps["inferno"](np.clip(values / scale, 0, 1))[..., :3])


def _picture(values):
  """[H, W, 1 or 3] from 0 to 1 -> a data URL."""
  pixels = np.clip(np.round(values * 255), 0, 255).astype(np.uint8)
  image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  image.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
  file = io.BytesIO()
  image.save(file, "png")
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def draw_curves(
  runs: Sequence[Run], metric: str, title: str, factor: float = 1.0
) -> graph_objects.Figure:
  """A metric of every epoch, a line a run, a colour a method (and data set).

  Args:
    runs: from `find_runs`.
    metric: its name in metrics.jsonl.
    title: of the axis.
    factor: what values are multiplied by.

  Returns:
    The figure; its legend has a line a colour, which shows and hides its runs.
  """
  colors = itertools.cycle(plotly_io.templates["plotly"].layout.colorway)
  names = _names_of_kinds(runs)
  color_of = dict(zip(dict.fromkeys(names), colors, strict=False))
  figure = graph_objects.Figure()
  named = set()
  for run, name in zip(runs, names, strict=True):
    figure.add_scatter(
      x=[record["epoch"] for record in run.epochs],
      y=[factor * record[metric] for record in run.epochs],
      mode=_mode(run.epochs),
      name=name,
      legendgroup=name,
      showlegend=name not in named,
      hovertemplate=f"{html.escape(run.name)}<br>epoch %{{x}}: %{{y:.4g}}"
      "<extra></extra>",
      line_color=color_of[name],
    )
    named.add(name)
  figure.update_layout(yaxis_title=title, showlegend=True)
  figure.update_xaxes(title_text="epoch", **_EPOCHS)
  return figure


def _names_of_kinds(runs):
  """Name each run by its method, and by its data where the runs' differ."""
  methods = [run.config["method"] for run in runs]
  fields = [run.config["data"] for run in runs]
  data = [one["name"] or pathlib.Path(one["path"]).name for one in fields]
  if len(set(data)) == 1:
    return methods
  return [f"{m}, {d}" for m, d in zip(methods, data, strict=True)]


def _mode(epochs):
  return "lines+markers" if len(epochs) < 12 else "lines"


def draw_map(content: Mapping[str, Any]) -> graph_objects.Figure:
  """Source layers against target layers, with a slider over the epochs.

  Args:
    content: of a transfer_map.json.
  """
  sources = [tap["name"] for tap in content["source_taps"]]
  targets = [tap["name"] for tap in content["target_taps"]]
  place = lambda pair: (
    sources.index(pair["source"]),
    targets.index(pair["target"]),
  )

  def values_of(epoch):
    """Return pair weights, and what a cell tells, in the form of the table."""
    index = content["epochs"].index(epoch)
    total = sum(pair["history"][index] for pair in content["pairs"])
    weights = np.full((len(sources), len(targets)), np.nan)
    told = np.full(weights.shape, "no pair", object)
    for pair in content["pairs"]:
      weight = pair["history"][index]
      weights[place(pair)] = weight
      top = ", ".join(
        f"{c['channel']} ({c['weight'] / c['uniform']:.1f}×)"
        for c in pair["top_channels"]
      )
      told[place(pair)] = (
        f"share of all {weight / total if total else 0:.0%}"
        f"<br>top channels in the end {top}"
      )
    texts = [[_weight(value) for value in row] for row in weights]
    return {"z": weights.tolist(), "text": texts, "customdata": told.tolist()}

  epochs = content["epochs"][-1:] if content["fixed"] else content["epochs"]
  last = len(epochs) - 1
  figure = graph_objects.Figure(
    graph_objects.Heatmap(
      x=targets,
      y=sources,
      **values_of(epochs[-1]),
      texttemplate="%{text}",
      hovertemplate="%{y} → %{x}<br>pair weight %{z:.3f}<br>%{customdata}"
      "<extra></extra>",
      colorscale="Blues",
      showscale=False,
      zmin=0,
      zmax=max(2.0, *(max(pair["history"]) for pair in content["pairs"])),
      xgap=2,
      ygap=2,
    ),
    frames=[
      graph_objects.Frame(
        data=[graph_objects.Heatmap(**values_of(epoch))], name=str(epoch)
      )
      for epoch in (epochs if last else ())
    ],
  )
  figure.update_layout(
    xaxis_title="target layer",
    yaxis_title="source layer",
    yaxis_autorange="reversed",
    height=260 + 46 * len(sources),
  )
  figure.update_xaxes(automargin=True, type="category")
  figure.update_yaxes(automargin=True, type="category")
  if last:
    instantly = {"mode": "immediate", "frame": {"duration": 0}}
    figure.update_layout(
      sliders=[
        {
          "active": last,
          "currentvalue": {"prefix": "epoch "},
          "pad": {"t": 60},
          "steps": [
            {
              "label": str(epoch),
              "method": "animate",
              "args": [[str(epoch)], instantly],
            }
            for epoch in epochs
          ],
        }
      ]
    )
  return figure


def _weight(value):
  return "" if np.isnan(value) else f"{value:.2f}"


def draw_history(content: Mapping[str, Any]) -> graph_objects.Figure:
  """Every pair weight over the epochs.

  Args:
    content: of a transfer_map.json.
  """
  figure = graph_objects.Figure()
  for pair in _strongest_first(content):
    figure.add_scatter(
      x=content["epochs"],
      y=pair["history"],
      mode=_mode(content["epochs"]),
      name=_pair_name(pair),
    )
  figure.update_layout(yaxis_title="pair weight")
  figure.update_xaxes(title_text="epoch", **_EPOCHS)
  figure.update_yaxes(rangemode="tozero")
  return figure


def draw_channels(content: Mapping[str, Any]) -> graph_objects.Figure:
  """Channel weights of a pair that the reader chooses, the largest first.

  Args:
    content: of a transfer_map.json.
  """
  pairs = _strongest_first(content)
  figure = graph_objects.Figure()
  for i, pair in enumerate(pairs):
    weights = np.array(pair["channel_weights"]) * pair["num_channels"]
    order = np.argsort(-weights, kind="stable")
    figure.add_bar(
      x=list(range(1, len(order) + 1)),
      y=weights[order].tolist(),
      customdata=order.tolist(),
      hovertemplate="channel %{customdata}<br>%{y:.2f} × 1/C<extra></extra>",
      visible=i == 0,
      name=_pair_name(pair),
      marker_line_width=0,
    )
  figure.add_hline(y=1, line_dash="dot")
  figure.update_layout(
    xaxis_title="source channels, strongest first",
    yaxis_title="weight, multiple of 1/C",
    showlegend=False,
    bargap=0.1,
    updatemenus=[
      {
        "buttons": [
          {
            "label": _pair_name(pair),
            "method": "update",
            "args": [{"visible": [j == i for j in range(len(pairs))]}],
          }
          for i, pair in enumerate(pairs)
        ],
        "x": 0,
        "xanchor": "left",
        "y": 1.22,
        "yanchor": "top",
      }
    ],
    margin={**_MARGIN, "t": 70},
  )
  return figure


def draw_shares(content: Mapping[str, Any]) -> graph_objects.Figure:
  """Each source's share of all pair weights.

  Args:
    content: of a transfer_map.json, with several sources.
  """
  shares = content["source_shares"]
  figure = graph_objects.Figure(
    graph_objects.Bar(
      x=[100 * share for share in shares.values()],
      y=list(shares),
      orientation="h",
      text=[f"{share:.0%}" for share in shares.values()],
    )
  )
  figure.update_layout(
    xaxis_title="% of the transfer", height=140 + 40 * len(shares)
  )
  figure.update_yaxes(automargin=True, autorange="reversed", type="category")
  return figure


def _strongest_first(content):
  return sorted(content["pairs"], key=lambda pair: -pair["pair_weight"])


def _pair_name(pair):
  return f"{pair['source']} → {pair['target']}"


def make_page(runs: Sequence[Run], num_images: int) -> str:
  """Put everything together, as HTML.

  Args:
    runs: from `find_runs`.
    num_images: that saliency is shown of; 0 for none.

  Returns:
    The page, which needs no other file.
  """
  warnings = find_warnings(runs)
  factor, unit = (100, " %") if runs[0].is_classifier else (1, "")
  figures = {
    "loss": draw_curves(runs, "train_loss", "training loss"),
    "accuracy": draw_curves(
      runs, "val_accuracy", f"validation accuracy{unit}", factor
    ),
  }
  sections = []
  runs = [
    run._replace(map=None) if run.map and not _is_current(run.map) else run
    for run in runs
  ]
  # Seeds of one experiment look alike: one of them is looked at closely.
  experiments = _by_experiment([run for run in runs if run.learned_channels])
  looked_at = {group[0].workdir for group in experiments if num_images}
  shown = next((run for run in runs if run.learned_pairs), runs[0])
  for i, run in enumerate(runs):
    plots, pictures, no_pictures = {}, None, ""
    if run.map:
      plots["map"] = draw_map(run.map)
      if run.learned_pairs:
        plots["history"] = draw_history(run.map)
      if not run.map["channels_fixed"]:
        plots["channels"] = draw_channels(run.map)
      if "source_shares" in run.map:
        plots["shares"] = draw_shares(run.map)
      if run.workdir in looked_at:
        try:
          pictures = compute_saliency(run, num_images)
        except types.InputError as error:
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
      figure.update_layout(margin=_MARGIN)
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
    rows=results(runs),
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
  usual = flat(json.loads(defaults.get_config().to_json()))
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


def main() -> None:
  parser = arguments.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", type=pathlib.Path, nargs="+", metavar="RUN")
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("report.html")
  )
  parser.add_argument(
    "--images", type=int, default=6, help="to show saliency of (6); 0: none"
  )
  args = parser.parse_args()
  if args.images < 0:
    parser.error(f"--images={args.images} must be 0 or more")
  compilation.use_cache()
  with types.errors_in_one_line():
    runs = find_runs(args.runs)
    with files.output_errors(args.output):
      files.check_place(args.output)  # Before the work.
    content = make_page(runs, args.images)
    with files.output_errors(args.output):
      files.write(args.output, content)
  print(f"wrote {args.output}")


if __name__ == "__main__":
  main()
