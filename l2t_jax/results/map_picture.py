"""Show what a run learned: which layers and channels the target copies.

`transfer_map.json` holds the content, `transfer_map.png` the picture, which is
drawn from the content alone. With several sources, a source tap is named
"SOURCE/tap".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import itertools
import json
import os
import pathlib
import re
from typing import Any

from matplotlib import axes, colormaps, figure, patches, ticker
import numpy as np

from l2t_jax import files
from l2t_jax.results import style, transfer_map

_COLORS = style.COLORS[:4]  # Of the strongest pairs; the others are grey.
_BOX = 1.5  # Width of a layer's box, in inches.
_HEAD = 0.5  # Height of a source's name above its boxes, in inches.
# Smaller changes of a pair weight are not reported as a result: random
# initialisation alone spreads pair weights this much.
_MOVED = 0.05
_EVEN = 0.95  # Above this share of C effective channels, none stands out.
_CHANNELS_TEXT = (
  "Bars: a channel's weight as a multiple of the even share 1/C, which is the "
  "dashed line."
)


def plot(content: Mapping[str, Any], path: pathlib.Path | str) -> None:
  """Draw the content of a `transfer_map.json` as a PNG file at `path`."""
  files.write(pathlib.Path(path), style.to_png(draw(content)))


def write(workdir: pathlib.Path | str, content: Mapping[str, Any]) -> None:
  """Write `transfer_map.json` and `transfer_map.png` atomically."""
  workdir = pathlib.Path(workdir)
  text = json.dumps(content, indent=2, allow_nan=False) + "\n"
  # A list of numbers, such as 512 channel weights, takes one line.
  text = re.sub(r'\[\n[^][{}"]*\]', lambda m: " ".join(m[0].split()), text)
  files.write(workdir / transfer_map.FILE, text)
  plot(content, workdir / "transfer_map.png")


def draw(content: Mapping[str, Any]) -> figure.Figure:
  """Draw the picture: header, layers and numbers, history, channels."""
  ranked = _rank(content["pairs"])
  learned_pairs, learned_channels = transfer_map.learned(content)
  shown = [p for p in ranked[:3] if p["pair_weight"] >= transfer_map.IGNORED]
  bars = bool(shown) and not content["channels_fixed"]
  rows, columns = len(content["source_taps"]), len(content["target_taps"])
  layers = max(2.2, 0.74 * max(rows, columns))
  shares = content.get("source_shares", {})
  if shares:
    layers = max(0.25 + 0.6 * rows + _HEAD * len(shares), 0.74 * columns)
    order = list(itertools.chain(*_by_source(content).values()))
    taps = content["source_taps"]
    taps = sorted(taps, key=lambda tap: order.index(tap["name"]))
    content = {**content, "source_taps": taps}
  # Where the title of each row of panels stands, in inches from the top.
  first = 1.4
  second = first + layers + 0.65
  third = second + (3.1 if learned_pairs else 0.75)
  page = style.Page(third + (2.75 if bars else 0.8))

  verb = "learned" if learned_pairs or learned_channels else "was told"
  page.write(0.35, 0.25, f"What the target {verb} to copy, and from where", 17)
  page.write(0.35, 0.66, _summary(content, ranked), 10)
  page.write(0.35, 0.94, _scale_text(content), 8.5)

  page.write(0.35, first, "From source layers to target layers", 11)
  size = (5.5, layers)
  _draw_layers(page.panel(0.35, first + 0.3, *size), content, ranked, size)
  page.write(6.2, first, "Every pair weight", 11)
  page.write(6.2, first + 0.25, "rows: source, columns: target", 8.5)
  aside = 0.25 if shares else 0.0  # For the names of the sources.
  cells = min(2.45 - aside, 0.62 * columns), min(layers - 0.7, 0.62 * rows)
  ax = page.panel(7.25 + aside, first + 0.6, *cells)
  _draw_table(ax, content, cells)

  page.write(0.35, second, "Pair weight, epoch by epoch", 11)
  if not learned_pairs:
    given = "Fixed at 1" if content["fixed"] else "Given by another run's map"
    text = f"{given} for every pair, not learned."
    page.write(0.35, second + 0.3, text, 9.5)
  else:
    grey = "; grey: the weaker pairs" if len(ranked) > len(_COLORS) else ""
    page.write(0.35, second + 0.27, f"dotted: about the start{grey}", 8.5)
    ax = page.panel(0.75, second + 0.6, 5.9, 1.9)
    _draw_history(ax, content, ranked)

  page.write(0.35, third, "Channels that count most", 11)
  if content["channels_fixed"]:
    text = "Every channel counts the same: fixed, not learned."
    page.write(0.35, third + 0.3, text, 9.5)
  elif not bars:
    page.write(0.35, third + 0.3, "None: every pair is ignored.", 9.5)
  else:
    given = "" if learned_channels else "Given, not learned. "
    page.write(0.35, third + 0.27, given + _CHANNELS_TEXT, 8.5)
    peak = max(_times(pair)[0] for pair in shown)
    for i, pair in enumerate(shown):
      ax = page.panel(0.45 + 3.18 * i, third + 1.05, 2.75, 1.15)
      _draw_channels(ax, content, pair, _COLORS[i])
      ax.set_ylim(0, 1.25 * max(1.2, peak))
  return page.figure


def _scale_text(content: Mapping[str, Any]) -> str:
  """Explain pair weights, and where learned ones start and end."""
  text = "Pair weight 0 = ignored"
  if transfer_map.learned(content)[0]:
    text += f", {content['start']:.3g} = about the start"
    if content["maximum"]:
      text += f", {content['maximum']:.3g} = maximum"
  return (
    f"{text}. The thicker a line, the harder the target layer is pulled towards"
    " that source layer."
  )


def _source_of(content: Mapping[str, Any], tap: str) -> str:
  """Return the source that a tap belongs to; "" if there is only one."""
  # The names of sources and of taps may have slashes, too.
  for source in content.get("source_shares", ()):
    if tap.startswith(f"{source}/"):
      return source
  return ""


def _by_source(content: Mapping[str, Any]) -> dict[str, list[str]]:
  """Group the names of the source taps by their source, in its order."""
  sources = content.get("source_shares", ())
  groups: dict[str, list[str]] = {source: [] for source in sources}
  for tap in content["source_taps"]:
    source = _source_of(content, tap["name"])
    groups.setdefault(source, []).append(tap["name"])
  return groups


def _rank(pairs: Sequence[transfer_map.Pair]) -> list[transfer_map.Pair]:
  """Sort by pair weight; among equals, the choosiest about channels first."""
  choosy = lambda pair: pair["channel_concentration"] / pair["num_channels"]
  return sorted(pairs, key=lambda pair: (-pair["pair_weight"], choosy(pair)))


def _times(pair: transfer_map.Pair) -> list[float]:
  """Return the top channels' weights as multiples of 1/C."""
  return [c["weight"] / c["uniform"] for c in pair["top_channels"]]


