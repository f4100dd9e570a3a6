"""Show what a run learned: which layers and channels the target copies.

`transfer_map.json` holds the content, and `transfer_map.png` is drawn from it
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import re
from typing import Any

from matplotlib import axes, figure, patches, ticker
import numpy as np

from l2t_jax import files
from l2t_jax.results import style, transfer_map

FILE = "transfer_map.png"

_COLORS = style.COLORS[:4]  # For the strongest pairs; the others are grey.
# Horizontal positions of their labels, from 0 (source) to 1 (target): far
# enough apart that labels do not overlap, whatever their heights.
_LABEL_AT = (0.4, 0.6, 0.2, 0.8)
_LAYERS = 5.5  # Width of the panel of layers, in inches.
_BOX = 1.5  # Width of a layer's box, in inches.
_HEAD = 0.5  # Height of a source's name above its boxes, in inches.
_MOVED = 0.05  # Smaller changes over training are not reported as a result.
_CHANNELS_TEXT = (
  "Bars: a channel's weight as a multiple of the even share 1/C, which is the "
  "dashed line."
)
# (side, tap) -> (centre, height) of its box, in inches.
_Boxes = dict[tuple[str, str], tuple[float, float]]


def write(workdir: pathlib.Path | str, content: Mapping[str, Any]) -> None:
  """Write `transfer_map.json` and `transfer_map.png` atomically."""
  workdir = pathlib.Path(workdir)
  text = json.dumps(content, indent=2, allow_nan=False) + "\n"
  # A list of numbers, such as 512 channel weights, takes one line.
  text = re.sub(r'\[\n[^][{}"]*\]', lambda m: " ".join(m[0].split()), text)
  files.write(workdir / transfer_map.FILE, text)
  files.write(workdir / FILE, style.to_png(draw(content)))


def draw(content: Mapping[str, Any]) -> figure.Figure:
  """Draw the picture: header, layers and numbers, history, channels."""
  ranked = transfer_map.strongest_first(content)
  names = _pair_names(content, ranked)
  learned_pairs, learned_channels = transfer_map.learned(content)
  shown = [p for p in ranked[:3] if not transfer_map.is_ignored(content, p)]
  bars = bool(shown) and not content["channels_fixed"]
  rows, columns = len(content["source_taps"]), len(content["target_taps"])
  shares = content.get("source_shares", {})
  tall = max(2.2, 0.25 + 0.65 * rows + _HEAD * len(shares), 0.74 * columns)
  # Positions of the titles of the three rows of panels, in inches from the top.
  first = 1.4
  second = first + tall + 0.65
  third = second + (3.1 if learned_pairs else 0.75)
  page = style.Page(third + (2.75 if bars else 0.8))

  page.write(0.35, 0.25, "What the target copied, and from where", 17)
  page.write(0.35, 0.66, _summary(content, ranked, names[0]), 10)
  page.write(0.35, 0.94, _scale_text(content), 8.5)

  page.write(0.35, first, "From source layers to target layers", 11)
  ax = page.panel(0.35, first + 0.3, _LAYERS, tall)
  ax.set(xlim=(-0.02, _LAYERS + 0.02), ylim=(tall, 0))
  ax.axis("off")
  _draw_bands(ax, content, ranked, _draw_boxes(ax, content, tall))
  page.write(6.2, first, "Every pair weight", 11)
  page.write(6.2, first + 0.25, "rows: source, columns: target", 8.5)
  aside = 0.25 if shares else 0.0  # For the names of the sources.
  size = min(2.45 - aside, 0.62 * columns), min(tall - 0.7, 0.62 * rows)
  ax = page.panel(7.25 + aside, first + 0.6, *size)
  _draw_table(ax, content, size)

  page.write(0.35, second, "Pair weight, epoch by epoch", 11)
  if learned_pairs:
    page.write(0.35, second + 0.27, _history_text(ranked, names), 8.5)
    ax = page.panel(0.75, second + 0.6, 5.1, 1.9)
    _draw_history(ax, content, ranked, names)
  else:
    given = "Fixed at 1" if content["fixed"] else "Given by another run's map"
    text = f"{given} for every pair, not learned."
    page.write(0.35, second + 0.3, text, 9.5)

  page.write(0.35, third, "Channels that count most", 11)
  if bars:
    given = "" if learned_channels else "Given, not learned. "
    page.write(0.35, third + 0.27, given + _CHANNELS_TEXT, 8.5)
    peak = max(1.2, *(_multiples(pair)[0] for pair in shown))
    for i, pair in enumerate(shown):
      ax = page.panel(0.45 + 3.18 * i, third + 1.05, 2.75, 1.15)
      ax.set_ylim(0, 1.25 * peak)
      _draw_channels(ax, pair, names[i], _COLORS[i])
  elif content["channels_fixed"]:
    text = "Every channel counts the same: fixed, not learned."
    page.write(0.35, third + 0.3, text, 9.5)
  else:
    page.write(0.35, third + 0.3, "None: every pair is ignored.", 9.5)
  return page.figure


def _scale_text(content: Mapping[str, Any]) -> str:
  """Explain the scale of pair weights, and the upper bound of learned ones."""
  text = "Pair weight 0 = ignored"
  if transfer_map.learned(content)[0] and content["maximum"]:
    text += f", {content['maximum']:.3g} = maximum"
  return (
    f"{text}. The thicker a line, the harder the target layer is pulled towards"
    " that source layer."
  )


def _history_text(
  ranked: Sequence[transfer_map.Pair], names: Sequence[str]
) -> str:
  """Name the pair that moved most: large weights may have started large."""
  text = "means over each epoch"
  if len(ranked) > len(_COLORS):
    text += "; grey: the weaker pairs"
  moved = max(range(len(ranked)), key=lambda i: _moved(ranked[i]))
  if _moved(ranked[moved]) < _MOVED:
    return text
  return f"{text}; moved most: {names[moved]}, {_course(ranked[moved])}"


def _moved(pair: transfer_map.Pair) -> float:
  """Return by how much a pair weight changed since the first epoch."""
  return abs(pair["pair_weight"] - pair["history"][0])


def _course(pair: transfer_map.Pair) -> str:
  """Format a pair weight as "first epoch → last epoch"."""
  first = f"{pair['history'][0]:.2f} → " if len(pair["history"]) > 1 else ""
  return f"{first}{pair['pair_weight']:.2f}"


def _multiples(pair: transfer_map.Pair) -> list[float]:
  """Return the top channels' weights as multiples of 1/C."""
  return [c["weight"] / c["uniform"] for c in pair["top_channels"]]


