"""Set finished runs side by side: `table.csv`, `table.md` and `table.png`.

Pure rendering: it reads no run and trains none, and knows nothing of JAX. A
`Cell` holds the summaries of one method in one column; a column is a data set
("stl10") or a value of a field ("per_class=50").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import io
import math
import os
import pathlib
from typing import Any, NamedTuple
import uuid

from matplotlib import axes, figure, lines, ticker
import numpy as np

from l2t_jax.results import tables

# Okabe and Ito's colours for the colour-blind, darkened enough to carry text;
# a marker for each, as neighbours of twelve lines need more than a colour.
_COLORS = ("#0072B2", "#C44E00", "#00805C", "#A8478F", "#222222", "#8A6D00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY, _INK, _SOFT = "#B4B4B4", "#222222", "#666666"
_WIDTH = 10.0  # Inches. A README shows it at about 90 pixels per inch.
_DPI = 180
_ROW = 0.36  # Height of a method's row, in inches.
# Width of the numbers at the right of a panel, in inches; where not in %.
_VALUE, _LONG_VALUE = 0.95, 1.4
_PAPER_MARKER: Any = {
  "marker": "D",
  "markersize": 6,
  "markerfacecolor": "white",
  "markeredgecolor": _COLORS[1],
  "markeredgewidth": 1.4,
}


def write(workdir: pathlib.Path | str, cells: Sequence[tables.Cell]) -> None:
  """Write `table.csv`, `table.md` and `table.png` into `workdir`.

  Each file is replaced as a whole, so that several processes may write the same
  folder.

  Args:
    workdir: the folder; it is made where it does not exist.
    cells: at most one for a method and a column; what is left out counts as not
      run. Methods and columns stand in the order in which they first come.

  Raises:
    ValueError: no cell, or two for the same method and column.
  """
  grid = tables.make_grid(cells)
  picture = io.BytesIO()
  draw(cells).savefig(picture, format="png", dpi=_DPI, facecolor="white")
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  for name, content in (
    ("table.csv", tables.to_csv(grid).encode()),
    ("table.md", tables.to_markdown(grid).encode()),
    ("table.png", picture.getvalue()),
  ):
    temporary = workdir / f".{name}.{os.getpid()}.{uuid.uuid4().hex}"
    try:
      temporary.write_bytes(content)
      temporary.replace(workdir / name)
    finally:
      temporary.unlink(missing_ok=True)


def draw(cells: Sequence[tables.Cell]) -> figure.Figure:
  """Lay out the picture: a panel for each data set, or lines over a sweep.

  Args:
    cells: as in `write`.

  Returns:
    The figure, 10 inches wide.

  Raises:
    ValueError: as in `write`.
  """
  grid = tables.make_grid(cells)
  sweep = _sweep(grid.columns)
  return _draw_sweep(grid, *sweep) if sweep else _draw_panels(grid)


def _sweep(columns: Sequence[str]) -> tuple[str, dict[float, str]] | None:
  """Read columns as the values of one field.

  Returns:
    (name of the field, value -> column by rising value), or None where they are
    something else.
  """
  names, values = set(), {}
  for column in columns:
    name, _, value = column.rpartition("=")
    names.add(name)
    try:
      values[float(value)] = column
    except ValueError:
      return None
  same = len(names) == 1 and "" not in names and all(map(math.isfinite, values))
  if not same or not len(columns) == len(values) > 1:
    return None
  return names.pop(), dict(sorted(values.items()))


def _short(name: str, width: int) -> str:
  """Cut a name in its middle; a dollar sign would start a formula."""
  if len(name) > width:
    head = width // 2
    name = f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"
  return name.replace("$", r"\$")


class _Page:
  """A figure measured in inches from its top left corner."""

  def __init__(self, height: float):
    self.height = height
    self.figure = figure.Figure(figsize=(_WIDTH, height))

  def panel(
    self, left: float, top: float, wide: float, tall: float
  ) -> axes.Axes:
    bottom = 1 - (top + tall) / self.height
    place = left / _WIDTH, bottom, wide / _WIDTH, tall / self.height
    return self.figure.add_axes(place)

  def write(self, left: float, top: float, line: str, size: float) -> None:
    color = _INK if size > 9 else _SOFT
    weight = "bold" if size > 10 else "normal"
    style: Any = {"size": size, "weight": weight, "color": color, "va": "top"}
    self.figure.text(left / _WIDTH, 1 - top / self.height, line, **style)

  def diamond(self, left: float, top: float) -> None:
    """Draw the mark of the paper's numbers, for the legend."""
    x, y = left / _WIDTH, 1 - top / self.height
    self.figure.add_artist(
      lines.Line2D([x], [y], linestyle="", **_PAPER_MARKER)
    )