def _cut(names: Sequence[str], width: int) -> list[str]:
  """Shorten names; the modules that all taps lie in go first."""
  if max(map(len, names)) > width:
    shared = os.path.commonprefix(names)  # noqa: RUF071
    start = max(shared.rfind("/"), shared.rfind(".")) + 1
    names = [name[start:] for name in names]
  return style.shorten(names, width)


def _tap_labels(
  content: Mapping[str, Any], side: str, width: int
) -> dict[str, str]:
  """Map each tap to a label without its source, distinct within the source."""
  groups = {"": [tap["name"] for tap in content[side]]}
  if side == "source_taps":
    groups = _by_source(content)
  labels: dict[str, str] = {}
  for source, taps in groups.items():
    own = [tap[len(source) + 1 :] if source else tap for tap in taps]
    labels |= zip(taps, _cut(own, width), strict=True)
  return labels


def _source_labels(content: Mapping[str, Any], width: int) -> dict[str, str]:
  """Map each of several sources to a label; empty if there is only one."""
  names = list(content.get("source_shares", ()))
  return dict(zip(names, _cut(names, width), strict=True)) if names else {}


def _pair_label(content: Mapping[str, Any], pair: transfer_map.Pair) -> str:
  targets = _tap_labels(content, "target_taps", 14)
  target = targets[pair["target"]]
  if "source_shares" not in content:
    source = _tap_labels(content, "source_taps", 14)[pair["source"]]
    return f"{source} → {target}"
  # Taps get half of the room that the targets leave, or what the sources spare.
  room = 30 - max(map(len, targets.values()))
  spare = room - max(map(len, content["source_shares"]))
  taps = _tap_labels(content, "source_taps", max(room // 2, spare))
  sources = _source_labels(content, room - max(map(len, taps.values())))
  source = sources[_source_of(content, pair["source"])]
  return f"{source}/{taps[pair['source']]} → {target}"


def _summary(
  content: Mapping[str, Any], ranked: Sequence[transfer_map.Pair]
) -> str:
  """Say the result in one line."""
  many = f"{len(ranked)} pairs" if len(ranked) > 1 else "1 pair"
  start = f"Method {content['method']}, epoch {content['epochs'][-1]}, {many}"
  learned_pairs, learned_channels = transfer_map.learned(content)
  if not learned_pairs:
    if not learned_channels:
      return f"{start}. Pairs and channels were given, not learned."
    return f"{start}. The pairs were given; the channels were learned."
  ignored = sum(pair["pair_weight"] < transfer_map.IGNORED for pair in ranked)
  if ignored == len(ranked):
    return f"{start}. Nothing is copied any more: all weights went to 0."
  best, weight = _pair_label(content, ranked[0]), ranked[0]["pair_weight"]
  if len(ranked) == 1:
    return f"{start}. {best} has pair weight {weight:.2f}."
  moved = max(abs(pair["pair_weight"] - pair["history"][0]) for pair in ranked)
  if len(content["epochs"]) > 1 and moved < _MOVED:
    return (
      f"{start}. No pair weight moved by {_MOVED} since the first epoch: the"
      " order is still that of chance."
    )
  text = f"{start}. Strongest: {best}, {ranked[0]['share']:.0%} of the total."
  return text + (f" {ignored} ended near 0." if ignored else "")


def _scale(content: Mapping[str, Any]) -> float:
  """The pair weight drawn at full strength: the largest, or 2."""
  return max(2.0, *(p["pair_weight"] for p in content["pairs"]))


def _draw_layers(
  ax: axes.Axes,
  content: Mapping[str, Any],
  ranked: Sequence[transfer_map.Pair],
  size: tuple[float, float],
) -> None:
  """Draw layers as boxes and pairs as bands, in inches on `size`."""
  width, height = size
  ax.set(xlim=(-0.02, width + 0.02), ylim=(height, 0))
  ax.axis("off")
  boxes = _draw_boxes(ax, content, size)
  _draw_bands(ax, content, ranked, boxes, width)


def _draw_boxes(
  ax: axes.Axes, content: Mapping[str, Any], size: tuple[float, float]
) -> dict[tuple[str, str], tuple[float, float]]:
  """Draw a box per layer; return (side, tap) -> (its middle, its height)."""
  width, height = size
  boxes = {}
  for side, left in (("source_taps", 0.0), ("target_taps", width - _BOX)):
    labels = _tap_labels(content, side, 18)
    heads = _source_labels(content, 18) if side == "source_taps" else {}
    row = (height - 0.25 - _HEAD * len(heads)) / len(content[side])
    tall, x = min(0.5, 0.75 * row), left + _BOX / 2
    title = f"{side[:6]} network{'s' if heads else ''}"
    ax.text(x, 0.1, title, size=9, color=style.SOFT, **style.CENTRE)
    top = 0.25
    for tap in content[side]:
      source = _source_of(content, tap["name"])
      head = heads.pop(source, None)
      if head:
        share = content["source_shares"][source]
        told = {"size": 8.5, "color": style.INK, **style.CENTRE}
        ax.text(x, top + 0.21, head, weight="bold", **told)
        ax.text(x, top + 0.4, f"{share:.0%} of the transfer", **told)
        top += _HEAD
      y = top + row / 2
      top += row
      boxes[side, tap["name"]] = (y, tall)
      rounded = "round,pad=0,rounding_size=0.07"
      box = patches.FancyBboxPatch(
        (left, y - tall / 2), _BOX, tall, boxstyle=rounded, zorder=20
      )
      box.set(facecolor="#F3F4F6", edgecolor="#8A8F98", linewidth=1)
      ax.add_patch(box)
      h, w, c = tap["shape"]
      text = {"zorder": 21, "color": style.INK, **style.CENTRE}
      name = labels[tap["name"]]
      ax.text(x, y - 0.2 * tall, name, size=8.5, weight="bold", **text)
      ax.text(x, y + 0.22 * tall, f"{c} ch @ {h}×{w}", size=8, **text)
  return boxes


def _draw_bands(
  ax: axes.Axes,
  content: Mapping[str, Any],
  ranked: Sequence[transfer_map.Pair],
  boxes: Mapping[tuple[str, str], tuple[float, float]],
  width: float,
) -> None:
  """Draw a band per pair, as thick as its weight; label the strongest."""
  # Nothing sets one pair apart where all count the same.
  alike = content["fixed"] and content["channels_fixed"]
  colors = (_COLORS[0],) * len(ranked) if alike else _COLORS
  strengths = [pair["pair_weight"] / _scale(content) for pair in ranked]
  t = np.linspace(0, 1, 61)
  curves = []
  for i, (pair, strength) in enumerate(zip(ranked, strengths, strict=True)):
    start, end = _ends(pair, ranked, boxes)
    curve_x = _BOX + (width - 2 * _BOX) * t
    curve_y = start + (end - start) * t * t * (3 - 2 * t)
    curves.append((curve_x, curve_y))
    line = ax.plot(curve_x, curve_y, color=style.GREY, linewidth=0.8)[0]
    if pair["pair_weight"] < transfer_map.IGNORED:
      line.set_linestyle(":")
      continue
    line.set(linewidth=0.6 + 9 * strength, alpha=0.25 + 0.6 * strength)
    line.set(color=colors[i] if i < len(colors) else "#777777")
    line.set(solid_capstyle="butt", zorder=10 - min(i, 5))
  placed: list[tuple[float, float]] = []
  for i, pair in enumerate(ranked[: len(_COLORS)]):
    if pair["pair_weight"] < transfer_map.IGNORED or (
      alike and len(ranked) > len(_COLORS)
    ):
      continue
    placed.append(_label_place(i, curves, placed))
    box_style = {"boxstyle": "round,pad=0.2", "facecolor": "white"}
    text = {"size": 8.5, "weight": "bold", "zorder": 22, **style.CENTRE}
    text |= {"color": colors[i], "bbox": {**box_style, "edgecolor": colors[i]}}
    ax.text(*placed[-1], f"{pair['pair_weight']:.2f}", **text)


def _ends(
  pair: transfer_map.Pair,
  pairs: Sequence[transfer_map.Pair],
  boxes: Mapping[tuple[str, str], tuple[float, float]],
) -> tuple[float, float]:
  """Spread a box's lines over its edge, in an order that avoids crossings."""
  ends = []
  for here, there in (("source", "target"), ("target", "source")):
    far = [
      boxes[f"{there}_taps", p[there]][0]
      for p in pairs
      if p[here] == pair[here]
    ]
    index = sorted(far).index(boxes[f"{there}_taps", pair[there]][0])
    y, tall = boxes[f"{here}_taps", pair[here]]
    ends.append(y + 0.8 * tall * ((index + 0.5) / len(far) - 0.5))
  return ends[0], ends[1]


def _label_place(
  index: int,
  curves: Sequence[tuple[np.ndarray, np.ndarray]],
  placed: Sequence[tuple[float, float]],
) -> tuple[float, float]:
  """Choose the point of a line that is clear of labels, then of lines."""
  xs, ys = curves[index]
  named = [y for j, (_, y) in enumerate(curves[: len(_COLORS)]) if j != index]

  def room(i: int) -> float:
    # A label is about 0.4 by 0.2 inches.
    labels = [
      max(abs(xs[i] - x) / 0.55, abs(ys[i] - y) / 0.34) for x, y in placed
    ]
    lines = [abs(ys[i] - y[i]) / 0.2 for y in named]
    from_middle = abs(i - len(xs) // 2)
    return 10 * min(1, *labels, 1) + min(1, *lines, 1) - 0.01 * from_middle

  best = max(range(8, len(xs) - 8), key=room)
  return float(xs[best]), float(ys[best])


def _draw_table(
  ax: axes.Axes, content: Mapping[str, Any], size: tuple[float, float]
) -> None:
  """Draw the pair weights, source by target, in `size` inches, as a table."""
  sources = _tap_labels(content, "source_taps", 14)
  targets = _tap_labels(content, "target_taps", 14)
  table = np.full((len(sources), len(targets)), np.nan)
  for pair in content["pairs"]:
    row = list(sources).index(pair["source"])
    table[row, list(targets).index(pair["target"])] = pair["pair_weight"]
  scale = _scale(content)
  cmap = colormaps["Blues"].with_extremes(bad="white")
  ax.imshow(table, cmap=cmap, vmin=0, vmax=1.15 * scale, aspect="auto")
  digits = 2 if len(targets) <= 8 else 1
  # In points: a column's width over that of the digits.
  points = min(8.0, 176 / len(targets) / (0.64 * (digits + 2)))
  for (row, column), value in np.ndenumerate(table):
    text = "–" if np.isnan(value) else f"{value:.{digits}f}"
    color = "white" if value > 0.6 * scale else style.INK
    ax.text(column, row, text, size=points, color=color, **style.CENTRE)
  long = max(map(len, targets.values())) > 26 / len(targets)
  slant: Any = {"rotation": 30, "ha": "right"} if long else {}
  ax.set_xticks(range(len(targets)), list(targets.values()), size=8, **slant)
  ax.set_yticks(range(len(sources)), list(sources.values()), size=8)
  ax.set_xticks(np.arange(len(targets) + 1) - 0.5, minor=True)
  ax.set_yticks(np.arange(len(sources) + 1) - 0.5, minor=True)
  ax.grid(which="minor", color="white", linewidth=2)
  ax.tick_params(which="both", length=0)
  ax.spines[:].set_visible(False)
  # Write each source's name beside its rows, and part them by a line.
  groups = _by_source(content)
  row_tall = size[1] / len(sources)
  room = row_tall * min(map(len, groups.values()), default=0)
  names = _source_labels(content, max(5, int(room / 0.09)))
  start = 0
  for source, name in names.items():
    middle = start + (len(groups[source]) - 1) / 2
    x, place = -1.17 / size[0], ax.get_yaxis_transform()
    told: Any = {"size": 8.5, "weight": "bold", "rotation": 90}
    told |= {"transform": place, "color": style.SOFT, **style.CENTRE}
    ax.text(x, middle, name, **told)
    if start:
      ax.axhline(start - 0.5, color=style.SOFT, linewidth=1)
    start += len(groups[source])


def _draw_history(
  ax: axes.Axes, content: Mapping[str, Any], ranked: Sequence[transfer_map.Pair]
) -> None:
  """Draw pair weights over epochs; the strongest are named at their ends."""
  epochs = content["epochs"]
  last = epochs[-1]
  begin = min(epochs[0], last - 1)
  margin = 0.02 * (last - begin)
  peak = 1.08 * max(1.6, *(max(p["history"]) for p in ranked))
  ax.set(xlim=(begin - margin, last + margin), ylim=(0, peak))
  dotted: Any = {"linewidth": 0.8, "linestyle": (0, (2, 3)), "zorder": 1}
  ax.axhline(content["start"], color=style.SOFT, **dotted)
  marker = "o" if len(epochs) < 12 else ""
  for i, pair in reversed(list(enumerate(ranked))):
    line = ax.plot(epochs, pair["history"], marker=marker, clip_on=False)[0]
    if i < len(_COLORS):
      line.set(color=_COLORS[i], linewidth=2.2, markersize=5)
    else:
      line.set(color=style.GREY, linewidth=1, markersize=3)
  labels = []
  for pair, color in zip(ranked, _COLORS, strict=False):
    end = pair["pair_weight"]
    text = f"{end:.2f}  {_pair_label(content, pair)}"
    labels.append(style.Label(text, color, (last, end)))
  style.label_lines(ax, labels)
  style.plain_axes(ax)
  ax.set_xlabel("epoch", size=8.5, color=style.SOFT)
  steps: Any = {"steps": [1, 2, 5, 10], "min_n_ticks": 1}
  ax.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True, **steps))
  ax.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=peak > 3, **steps))