def _tap_names(
  content: Mapping[str, Any], side: str
) -> dict[str, dict[str, str]]:
  """Return source -> tap -> its name within the source.

  The source is "" if there is only one, and for taps of the target. If names
  are long, the enclosing modules that all taps of a source share are left out.
  """
  groups = {}
  sources = content.get("source_shares", ()) if side == "source" else ()
  for source in sources or ("",):
    start = f"{source}/" if source else ""
    taps = [tap["name"] for tap in content[f"{side}_taps"]]
    taps = [tap for tap in taps if tap.startswith(start)]
    names = [tap.removeprefix(start) for tap in taps]
    if max(map(len, names), default=0) > 14:
      shared = os.path.commonprefix(names)  # noqa: RUF071
      cut = max(shared.rfind("/"), shared.rfind(".")) + 1
      names = [name[cut:] for name in names]
    groups[source] = dict(zip(taps, names, strict=True))
  return groups


def _pair_names(
  content: Mapping[str, Any], pairs: Sequence[transfer_map.Pair]
) -> list[str]:
  """Return short names of pairs: "source/tap → tap"."""
  labels = []
  for side in ("source", "target"):
    names = {
      tap: f"{source}/{name}".removeprefix("/")
      for source, group in _tap_names(content, side).items()
      for tap, name in group.items()
    }
    short = style.shorten(list(names.values()), 16)
    labels.append(dict(zip(names, short, strict=True)))
  sources, targets = labels
  return [f"{sources[p['source']]} → {targets[p['target']]}" for p in pairs]