def _draw_panels(grid: tables.Grid) -> figure.Figure:
  """Draw a panel a column: methods as rows, accuracy from left to right."""
  in_percent = all(grid.in_percent.values())
  at_most, beside = (3, _VALUE) if in_percent else (2, _LONG_VALUE)
  num_rows = math.ceil(len(grid.columns) / at_most)
  num_across = math.ceil(len(grid.columns) / num_rows)
  names = [_short(method, 24) for method in grid.methods]
  left = 0.5 + 0.083 * max(map(len, names))
  across = (_WIDTH - left - 0.1) / num_across
  tall = _ROW * len(grid.methods) + 0.1
  first, each = 1.3, tall + 0.95
  page = _Page(first + num_rows * each - 0.1)
  _write_header(
    page,
    grid,
    "Large dot: mean over the seeds; whisker: ± one standard deviation; "
    "small dots: the seeds.",
  )
  for i, column in enumerate(grid.columns):
    x = left + across * (i % num_across)
    top = first + each * (i // num_across)
    page.write(x, top, _short(column, int(across / 0.11)), 11)
    ax = page.panel(x, top + 0.3, across - beside - 0.2, tall)
    _draw_panel(ax, grid, column)
    ax.set_yticks(range(len(names)), names if i % num_across == 0 else [])
    ax.tick_params(axis="y", labelsize=9, labelcolor=_INK)
    ax.set_xlabel(_axis_title(grid, column), size=8, color=_SOFT)
  return page.figure


def _axis_title(grid: tables.Grid, column: str) -> str:
  return "test accuracy" + (", %" if grid.in_percent[column] else "")


def _write_header(page: _Page, grid: tables.Grid, key: str) -> None:
  page.write(0.35, 0.25, "Test accuracy at the best validation epoch", 17)
  counts = [len(stats.test) for stats in grid.stats.values()]
  if max(counts) < 2:
    key = "One seed each." if any(counts) else "No run has finished."
  page.write(0.35, 0.68, key, 8.5)
  if tables.has_paper(grid):
    page.diamond(0.43, 0.98)
    page.write(0.57, 0.92, "reported by the paper", 8.5)


def _draw_panel(ax: axes.Axes, grid: tables.Grid, column: str) -> None:
  """Draw the results of one column, and write them at its right."""
  known: list[float] = []
  beside: Any = {"transform": ax.get_yaxis_transform()}
  for y, method in enumerate(grid.methods):
    stats = grid.stats[method, column]
    cell = grid.cells.get((method, column))
    paper = tables.paper(grid, method, column)
    if paper is not None:
      ax.plot(paper, y, zorder=4, **_PAPER_MARKER)
      known.append(paper)
    value = tables.mean_and_std(
      stats.test_mean, stats.test_std, grid.in_percent[column]
    )
    part = cell and 0 < len(cell.summaries) < cell.num_seeds
    beside["va"] = "bottom" if part else "center"
    ax.text(1.04, y, value, size=8.5, color=_INK, **beside)
    if part:
      beside["va"] = "top"
      seeds = f"{tables.seeds(cell)} seeds"
      ax.text(1.04, y + 0.03, seeds, size=7, color=_SOFT, **beside)
    if stats.test_mean is None:
      continue
    mean, std = stats.test_mean, stats.test_std or 0.0
    known += [mean - std, mean + std, *stats.test]
    ax.plot([mean - std, mean + std], [y, y], color=_COLORS[0], linewidth=2)
    ax.plot(mean, y, "o", color=_COLORS[0], markersize=7, zorder=3)
    if len(stats.test) > 1:  # Below the mean, which would hide them.
      dots: Any = {"color": _COLORS[0], "markersize": 3, "alpha": 0.6}
      ax.plot(stats.test, [y + 0.28] * len(stats.test), "o", **dots)
  ax.set_ylim(len(grid.methods) - 0.45, -0.55)
  _plain(ax)
  ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
  ax.set_axisbelow(True)
  ax.tick_params(axis="y", length=0)
  if not known:
    ax.set(xlim=(0, 1), xticks=[])
    return
  ax.set_xlim(*_limits(known, grid.in_percent[column]))
  ax.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))


