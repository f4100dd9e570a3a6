"""The figures of the report, drawn by plotly: curves and transfer maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import html
import itertools
import pathlib
from typing import Any

import numpy as np
from plotly import graph_objects
from plotly import io as plotly_io

from l2t_jax.results import run_reader, transfer_map

_EPOCHS = {"tickformat": "d", "minallowed": 0}


def draw_curves(
  runs: Sequence[run_reader.Run], metric: str, title: str
) -> graph_objects.Figure:
  """Draw a metric over the epochs: one line per run, one colour per method.

  Runs of one method on different data have different colours.

  Args:
    runs: from `run_reader.find_runs`.
    metric: its name in metrics.jsonl.
    title: title of the y axis.

  Returns:
    The figure; its legend shows and hides all runs of a colour.
  """
  colors = itertools.cycle(plotly_io.templates["plotly"].layout.colorway)
  names = _legend_names(runs)
  color_of = dict(zip(dict.fromkeys(names), colors, strict=False))
  figure = graph_objects.Figure()
  for i, (run, name) in enumerate(zip(runs, names, strict=True)):
    is_share = metric == "val_accuracy" and run.in_percent
    figure.add_scatter(
      x=[record["epoch"] for record in run.epochs],
      y=[(100 if is_share else 1) * record[metric] for record in run.epochs],
      mode=_mode(run.epochs),
      name=name,
      legendgroup=name,
      # One entry in the legend for all runs of a colour.
      showlegend=name not in names[:i],
      hovertemplate=f"{html.escape(run.name)}<br>epoch %{{x}}: %{{y:.4g}}"
      "<extra></extra>",
      line_color=color_of[name],
    )
  figure.update_layout(yaxis_title=title, showlegend=True)
  figure.update_xaxes(title_text="epoch", **_EPOCHS)
  return figure


def _legend_names(runs):
  """Name each run by its method, and by its data if these differ."""
  methods = [run.config["method"] for run in runs]
  fields = [run.config["data"] for run in runs]
  data = [one["name"] or pathlib.Path(one["path"]).name for one in fields]
  if len(set(data)) == 1:
    return methods
  return [f"{m}, {d}" for m, d in zip(methods, data, strict=True)]


def _mode(epochs):
  return "lines+markers" if len(epochs) < 12 else "lines"


def draw_map(content: Mapping[str, Any]) -> graph_objects.Figure:
  """Draw source layers against target layers, with a slider over the epochs.

  Args:
    content: of a transfer_map.json.
  """
  # Fixed weights are the same in all epochs and need no slider.
  epochs = content["epochs"][-1:] if content["fixed"] else content["epochs"]
  figure = graph_objects.Figure(
    graph_objects.Heatmap(
      x=[tap["name"] for tap in content["target_taps"]],
      y=[tap["name"] for tap in content["source_taps"]],
      **_map_cells(content, epochs[-1]),
      texttemplate="%{text}",
      hovertemplate="%{y} → %{x}<br>pair weight %{z:.3f}<br>%{customdata}"
      "<extra></extra>",
      colorscale="Blues",
      showscale=False,
      # One colour scale for all epochs.
      zmin=0,
      zmax=max(2.0, *(max(pair["history"]) for pair in content["pairs"])),
      xgap=2,
      ygap=2,
    )
  )
  figure.update_layout(
    xaxis_title="target layer",
    yaxis_title="source layer",
    yaxis_autorange="reversed",
    height=260 + 46 * len(content["source_taps"]),
  )
  figure.update_xaxes(automargin=True, type="category")
  figure.update_yaxes(automargin=True, type="category")
  if len(epochs) > 1:
    _add_slider(figure, content, epochs)
  return figure


def _add_slider(figure, content, epochs):
  """Add a slider that shows the cells of any epoch, the last one first."""
  figure.frames = [
    graph_objects.Frame(
      data=[graph_objects.Heatmap(**_map_cells(content, epoch))],
      name=str(epoch),
    )
    for epoch in epochs
  ]
  at_once = {"mode": "immediate", "frame": {"duration": 0}}
  step = lambda name: {
    "label": name,
    "method": "animate",
    "args": [[name], at_once],
  }
  figure.update_layout(
    sliders=[
      {
        "active": len(epochs) - 1,
        "currentvalue": {"prefix": "epoch "},
        "pad": {"t": 60},
        "steps": [step(str(epoch)) for epoch in epochs],
      }
    ]
  )


def _map_cells(content: Mapping[str, Any], epoch: int) -> dict[str, Any]:
  """Return the pair weights of an epoch, and the hover text of each cell."""
  sources = [tap["name"] for tap in content["source_taps"]]
  targets = [tap["name"] for tap in content["target_taps"]]
  index = content["epochs"].index(epoch)
  total = sum(pair["history"][index] for pair in content["pairs"])
  weights = np.full((len(sources), len(targets)), np.nan)
  hover = np.full(weights.shape, "no pair", object)
  for pair in content["pairs"]:
    place = sources.index(pair["source"]), targets.index(pair["target"])
    weight = pair["history"][index]
    weights[place] = weight
    top = ", ".join(
      f"{c['channel']} ({c['weight'] / c['uniform']:.1f}×)"
      for c in pair["top_channels"]
    )
    hover[place] = (
      f"share of all {weight / total if total else 0:.0%}"
      f"<br>top channels in the end {top}"
    )
  texts = [["" if np.isnan(w) else f"{w:.2f}" for w in row] for row in weights]
  return {"z": weights.tolist(), "text": texts, "customdata": hover.tolist()}


def draw_history(content: Mapping[str, Any]) -> graph_objects.Figure:
  """Draw every pair weight over the epochs.

  Args:
    content: of a transfer_map.json.
  """
  figure = graph_objects.Figure()
  for pair in transfer_map.strongest_first(content):
    figure.add_scatter(
      x=content["epochs"],
      y=pair["history"],
      mode=_mode(content["epochs"]),
      name=transfer_map.pair_name(pair),
    )
  figure.update_layout(yaxis_title="pair weight", yaxis_rangemode="tozero")
  figure.update_xaxes(title_text="epoch", **_EPOCHS)
  return figure


def draw_channels(content: Mapping[str, Any]) -> graph_objects.Figure:
  """Draw the sorted channel weights of a pair; a menu selects the pair.

  Args:
    content: of a transfer_map.json.
  """
  pairs = transfer_map.strongest_first(content)
  figure = graph_objects.Figure()
  buttons = []
  for i, pair in enumerate(pairs):
    weights = np.array(pair["channel_weights"]) * pair["num_channels"]
    order = np.argsort(-weights, kind="stable")
    name = transfer_map.pair_name(pair)
    figure.add_bar(
      x=list(range(1, len(order) + 1)),
      y=weights[order].tolist(),
      customdata=order.tolist(),
      hovertemplate="channel %{customdata}<br>%{y:.2f} × 1/C<extra></extra>",
      visible=i == 0,
      name=name,
      marker_line_width=0,
    )
    shown = {"visible": [j == i for j in range(len(pairs))]}
    buttons.append({"label": name, "method": "update", "args": [shown]})
  menu = {"buttons": buttons, "x": 0, "xanchor": "left"}
  figure.add_hline(y=1, line_dash="dot")
  figure.update_layout(
    xaxis_title="source channels, strongest first",
    yaxis_title="weight, multiple of 1/C",
    showlegend=False,
    bargap=0.1,
    updatemenus=[{**menu, "y": 1.22, "yanchor": "top"}],
    margin_t=70,
  )
  return figure


def draw_shares(content: Mapping[str, Any]) -> graph_objects.Figure:
  """Draw each source's share of all pair weights.

  Args:
    content: of a transfer_map.json with several sources.
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
