"""Show runs on one page: what was transferred where, and what it brought.

    python -m l2t_jax.report RUN [RUN ...] --output=report.html

RUN is the folder of a run, finished or not, or one that is searched for runs,
such as that of a table. The page is one file that needs no network.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Mapping, Sequence
import io
import itertools
import json
import os
import pathlib
import shlex
import statistics
import sys
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
  build,
  checkpoint,
  commands,
  defaults,
  experiment,
  logs,
  saliency,
  transfer,
  transfer_map,
  types,
)

# A pair weight below the one is ignored; above the other, relu6 has saturated.
_DEAD, _SATURATED = 0.05, 5.9
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
  train: list[dict[str, Any]]  # Records of metrics.jsonl, by kind.
  epochs: list[dict[str, Any]]
  map: dict[str, Any] | None  # transfer_map.json, where there is one.

  @property
  def best(self) -> dict[str, Any]:
    """The record of the best epoch so far; empty before the first."""
    best = [record for record in self.epochs if "test_accuracy" in record]
    return best[-1] if best else {}


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

  Raises:
    types.InputError: a folder does not exist or has no run, or a file of a run
      is damaged.
  """
  found: list[pathlib.Path] = []
  for folder in folders:
    configs = sorted(folder.rglob("config.json"))
    if not configs:
      raise types.InputError(
        f"there is no run in {folder}: no config.json; name the --workdir of"
        " train.py or of a table"
      )
    found += [path.parent for path in configs]
  found = list(dict.fromkeys(path.resolve() for path in found))
  common = os.path.commonpath(found)
  names = [os.path.relpath(path, common) for path in found]
  if names == ["."]:
    names = [found[0].name]
  return [_read(path, name) for path, name in zip(found, names, strict=True)]


def _read(workdir, name):
  metrics = []
  if (workdir / logs.METRICS).exists():
    metrics = logs.read_metrics(workdir)
  by_kind = lambda kind: [r for r in metrics if r.get("kind") == kind]
  return Run(
    workdir,
    name,
    _read_json(workdir / "config.json"),
    _read_json(workdir / "summary.json"),
    by_kind("train"),
    by_kind("epoch"),
    _read_json(workdir / transfer_map.FILE),
  )


def _read_json(path):
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise types.InputError(f"{path} is damaged: {error}") from error


def warnings(runs: Sequence[Run]) -> list[str]:
  """Say what a reader should not overlook."""
  found = []
  for run in runs:
    if run.summary is None:
      done = run.epochs[-1]["epoch"] if run.epochs else 0
      found.append(
        f"{run.name} is not finished: {done} of {run.config['epochs']} epochs"
      )
    found += [f"{run.name}: {text}" for text in _about_pairs(run)]
  return _negative_transfer(runs) + found


def _about_pairs(run):
  if run.map is None or run.map["fixed"]:
    return
  weights = [pair["pair_weight"] for pair in run.map["pairs"]]
  dead = sum(weight < _DEAD for weight in weights)
  if dead == len(weights):
    yield "all pair weights went to 0; nothing is transferred any more"
  elif dead:
    yield f"{dead} of {len(weights)} pairs are dead (weight below {_DEAD})"
  activation = run.config["transfer"].get("pair_activation", "relu6")
  saturated = sum(weight > _SATURATED for weight in weights)
  if saturated and activation == "relu6":
    yield (
      f"{saturated} of {len(weights)} pair weights are at relu6's ceiling of 6;"
      " a larger transfer.beta, or pair_activation=softplus, gives them room"
    )


def _negative_transfer(runs):
  """Compare each method with scratch on the same data and target."""
  accuracies: dict[tuple[str, str], list[float]] = {}
  for run in runs:
    if run.summary:
      key = (_task_of(run), run.config["method"])
      accuracies.setdefault(key, []).append(run.summary["val_accuracy"])
  found = []
  for (task, method), values in accuracies.items():
    scratch = accuracies.get((task, "scratch"))
    if scratch and statistics.mean(values) < statistics.mean(scratch):
      found.append(
        f"negative transfer: {method} reaches {_percent(values)} on validation"
        f" ({_seeds(values)}), scratch {_percent(scratch)} ({_seeds(scratch)})"
      )
  return found


def _task_of(run):
  """What runs have in common that can be compared."""
  fields = ("data", "target", "epochs", "batch_size")
  return json.dumps([run.config[field] for field in fields], sort_keys=True)


def _percent(values):
  return f"{100 * statistics.mean(values):.1f} %"


def _seeds(values):
  return "1 run" if len(values) == 1 else f"mean of {len(values)} runs"