class _End(NamedTuple):
  """Where a line of a sweep ends, and what is written there."""

  label: str
  color: str
  point: tuple[float, float] | None  # Value and mean; None: no result.
  early: bool  # Whether later values have no result.


def _draw_sweep(
  grid: tables.Grid, name: str, columns: Mapping[float, str]
) -> figure.Figure:
  """Draw accuracy against the value of a field, a line for each method."""
  missing = any(
    place not in grid.cells or len(stats.test) < grid.cells[place].num_seeds
    for place, stats in grid.stats.items()
  )
  tall = max(3.4, 0.35 * len(grid.methods))
  page = _Page(tall + 1.85 + 0.25 * missing)
  key = "Mean over the seeds; band: ± one standard deviation."
  _write_header(page, grid, key)
  if missing:
    note = "Some seeds are missing: table.md says which."
    page.write(0.35, page.height - 0.35, note, 8.5)
  known: list[float] = []
  for stats in grid.stats.values():
    if stats.test_mean is not None:
      std = stats.test_std or 0.0
      known += [stats.test_mean - std, stats.test_mean + std]
  column = grid.columns[0]  # They are all of one kind.
  low, high = (0.0, 1.0)
  if known:
    low, high = _limits(known, grid.in_percent[column])
  ends = [_end(grid, i, columns) for i in range(len(grid.methods))]
  longest = max(len(end.label) for end in ends)
  wide = min(7.2, _WIDTH - 1.6 - 0.09 * longest)
  ax = page.panel(0.85, 1.1, wide, tall)
  for i, method in enumerate(grid.methods):
    stats_of = {x: grid.stats[method, column] for x, column in columns.items()}
    _draw_line(ax, i, stats_of, len(grid.methods))
  _plain(ax)
  ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
  ax.set_ylim(low, high)
  ax.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
  if not known:
    ax.set_yticks([])
  _set_values(ax, list(columns), wide)
  ax.set_xlabel(_short(name, 60), size=9, color=_SOFT)
  ax.set_ylabel(_axis_title(grid, column), size=9, color=_SOFT)
  # Methods without a result stand below all others.
  ends.sort(key=lambda end: -end.point[1] if end.point else math.inf)
  spots = _spread(
    [end.point[1] if end.point else low for end in ends],
    gap=0.2 / tall * (high - low),
    low=low,
    high=high,
  )
  for end, spot in zip(ends, spots, strict=True):
    _label_end(ax, end, (spot - low) / (high - low))
  return page.figure


def _end(grid: tables.Grid, index: int, columns: Mapping[float, str]) -> _End:
  method = grid.methods[index]
  label = _short(method, 24)
  means = {x: grid.stats[method, c].test_mean for x, c in columns.items()}
  xs = [x for x in columns if means[x] is not None]
  if not xs:
    return _End(f"{tables.UNKNOWN}  {label}", _SOFT, None, False)
  mean = means[xs[-1]]
  assert mean is not None
  early = xs[-1] != list(columns)[-1]
  # The number would be taken for that of the last value.
  value = tables.mean_and_std(mean, None, grid.in_percent[grid.columns[0]])
  label = f"{label} (to {xs[-1]:g})" if early else f"{value}  {label}"
  return _End(label, _COLORS[index % len(_COLORS)], (xs[-1], mean), early)