def _summary(
  content: Mapping[str, Any], ranked: Sequence[transfer_map.Pair], best: str
) -> str:
  """State the result in one line; `best` is the name of the first pair."""
  many = f"{len(ranked)} pairs" if len(ranked) > 1 else "1 pair"
  start = f"Method {content['method']}, epoch {content['epochs'][-1]}, {many}"
  learned_pairs, learned_channels = transfer_map.learned(content)
  if not learned_pairs:
    if not learned_channels:
      return f"{start}. Pairs and channels were given, not learned."
    return f"{start}. The pairs were given; the channels were learned."
  ignored = sum(transfer_map.is_ignored(content, pair) for pair in ranked)
  if ignored == len(ranked):
    return f"{start}. Nothing is copied any more: all weights went to 0."
  if len(ranked) == 1:
    return f"{start}. {best} has pair weight {ranked[0]['pair_weight']:.2f}."
  if len(content["epochs"]) > 1 and max(map(_moved, ranked)) < _MOVED:
    return (
      f"{start}. No pair weight changed by {_MOVED} since the first epoch: the"
      " order is that of the random initial values."
    )
  text = f"{start}. Strongest: {best}, {ranked[0]['share']:.0%} of the total"
  still = len(content["epochs"]) > 1 and _moved(ranked[0]) < _MOVED
  text += ", as at the start." if still else "."
  return text + (f" {ignored} ended near 0." if ignored else "")


def _scale(content: Mapping[str, Any]) -> float:
  """Return the pair weight that is drawn at full strength: at least 2."""
  return max(2.0, *(p["pair_weight"] for p in content["pairs"]))


def _draw_boxes(
  ax: axes.Axes, content: Mapping[str, Any], height: float
) -> _Boxes:
  """Draw a box per layer; with several sources, also their names and shares."""
  boxes = {}
  for side, left in (("source", 0.0), ("target", _LAYERS - _BOX)):
    groups = _tap_names(content, side)
    several = len(groups) > 1
    shapes = {tap["name"]: tap["shape"] for tap in content[f"{side}_taps"]}
    row = (height - 0.25 - _HEAD * len(groups) * several) / len(shapes)
    tall, x, top = min(0.5, 0.75 * row), left + _BOX / 2, 0.25
    title = f"{side} network{'s' if several else ''}"
    ax.text(x, 0.1, title, size=9, color=style.SOFT, **style.CENTRE)
    heads = style.shorten(list(groups), 18)
    text: Any = {"zorder": 21, "color": style.INK, **style.CENTRE}
    for (source, names), head in zip(groups.items(), heads, strict=True):
      if several:
        share = f"{content['source_shares'][source]:.0%} of the transfer"
        ax.text(x, top + 0.21, head, size=8.5, weight="bold", **text)
        ax.text(x, top + 0.4, share, size=8.5, **text)
        top += _HEAD
      labels = style.shorten(list(names.values()), 18)
      for tap, label in zip(names, labels, strict=True):
        y = top + row / 2
        top += row
        boxes[side, tap] = (y, tall)
        rounded = "round,pad=0,rounding_size=0.07"
        box = patches.FancyBboxPatch(
          (left, y - tall / 2), _BOX, tall, boxstyle=rounded, zorder=20
        )
        box.set(facecolor="#F3F4F6", edgecolor="#8A8F98", linewidth=1)
        ax.add_patch(box)
        h, w, c = shapes[tap]
        ax.text(x, y - 0.2 * tall, label, size=8.5, weight="bold", **text)
        ax.text(x, y + 0.22 * tall, f"{c} ch @ {h}×{w}", size=8, **text)
  return boxes