def _draw_channels(
  ax: axes.Axes, content: Mapping[str, Any], pair: transfer_map.Pair, color: str
) -> None:
  """Draw the top channels' weights as multiples of the uniform weight 1/C."""
  times = _times(pair)
  numbers = [str(c["channel"]) for c in pair["top_channels"]]
  ax.bar(range(len(times)), times, width=0.62, color=color)
  for i, value in enumerate(times):
    ax.text(i, value, f"{value:.1f}×", size=8, ha="center", va="bottom")
  ax.axhline(1, color=style.INK, linewidth=1, linestyle=(0, (3, 2)))
  style.plain_axes(ax)
  ax.set_xlim(-0.6, len(times) - 0.4)
  ax.set_xticks(range(len(times)), numbers)
  ax.set_yticks([])
  ax.spines["left"].set_visible(False)
  ax.set_xlabel("channel of the source layer", size=8, color=style.SOFT)
  place: Any = {"transform": ax.transAxes}
  name = _pair_label(content, pair)
  ax.text(0, 1.25, name, size=8.5, weight="bold", color=color, **place)
  ax.text(0, 1.1, _channels_text(pair), size=8, color=style.SOFT, **place)


def _channels_text(pair: transfer_map.Pair) -> str:
  count, total = pair["channel_concentration"], pair["num_channels"]
  if count > _EVEN * total:
    return f"all {total} channels count about the same"
  return f"about {count:.0f} of {total} channels matter"