def _draw_line(
  ax: axes.Axes,
  index: int,
  stats_of: Mapping[float, tables.Stats],
  num_lines: int,
) -> None:
  """Draw one method's means and the band of their standard deviations."""
  xs = [x for x, stats in stats_of.items() if stats.test_mean is not None]
  means = np.array([stats_of[x].test_mean for x in xs])
  stds = np.array([stats_of[x].test_std or 0.0 for x in xs])
  color = _COLORS[index % len(_COLORS)]
  faint = 0.16 if num_lines < 5 else 0.07
  band: Any = {"color": color, "alpha": faint, "linewidth": 0}
  ax.fill_between(xs, means - stds, means + stds, **band)
  line = ax.plot(xs, means, color=color, linewidth=2, clip_on=False)[0]
  line.set(marker=_MARKERS[index % len(_COLORS)], markersize=5)
  line.set_linestyle(("-", (0, (4, 1.5)))[index // len(_COLORS) % 2])


def _label_end(ax: axes.Axes, end: _End, height: float) -> None:
  """Write a line's label at the right of `ax`, joined to its last point."""
  style: Any = {"size": 8.5, "weight": "bold", "va": "center"}
  style |= {"color": end.color}
  if end.point is None:
    ax.text(1.06, height, end.label, transform=ax.transAxes, **style)
    return
  arrow: Any = {"arrowstyle": "-", "color": end.color, "relpos": (0, 0.5)}
  # A full line would read as more results.
  arrow |= {"lw": 0.8, "linestyle": ":" if end.early else "-"}
  ax.annotate(
    end.label,
    xy=end.point,
    xytext=(1.06, height),
    textcoords="axes fraction",
    arrowprops={**arrow, "shrinkA": 2, "shrinkB": 4},
    annotation_clip=False,
    **style,
  )


def _set_values(ax: axes.Axes, values: Sequence[float], wide: float) -> None:
  """Put a tick at each value; write those that have room."""
  log = values[0] > 0 and values[-1] / values[0] > 10
  if log:
    ax.set_xscale("log")
  at = np.log(values) if log else np.array(values)
  inches = wide * (at - at[0]) / (at[-1] - at[0])
  labels, taken = [], -math.inf
  for value, x in zip(values, inches, strict=True):
    label = f"{value:g}"
    half = 0.04 * len(label) + 0.04
    fits = x - half > taken
    labels.append(label if fits else "")
    taken = x + half if fits else taken
  ax.set_xticks(values, labels)
  ax.minorticks_off()
  margin = 0.02 * (at[-1] - at[0])
  ends = at[0] - margin, at[-1] + margin
  ax.set_xlim(*(np.exp(ends) if log else ends))


def _spread(
  ends: Sequence[float], *, gap: float, low: float, high: float
) -> np.ndarray:
  """Move falling heights apart by at least `gap`, by as little as possible.

  Least squares: with i * gap added, the result is the closest sequence that
  does not rise, which pooling neighbours finds. They stay between `low` and
  `high` where there is room for all.
  """
  pools: list[tuple[float, int]] = []
  for i, end in enumerate(ends):
    pools.append((end + i * gap, 1))
    while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
      (a, n), (b, m) = pools.pop(), pools.pop()
      pools.append(((a * n + b * m) / (n + m), n + m))
  heights = np.repeat([a for a, _ in pools], [n for _, n in pools])
  heights = np.clip(heights, low + (len(ends) - 1) * gap, high)
  return heights - gap * np.arange(len(ends))


def _limits(values: Sequence[float], in_percent: bool) -> tuple[float, float]:
  """Return the range of an axis that shows all values, at least 1 % wide."""
  middle = (min(values) + max(values)) / 2
  least = 1.0 if in_percent else 0.01 * max(map(abs, values)) or 1.0
  half = 0.56 * max(least, max(values) - min(values))
  return middle - half, middle + half


def _plain(ax: axes.Axes) -> None:
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["left", "bottom"]].set_color(_GREY)
  ax.tick_params(labelsize=8, color=_GREY, labelcolor=_SOFT)
