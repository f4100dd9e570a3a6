"""Write `table.csv`, `table.md` and `table.png` of finished runs.

The picture has a panel for each data set ("stl10"), or one with lines where the
columns are values of a field ("per_class=50").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any, NamedTuple

from matplotlib import axes, figure, lines, ticker
import numpy as np

from l2t_jax import files
from l2t_jax.results import run_reader, style, tables

# Twelve neighbouring lines need more than six colours to be told apart.
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: Any = ("-", (0, (4, 1.5)))
_ROW = 0.36  # Height of a method's row, in inches.
# Width in inches of the numbers at the right of a panel: in %, or of any scale.
_VALUE, _LONG_VALUE = 0.95, 1.4
_PAPER_MARKER: Any = {
  "marker": "D",
  "markersize": 6,
  "markerfacecolor": "white",
  "markeredgecolor": style.COLORS[1],
  "markeredgewidth": 1.4,
}


class _Shown(NamedTuple):
  """A cell in the picture: its accuracy, or its difference to a reference."""

  values: tuple[float, ...]  # One per seed.
  mean: float
  half_width: float  # Of the whisker or band.
  text: str
  short: str  # The text without the half-width.

  @property
  def band(self) -> tuple[float, float]:
    return self.mean - self.half_width, self.mean + self.half_width


def write(
  workdir: pathlib.Path | str,
  cells: Sequence[tables.Cell],
  reference: str = "",
) -> None:
  """Write `table.csv`, `table.md` and `table.png` into `workdir`.

  With a reference, `differences.png` shows how the other methods differ. Each
  file is replaced atomically: several processes may write them.

  Args:
    workdir: the folder; it is created if it does not exist.
    cells: at most one per method and column; a missing one counts as not run.
      Methods and columns are shown in the order in which they first appear.
    reference: the method that the others are compared with; "" for none.
  """
  grid = tables.make_grid(cells, reference)
  contents: dict[str, str | bytes] = {
    "table.png": style.to_png(draw(cells)),
    "table.csv": tables.to_csv(grid),
    "table.md": tables.to_markdown(grid),
  }
  if reference and len(grid.methods) > 1:
    contents["differences.png"] = style.to_png(draw(cells, reference))
  else:
    (pathlib.Path(workdir) / "differences.png").unlink(missing_ok=True)
  for name, content in contents.items():
    files.write(pathlib.Path(workdir) / name, content, shared=True)


def draw(cells: Sequence[tables.Cell], reference: str = "") -> figure.Figure:
  """Draw a panel per data set, or lines over the values of a field.

  Args:
    cells: as in `write`.
    reference: a method, to draw the differences of the others to it, with
      confidence intervals; "" to draw accuracies, with standard deviations.

  Returns:
    The figure, 10 inches wide.
  """
  grid = tables.make_grid(cells, reference)
  if reference:
    others = tuple(name for name in grid.methods if name != reference)
    grid = grid._replace(methods=others)
  sweep = _sweep(grid.columns)
  return _draw_sweep(grid, *sweep) if sweep else _draw_panels(grid)


def _shown(grid: tables.Grid, cell: tables.Cell) -> _Shown | None:
  if grid.reference:
    difference = grid.difference(cell)
    if difference is None:
      return None
    text = tables.difference_text(difference, cell.in_percent)
    return _Shown(
      difference.values,
      difference.mean,
      difference.half_width or 0.0,
      text,
      text.partition(" ")[0],
    )
  test = cell.test
  if test.mean is None:
    return None
  return _Shown(
    test.values, test.mean, test.std or 0.0, test.text(), test.text(std=False)
  )


def _sweep(columns: Sequence[str]) -> tuple[str, dict[float, str]] | None:
  """Parse columns as the values of one field.

  Returns:
    (name of the field, value -> column by rising value), or None if they are
    something else.
  """
  field, _, _ = columns[0].rpartition("=")
  try:
    values = {float(name.removeprefix(f"{field}=")): name for name in columns}
  except ValueError:
    return None
  if field.endswith("per_class") and 0 in values:
    return None  # It stands for all images.
  is_one_field = field and all(map(math.isfinite, values))
  if not is_one_field or not 1 < len(values) == len(columns):
    return None
  return field, dict(sorted(values.items()))


def _draw_panels(grid: tables.Grid) -> figure.Figure:
  """Draw a panel per column: methods as rows, accuracy from left to right."""
  in_percent = all(grid.in_percent.values())
  beside = _VALUE if in_percent else _LONG_VALUE
  if grid.reference:  # The text of an interval is longer.
    beside += 0.45
  at_most = 3 if in_percent and not grid.reference else 2
  num_rows = math.ceil(len(grid.columns) / at_most)
  num_across = math.ceil(len(grid.columns) / num_rows)
  names = style.shorten(grid.methods, 24)
  left = 0.5 + 0.083 * max(map(len, names))
  across = (style.WIDTH - left - 0.1) / num_across
  tall = _ROW * len(grid.methods) + 0.1
  first, each = 1.3, tall + 0.95
  page = style.Page(first + num_rows * each - 0.1)
  _write_header(page, grid, "Large dot: mean", "whisker", "small dots: seeds.")
  titles = style.shorten(grid.columns, int(across / 0.11))
  for i, (column, title) in enumerate(zip(grid.columns, titles, strict=True)):
    x = left + across * (i % num_across)
    top = first + each * (i // num_across)
    page.write(x, top, title, 11)
    ax = page.panel(x, top + 0.3, across - beside - 0.2, tall)
    _draw_panel(ax, grid, column)
    ax.set_yticks(range(len(names)), names if i % num_across == 0 else [])
    ax.tick_params(axis="y", labelsize=9, labelcolor=style.INK)
    ax.set_xlabel(_axis_title(grid, column), size=8, color=style.SOFT)
  return page.figure


def _axis_title(grid: tables.Grid, column: str) -> str:
  if grid.reference:
    return "difference" + (", points" if grid.in_percent[column] else "")
  return "test accuracy" + (", %" if grid.in_percent[column] else "")


def _write_header(
  page: style.Page, grid: tables.Grid, mean: str, band: str, rest: str = ""
) -> None:
  """Write the title and the key: what shows the mean, the spread, and more."""
  title = "Test accuracy at the best validation epoch"
  key = f"{mean} over the seeds; {band}: ± one standard deviation"
  if grid.reference:
    title = f"Test accuracy minus that of {grid.reference}, seed by seed"
    key = f"{mean} over the seeds; {band}: 95 % confidence interval"
  page.write(0.35, 0.25, title, 17)
  key = f"{key}; {rest}" if rest else f"{key}."
  counts = [len(cell.summaries) for cell in grid.cells.values()]
  if max(counts) < 2:
    key = "One seed each." if any(counts) else "No run has finished."
  page.write(0.35, 0.68, key, 8.5)
  if tables.has_paper(grid) and not grid.reference:
    x, y = 0.43 / style.WIDTH, 1 - 0.98 / page.height
    page.figure.add_artist(
      lines.Line2D([x], [y], linestyle="", **_PAPER_MARKER)
    )
    page.write(0.57, 0.92, "reported by the paper", 8.5)


def _draw_panel(ax: axes.Axes, grid: tables.Grid, column: str) -> None:
  """Draw the results of one column, and write them at its right."""
  blue = style.COLORS[0]
  known: list[float] = []  # Every value that the axis has to show.
  beside: Any = {"transform": ax.get_yaxis_transform()}
  for y, method in enumerate(grid.methods):
    cell = grid.cells[method, column]
    shown = _shown(grid, cell)
    if cell.paper is not None and not grid.reference:
      ax.plot(cell.paper, y, zorder=4, **_PAPER_MARKER)
      known.append(cell.paper)
    count = len(shown.values) if shown else 0
    is_partial = 0 < count < cell.num_seeds
    beside["va"] = "bottom" if is_partial else "center"
    text = shown.text if shown else run_reader.UNKNOWN
    ax.text(1.04, y, text, size=8.5, color=style.INK, **beside)
    if is_partial:
      beside["va"] = "top"
      seeds = f"{count} of {cell.num_seeds} seeds"
      ax.text(1.04, y + 0.03, seeds, size=7, color=style.SOFT, **beside)
    if shown is None:
      continue
    known += [*shown.band, *shown.values]
    ax.plot(shown.band, [y, y], color=blue, linewidth=2)
    ax.plot(shown.mean, y, "o", color=blue, markersize=7, zorder=3)
    if len(shown.values) > 1:  # Below the mean, which would hide them.
      dots: Any = {"color": blue, "markersize": 3, "alpha": 0.6}
      ax.plot(shown.values, [y + 0.28] * len(shown.values), "o", **dots)
  if grid.reference:
    known.append(0.0)
    ax.axvline(0.0, color=style.SOFT, linewidth=1)
  ax.set_ylim(len(grid.methods) - 0.45, -0.55)
  style.plain_axes(ax)
  ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
  ax.set_axisbelow(True)
  ax.tick_params(axis="y", length=0)
  if not known:
    ax.set(xlim=(0, 1), xticks=[])
    return
  ax.set_xlim(*_limits(known, grid.in_percent[column]))
  ax.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))


def _draw_sweep(
  grid: tables.Grid, field: str, columns: Mapping[float, str]
) -> figure.Figure:
  """Draw accuracy against the value of a field, a line for each method."""
  missing = any(
    len(cell.summaries) < max(1, cell.num_seeds) for cell in grid.cells.values()
  )
  tall = max(3.4, 0.35 * len(grid.methods))
  page = style.Page(tall + 1.85 + 0.25 * missing)
  _write_header(page, grid, "Mean", "band")
  if missing:
    note = "Some seeds are missing: table.md says which."
    page.write(0.35, page.height - 0.35, note, 8.5)
  names = style.shorten(grid.methods, 24)
  wide = min(7.0, 7.6 - 0.09 * max(map(len, names)))
  ax = page.panel(0.85, 1.1, wide, tall)
  style.plain_axes(ax)
  ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
  known: list[float] = []  # Every value that the axis has to show.
  drawn = []
  for i, (method, name) in enumerate(zip(grid.methods, names, strict=True)):
    points = {
      x: point
      for x, column in columns.items()
      if (point := _shown(grid, grid.cells[method, column]))
    }
    line = _draw_line(
      ax, i, points, faint=0.16 if len(grid.methods) < 5 else 0.07
    )
    line.set_label(_line_label(name, points, max(columns)))
    drawn.append(line)
    known += [end for point in points.values() for end in point.band]
  if known and grid.reference:
    known.append(0.0)
    ax.axhline(0.0, color=style.SOFT, linewidth=1)
  if known:
    ax.set_ylim(*_limits(known, grid.in_percent[grid.columns[0]]))
    ax.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
  else:
    ax.set(ylim=(0, 1), yticks=[])
  _set_values(ax, list(columns), wide)
  ax.set_xlabel(style.shorten([field], 60)[0], size=9, color=style.SOFT)
  # The columns are all of one kind.
  title = _axis_title(grid, grid.columns[0])
  ax.set_ylabel(title, size=9, color=style.SOFT)
  style.name_lines(ax, drawn)
  return page.figure


def _line_label(name: str, points: Mapping[float, _Shown], last: float) -> str:
  """Return a method's name, and its mean at the last value of the field."""
  if not points:
    return f"{run_reader.UNKNOWN}  {name}"
  end = max(points)
  if end < last:  # Its mean would be taken for that of the last value.
    return f"{name} (to {end:g})"
  return f"{points[end].short}  {name}"