def results(runs: Sequence[Run]) -> list[dict[str, str]]:
  """List the rows of the table of runs, and means where seeds differ alone."""
  rows = []
  for run in runs:
    summary, best = run.summary or {}, run.best
    seconds = summary.get("seconds")
    memory = summary.get("memory_bytes")
    rows.append(
      {
        "run": run.name,
        "method": run.config["method"],
        "seed": str(run.config["seed"]),
        "validation %": _cell(best.get("val_accuracy")),
        "test %": _cell(best.get("test_accuracy")),
        "best epoch": str(best.get("epoch", "")),
        "epochs": f"{len(run.epochs)} of {run.config['epochs']}",
        "seconds": "" if seconds is None else f"{seconds:,.0f}",
        "memory": f"{memory / 2**20:,.0f} MiB" if memory else "",
      }
    )
  for group in _by_experiment(runs):
    finished = [run.summary for run in group if run.summary]
    if len(finished) > 1:
      mean = lambda name, of=finished: _mean_and_std([s[name] for s in of])
      row = dict.fromkeys(rows[0], "")
      row |= {
        "run": "mean ± standard deviation",
        "method": group[0].config["method"],
        "seed": f"{len(finished)} seeds",
        "validation %": mean("val_accuracy"),
        "test %": mean("test_accuracy"),
      }
      rows.append(row)
  return rows


