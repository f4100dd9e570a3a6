"""The style of the pictures that matplotlib draws."""

from __future__ import annotations

from collections.abc import Sequence
import io
from typing import Any

from matplotlib import axes, figure, lines
import numpy as np

# Okabe and Ito's palette for colour-blind readers, darkened for use as text.
COLORS = ("#0072B2", "#C44E00", "#00805C", "#A8478F", "#222222", "#8A6D00")
GREY, INK, SOFT = "#B4B4B4", "#222222", "#666666"
WIDTH = 10.0  # Inches. A README shows it at about 90 pixels per inch.
CENTRE: Any = {"ha": "center", "va": "center"}
_DPI = 180


class Page:
  """A figure whose positions are in inches from its top left corner."""

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
  half = width // 2
  cut = lambda name: f"{name[:half]}…{name[half + 1 - width :]}"
  short = [name if len(name) <= width else cut(name) for name in names]
  if len(set(short)) < len(set(names)):
    # The shortened names are ambiguous: end each with its number.
    cut = lambda name: f"{name[: width - 4]}…{names.index(name) + 1}"
    short = [name if len(name) <= width else cut(name) for name in names]
  return [name.replace("$", r"\$") for name in short]


def name_lines(ax: axes.Axes, named: Sequence[lines.Line2D]) -> None:
  """Add a legend to the right of `ax`, sorted by decreasing last value."""
  last = lambda line: line.get_ydata()[-1:].tolist() or [-np.inf]
  ax.legend(
    handles=sorted(named, key=last, reverse=True),
    labelcolor="linecolor",
    prop={"size": 8.5, "weight": "bold"},
    loc="center left",
    bbox_to_anchor=(1.01, 0.5),
    handlelength=3.2,  # Room for two dashes.
    labelspacing=0.8,
    frameon=False,
  )