def _draw_bands(
  ax: axes.Axes,
  content: Mapping[str, Any],
  ranked: Sequence[transfer_map.Pair],
  boxes: _Boxes,
) -> None:
  """Draw a band per pair, as thick as its weight; label the strongest."""
  # One colour for all pairs if all have the same fixed weights.
  alike = content["fixed"] and content["channels_fixed"]
  colors = (_COLORS[0],) * len(ranked) if alike else _COLORS
  labelled = 0 if alike and len(ranked) > len(_COLORS) else len(_COLORS)
  t = np.linspace(0, 1, 61)
  x = _BOX + (_LAYERS - 2 * _BOX) * t
  for i, pair in enumerate(ranked):
    start, end = _ends(pair, ranked, boxes)
    # A smoothstep, which is horizontal where it meets the boxes.
    y = start + (end - start) * t * t * (3 - 2 * t)
    (line,) = ax.plot(x, y, color=style.GREY, linewidth=0.8)
    if transfer_map.is_ignored(content, pair):
      line.set_linestyle(":")
      continue
    color = colors[i] if i < len(colors) else "#777777"
    strength = pair["pair_weight"] / _scale(content)
    line.set(linewidth=0.6 + 9 * strength, alpha=0.25 + 0.6 * strength)
    line.set(color=color, solid_capstyle="butt", zorder=10 - min(i, 5))
    if i < labelled:
      at = int(_LABEL_AT[i] * len(t))
      box = {"boxstyle": "round,pad=0.2", "facecolor": "white"}
      text: Any = {"size": 8.5, "weight": "bold", "color": color, "zorder": 22}
      text |= {"bbox": {**box, "edgecolor": color}, **style.CENTRE}
      ax.text(x[at], y[at], f"{pair['pair_weight']:.2f}", **text)


def _ends(
  pair: transfer_map.Pair, pairs: Sequence[transfer_map.Pair], boxes: _Boxes
) -> list[float]:
  """Spread a box's lines over its edge, in an order that avoids crossings."""
  ends = []
  for here, there in (("source", "target"), ("target", "source")):
    far_end = lambda p, there=there: boxes[there, p[there]][0]
    far_ends = sorted(far_end(p) for p in pairs if p[here] == pair[here])
    share = (far_ends.index(far_end(pair)) + 0.5) / len(far_ends) - 0.5
    y, tall = boxes[here, pair[here]]
    ends.append(y + 0.8 * tall * share)
  return ends


def _draw_table(
  ax: axes.Axes, content: Mapping[str, Any], size: tuple[float, float]
) -> None:
  """Draw the pair weights as a table, source by target; `size` is in inches."""
  groups = _tap_names(content, "source")
  (targets,) = _tap_names(content, "target").values()
  rows = [tap for group in groups.values() for tap in group]
  table = np.full((len(rows), len(targets)), np.nan)
  for pair in content["pairs"]:
    place = rows.index(pair["source"]), list(targets).index(pair["target"])
    table[place] = pair["pair_weight"]
  scale = _scale(content)
  edges: Any = {"edgecolors": "white", "linewidth": 2}
  ax.pcolormesh(table, cmap="Blues", vmin=0, vmax=1.15 * scale, **edges)
  ax.invert_yaxis()
  digits = 2 if len(targets) <= 8 else 1
  # Font size in points, such that the digits fit into a column.
  points = min(8.0, 176 / len(targets) / (0.64 * (digits + 2)))
  for (row, column), value in np.ndenumerate(table):
    text = "–" if np.isnan(value) else f"{value:.{digits}f}"
    color = "white" if value > 0.6 * scale else style.INK
    font: Any = {"size": points, "color": color, **style.CENTRE}
    ax.text(column + 0.5, row + 0.5, text, **font)
  labels = style.shorten(list(targets.values()), 14)
  long = max(map(len, labels)) > 26 / len(labels)
  slant: Any = {"rotation": 30, "ha": "right"} if long else {}
  ax.set_xticks(np.arange(len(labels)) + 0.5, labels, size=8, **slant)
  labels = []
  for names in groups.values():
    labels += style.shorten(list(names.values()), 14)
  ax.set_yticks(np.arange(len(labels)) + 0.5, labels, size=8)
  ax.tick_params(length=0)
  ax.spines[:].set_visible(False)
  if len(groups) == 1:
    return
  # Write each source's name next to its rows; lines separate the sources.
  fewest = min(len(names) for names in groups.values() if names)
  room = size[1] / len(rows) * fewest
  heads = style.shorten(list(groups), max(5, int(room / 0.09)))
  start = 0
  for names, head in zip(groups.values(), heads, strict=True):
    if not names:  # This source has no pairs.
      continue
    font = {"size": 8.5, "weight": "bold", "color": style.SOFT, "rotation": 90}
    font |= {"transform": ax.get_yaxis_transform(), **style.CENTRE}
    ax.text(-1.17 / size[0], start + len(names) / 2, head, **font)
    if start:
      ax.axhline(start, color=style.SOFT, linewidth=1)
    start += len(names)