def _by_experiment(runs):
  """Group runs that differ in their seed alone."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    config = {k: v for k, v in run.config.items() if k != "seed"}
    groups.setdefault(json.dumps(config, sort_keys=True), []).append(run)
  return list(groups.values())


def _cell(accuracy):
  return "" if accuracy is None else f"{100 * accuracy:.1f}"


def _mean_and_std(values):
  mean, std = statistics.mean(values), statistics.stdev(values)
  return f"{100 * mean:.1f} ± {100 * std:.1f}"


def compute_saliency(run: Run, num_images: int) -> Saliency:
  """Build a run again and look at validation images through its source.

  Args:
    run: one that matched features.
    num_images: how many images, evenly spaced in the validation split.

  Raises:
    types.InputError: data or weights are no longer there, or the run was made
      from objects in a notebook.
  """
  if run.config["data"]["source"] == "arrays":
    raise types.InputError("the run was made from arrays, which are not kept")
  config = commands.load_config(str(run.workdir / "config.json"))
  built = build.build(config)
  state = built.create_state(config.seed)
  folder = run.workdir / experiment.CHECKPOINTS
  if folder.is_dir() and checkpoint.newest_step(folder):
    with checkpoint.Checkpoints(folder) as checkpoints:
      state, _ = checkpoints.restore(state)
  images = _spread_images(built.dataset, num_images)
  features_fn = jax.jit(lambda images: _source_features(built, images))
  features = features_fn(images)
  pooled = {name: x.mean(axis=(1, 2)) for name, x in features.items()}
  assert built.weights_fn is not None
  weights = built.weights_fn(state.meta_params, pooled)
  strongest = sorted(
    built.pairs, key=lambda pair: -float(weights.pair[pair.name].mean())
  )

  def look(pair, channel_weights):
    seen = saliency.saliency(
      lambda images: features_fn(images)[pair.source], images, channel_weights
    )
    return tuple(_heat(one) for one in np.asarray(seen))

  pairs = []
  for pair in strongest[:_NUM_PAIRS_SHOWN]:
    learned = weights.channel[pair.name]
    uniform = np.full_like(learned, 1 / learned.shape[-1])
    pairs.append(Pictures(pair.name, look(pair, uniform), look(pair, learned)))
  mean, std = built.image_format.mean, built.image_format.std
  pixels = np.asarray(images) * np.array(std) + np.array(mean)
  return Saliency(tuple(_picture(image) for image in pixels), tuple(pairs))


def _spread_images(dataset, count):
  """Validation images are often sorted by class: take some of all of them."""
  wanted = np.linspace(0, dataset.num_val - 1, count).round().astype(int)
  found, start = [], 0
  for batch in dataset.eval_batches("val"):
    inside = wanted[(wanted >= start) & (wanted < start + len(batch.images))]
    found.append(batch.images[inside - start])
    start += len(batch.images)
  return jnp.concatenate(found)


def _source_features(run, images):
  """All taps in use, named as in pairs."""
  features: dict[str, jax.Array] = {}
  for name, source_fn in run.source_fns.items():
    source = run.sources[name]
    _, taps, _ = source_fn(
      source.params, source.model_state, images, train=False
    )
    features |= {transfer.tap_name(name, tap): x for tap, x in taps.items()}
  return {name: features[name] for name in run.source_taps}


def _heat(values):
  """A map of values as a picture, its largest the brightest."""
  # One pixel that stands out would leave the others black.
  scale = np.quantile(values, 0.99) or values.max() or 1.0
  return _picture(colormaps["inferno"](np.clip(values / scale, 0, 1))[..., :3])


def _picture(values):
  """[H, W, 1 or 3] from 0 to 1 -> a data URL."""
  pixels = np.clip(np.round(values * 255), 0, 255).astype(np.uint8)
  image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  file = io.BytesIO()
  image.save(file, "png")
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def draw_curves(
  runs: Sequence[Run], metric: str, title: str, factor: float = 1.0
) -> graph_objects.Figure:
  """A metric of every epoch, a line a run, a colour a method.

  Args:
    runs: from `find_runs`.
    metric: its name in metrics.jsonl.
    title: of the axis.
    factor: what values are multiplied by.
  """
  colors = itertools.cycle(plotly_io.templates["plotly"].layout.colorway)
  methods = dict.fromkeys(run.config["method"] for run in runs)
  color_of = dict(zip(methods, colors, strict=False))
  figure = graph_objects.Figure()
  for run in runs:
    figure.add_scatter(
      x=[record["epoch"] for record in run.epochs],
      y=[factor * record[metric] for record in run.epochs],
      mode=_mode(run.epochs),
      name=run.name,
      line_color=color_of[run.config["method"]],
    )
  figure.update_layout(yaxis_title=title, showlegend=True)
  figure.update_xaxes(title_text="epoch", **_EPOCHS)
  return figure


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
  told = [["no pair"] * len(targets) for _ in sources]
  for pair in content["pairs"]:
    row, column = place(pair)
    top = ", ".join(
      f"{c['channel']} ({c['weight'] / c['uniform']:.1f}×)"
      for c in pair["top_channels"]
    )
    told[row][column] = (
      f"share of all {pair['share']:.0%}<br>top channels {top}"
    )

  def heatmap(epoch):
    values = np.full((len(sources), len(targets)), np.nan)
    for pair in content["pairs"]:
      history = dict(zip(content["epochs"], pair["history"], strict=True))
      values[place(pair)] = history[epoch]
    return graph_objects.Heatmap(
      x=targets,
      y=sources,
      z=values.tolist(),
      text=[[_weight(value) for value in row] for row in values],
      texttemplate="%{text}",
      customdata=told,
      hovertemplate="%{y} → %{x}<br>pair weight %{z:.3f}<br>%{customdata}"
      "<extra></extra>",
      colorscale="Blues",
      zmin=0,
      zmax=max(2.0, *(max(pair["history"]) for pair in content["pairs"])),
      showscale=False,
      xgap=2,
      ygap=2,
    )

  epochs = content["epochs"][-1:] if content["fixed"] else content["epochs"]
  last = len(epochs) - 1
  figure = graph_objects.Figure(
    heatmap(epochs[-1]),
    frames=[
      graph_objects.Frame(data=[heatmap(epoch)], name=str(epoch))
      for epoch in epochs[: last and None]
    ],
  )
  figure.update_layout(
    xaxis_title="target layer",
    yaxis_title="source layer",
    yaxis_autorange="reversed",
    height=260 + 46 * len(sources),
  )
  figure.update_xaxes(automargin=True)
  figure.update_yaxes(automargin=True)
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
  """Every pair weight over the epochs."""
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
  """Channel weights of a pair that the reader chooses, the largest first."""
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
  """Each source's share of all pair weights."""
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
  figure.update_yaxes(automargin=True, autorange="reversed")
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
  """
  figures = {
    "loss": draw_curves(runs, "train_loss", "training loss"),
    "accuracy": draw_curves(runs, "val_accuracy", "validation %", factor=100),
  }
  sections = []
  firsts = [group[0] for group in _by_experiment(runs)]
  learned = [run for run in runs if run.map and not run.map["fixed"]]
  shown = (learned or runs)[0]
  for i, run in enumerate(runs):
    plots, pictures, no_pictures = {}, None, ""
    if run.map:
      plots["map"] = draw_map(run.map)
      if not run.map["fixed"]:
        plots["history"] = draw_history(run.map)
      if not run.map["channels_fixed"]:
        plots["channels"] = draw_channels(run.map)
      if "source_shares" in run.map:
        plots["shares"] = draw_shares(run.map)
      # Seeds of one experiment look alike.
      if num_images and run in firsts and not run.map["channels_fixed"]:
        try:
          pictures = compute_saliency(run, num_images)
        except types.InputError as error:
          no_pictures = str(error)
    figures |= {f"{name}-{i}": figure for name, figure in plots.items()}
    sections.append(
      {
        "open": run == shown,
        "run": run,
        "plots": {name: f"{name}-{i}" for name in plots},
        "saliency": pictures,
        "no_saliency": no_pictures,
        "fields": _fields(run.config),
        "command": _command(run),
      }
    )
  for figure in figures.values():
    figure.update_layout(
      paper_bgcolor=_CLEAR, plot_bgcolor=_CLEAR, modebar_bgcolor=_CLEAR
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
    warnings=warnings(runs),
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
  parser = argparse.ArgumentParser(
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
  try:
    page = make_page(find_runs(args.runs), args.images)
    experiment.make_folder(args.output.parent)
    args.output.write_text(page, encoding="utf-8")
  except OSError as error:
    print(f"error: {args.output}: {error.strerror}", file=sys.stderr)
    sys.exit(2)
  except types.InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(f"wrote {args.output}")


if __name__ == "__main__":
  main()
