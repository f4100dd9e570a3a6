"""The style of the pictures that matplotlib draws."""

from __future__ import annotations

from collections.abc import Sequence
import io
from typing import Any, NamedTuple

from matplotlib import axes, figure
import numpy as np

# Okabe and Ito's colours for the colour-blind, darkened enough to carry text.
COLORS = ("#0072B2", "#C44E00", "#00805C", "#A8478F", "#222222", "#8A6D00")
GREY, INK, SOFT = "#B4B4B4", "#222222", "#666666"
WIDTH = 10.0  # Inches. A README shows it at about 90 pixels per inch.
CENTRE: Any = {"ha": "center", "va": "center"}
_DPI = 180
_LINE = 0.2  # Height of a label's line of text, in inches.
_ASIDE = 0.3  # From the axes to the labels, in inches.


class Page:
  """A figure whose places are given in inches from its top left corner."""

  def __init__(self, height: float):
    self.height = height
    self.figure = figure.Figure(figsize=(WIDTH, height))

  def panel(
    self, left: float, top: float, wide: float, tall: float
  ) -> axes.Axes:
    """Add axes with the given corner and size."""
    bottom = 1 - (top + tall) / self.height
    place = left / WIDTH, bottom, wide / WIDTH, tall / self.height
    return self.figure.add_axes(place)

  def write(self, left: float, top: float, line: str, size: float) -> None:
    """Write a line of text; its size decides whether it is a heading."""
    color = INK if size > 9 else SOFT
    weight = "bold" if size > 10 else "normal"
    style: Any = {"size": size, "weight": weight, "color": color, "va": "top"}
    self.figure.text(left / WIDTH, 1 - top / self.height, line, **style)


def to_png(picture: figure.Figure) -> bytes:
  """Render a figure as the content of a PNG file."""
  file = io.BytesIO()
  picture.savefig(file, format="png", dpi=_DPI, facecolor="white")
  return file.getvalue()


def plain_axes(ax: axes.Axes) -> None:
  """Leave only the left and the bottom spine, both in grey."""
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["left", "bottom"]].set_color(GREY)
  ax.tick_params(labelsize=8, color=GREY, labelcolor=SOFT)


def shorten(names: Sequence[str], width: int) -> list[str]:
  """Cut names to at most `width` characters such that they still differ.

  Dollar signs are escaped: matplotlib would read them as the start of a
  formula.
  """
  # Cut in the middle, at the end or at the start.
  for head in (width // 2, width - 1, 0):
    tail = width - 1 - head
    short = [
      n if len(n) <= width else f"{n[:head]}…{n[len(n) - tail :]}"
      for n in names
    ]
    if len(set(short)) == len(set(names)):
      break
  else:
    short = [f"{n[: width - 4]}…{i}" for i, n in enumerate(names, start=1)]
  return [name.replace("$", r"\$") for name in short]


class Label(NamedTuple):
  """What is written at the right of a line that ends at `point`."""

  text: str
  color: str
  point: tuple[float, float] | None  # In data coordinates; None: no line.
  dotted: bool = False  # Whether the join is dotted.


def label_lines(ax: axes.Axes, labels: Sequence[Label]) -> None:
  """Write labels at the right of `ax`, each joined to the end of its line.

  Labels that would overlap are moved apart. Those without a line stand at the
  bottom. The limits of the axes must be set.
  """
  low, high = ax.get_ylim()
  height_of = lambda label: label.point[1] if label.point else low
  labels = sorted(labels, key=height_of, reverse=True)
  box = ax.get_window_extent()
  wide, tall = box.width / ax.figure.dpi, box.height / ax.figure.dpi
  gap = _LINE / tall * (high - low)
  spots = spread(list(map(height_of, labels)), gap=gap, low=low, high=high)
  for label, spot in zip(labels, spots, strict=True):
    join: Any = {"arrowstyle": "-", "color": label.color, "lw": 0.8}
    join |= {"relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 4}
    join |= {"linestyle": ":" if label.dotted else "-"}
    ax.annotate(
      label.text,
      xy=label.point or (0, 0),
      xytext=(1 + _ASIDE / wide, (spot - low) / (high - low)),
      textcoords="axes fraction",
      arrowprops=join if label.point else None,
      annotation_clip=False,
      size=8.5,
      weight="bold",
      va="center",
      color=label.color,
    )


def spread(
  heights: Sequence[float], *, gap: float, low: float, high: float
) -> np.ndarray:
  """Move falling heights at least `gap` apart, by as little as possible.

  Least squares: with i * gap added, the result is the closest sequence that
  does not rise, which pooling neighbours finds.

  Args:
    heights: the largest first.
    gap: the least distance between neighbours.
    low: smallest height of the result, where there is room for all.
    high: largest height of the result.
  """
  pools: list[tuple[float, int]] = []
  for i, height in enumerate(heights):
    pools.append((height + i * gap, 1))
    while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
      (a, n), (b, m) = pools.pop(), pools.pop()
      pools.append(((a * n + b * m) / (n + m), n + m))
  spots = np.repeat([a for a, _ in pools], [n for _, n in pools])
  spots = np.clip(spots, low + (len(heights) - 1) * gap, high)
  return spots - gap * np.arange(len(heights))