def _draw_history(
  ax: axes.Axes,
  content: Mapping[str, Any],
  ranked: Sequence[transfer_map.Pair],
  names: Sequence[str],
) -> None:
  """Draw pair weights over epochs; a legend names the strongest."""
  epochs = content["epochs"]
  last = epochs[-1]
  # The axis must have a length, even with a single epoch.
  begin = min(epochs[0], last - 1)
  margin = 0.02 * (last - begin)
  peak = 1.08 * max(1.6, *(max(p["history"]) for p in ranked))
  ax.set(xlim=(begin - margin, last + margin), ylim=(0, peak))
  marker = "o" if len(epochs) < 12 else ""
  strongest = []
  # The strongest pairs are drawn last, on top of the others.
  for i, pair in reversed(list(enumerate(ranked))):
    (line,) = ax.plot(epochs, pair["history"], marker=marker, clip_on=False)
    if i < len(_COLORS):
      line.set(color=_COLORS[i], linewidth=2.2, markersize=5)
      line.set_label(f"{_course(pair)}  {names[i]}")
      strongest.append(line)
    else:
      line.set(color=style.GREY, linewidth=1, markersize=3)
  style.name_lines(ax, strongest)
  style.plain_axes(ax)
  ax.set_xlabel("epoch", size=8.5, color=style.SOFT)
  steps: Any = {"steps": [1, 2, 5, 10], "min_n_ticks": 1}
  ax.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True, **steps))
  ax.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=peak > 3, **steps))


def _draw_channels(
  ax: axes.Axes, pair: transfer_map.Pair, name: str, color: str
) -> None:
  """Draw the top channels' weights as multiples of the uniform weight 1/C."""
  multiples = _multiples(pair)
  bars = ax.bar(range(len(multiples)), multiples, width=0.62, color=color)
  ax.bar_label(bars, fmt="%.1f×", size=8)
  ax.axhline(1, color=style.INK, linewidth=1, linestyle=(0, (3, 2)))
  style.plain_axes(ax)
  ax.set_xlim(-0.6, len(multiples) - 0.4)
  channels = [c["channel"] for c in pair["top_channels"]]
  ax.set_xticks(range(len(channels)), list(map(str, channels)))
  ax.set_yticks([])
  ax.spines["left"].set_visible(False)
  ax.set_xlabel("channel of the source layer", size=8, color=style.SOFT)
  place: Any = {"transform": ax.transAxes}
  ax.text(0, 1.25, name, size=8.5, weight="bold", color=color, **place)
  ax.text(0, 1.1, _channels_text(pair), size=8, color=style.SOFT, **place)


def _channels_text(pair: transfer_map.Pair) -> str:
  """Say how many of a pair's channels matter."""
  count, total = pair["channel_concentration"], pair["num_channels"]
  return f"about {count:.3g} of {total} channels matter"