def _draw_line(
  ax: axes.Axes,
  index: int,
  points: Mapping[float, _Shown],
  faint: float,
) -> lines.Line2D:
  """Draw one method's means and the band of their standard deviations."""
  num_colors = len(style.COLORS)
  color = style.COLORS[index % num_colors]
  bands = np.array([p.band for p in points.values()]).reshape(-1, 2)
  band: Any = {"color": color, "alpha": faint, "linewidth": 0}
  ax.fill_between(list(points), *bands.T, **band)
  if len(points) == 1:  # Such a band has no width.
    ax.vlines(list(points), *bands.T, color=color, linewidth=2)
  means = bands.mean(axis=1)
  (line,) = ax.plot(
    list(points), means, color=color, linewidth=2, clip_on=False
  )
  line.set(marker=_MARKERS[index % num_colors], markersize=5)
  line.set_linestyle(_DASHES[index // num_colors % 2])
  return line


def _set_values(ax: axes.Axes, values: Sequence[float], wide: float) -> None:
  """Put a tick at each value, and label those for which there is room."""
  log = values[0] > 0 and values[-1] / values[0] > 10
  if log:
    ax.set_xscale("log")
  at = np.log(values) if log else np.array(values)
  inches = wide * (at - at[0]) / (at[-1] - at[0])
  labels, last = [], -math.inf
  for value, x in zip(values, inches, strict=True):
    labels.append(f"{value:g}" if x - last > 0.5 else "")
    last = x if labels[-1] else last
  ax.set_xticks(values, labels)
  ax.minorticks_off()
  margin = 0.02 * (at[-1] - at[0])
  ends = at[0] - margin, at[-1] + margin
  ax.set_xlim(*(np.exp(ends) if log else ends))


def _limits(values: Sequence[float], in_percent: bool) -> tuple[float, float]:
  """Return the range of an axis that shows all values, at least 1 % wide."""
  middle = (min(values) + max(values)) / 2
  least = 1.0 if in_percent else 0.01 * max(map(abs, values)) or 1.0
  half = 0.56 * max(least, max(values) - min(values))
  return middle - half, middle + half
