from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import csv
import io
import sys
from typing import Any, NamedTuple

import numpy as np
from rich import box, console, table, text


class Cell(NamedTuple):
  """What is known of one method in one column."""

  method: str
  column: str  # Name of a config, or of a swept value: "per_class=50".
  summaries: tuple[dict[str, Any], ...]  # summary.json of the finished seeds.
  num_seeds: int  # Asked for.
  errors: tuple[str, ...] = ()  # One a failed seed: "seed 2: loss is nan".
  in_percent: bool = True  # How accuracies are shown; the same in a column.
  paper: float | None = None  # Test accuracy in % that the paper reports.
  # In what the runs are not in the paper's setting: "epochs is 5, not 200".
  departures: tuple[str, ...] = ()


class Stats(NamedTuple):
  """Over the finished seeds of a cell; None where it is not known.

  Accuracies are in % where the column's are.
  """

  test: tuple[float, ...]  # Seed by seed.
  test_mean: float | None = None
  test_std: float | None = None  # Of a sample: over n - 1.
  val_mean: float | None = None
  val_std: float | None = None
  seconds: float | None = None  # Mean.
  memory_mib: float | None = None  # The largest.


class Grid(NamedTuple):
  """The cells as methods x columns, both in the order given."""

  methods: tuple[str, ...]
  columns: tuple[str, ...]
  cells: dict[tuple[str, str], Cell]
  stats: dict[tuple[str, str], Stats]  # Of all places, also empty ones.
  in_percent: dict[str, bool]  # Of each column.
  departures: dict[str, tuple[str, ...]]  # Of each column's cells.


class _Table(NamedTuple):
  """A table of texts; the first column names the method."""

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  right: bool  # Whether to align all but the methods to the right.


_CSV_HEADER = (
  "method",
  "column",
  "seeds",
  "test_mean",
  "test_std",
  "val_mean",
  "val_std",
  "paper",
  "seconds",
  "memory_mib",
)
UNKNOWN = "–"
_NUM_DEPARTURES = 4  # That a note names.


def print_table(cells: Sequence[Cell]) -> None:
  """Print what `table.md` says to the terminal, in as many parts as it needs.

  Args:
    cells: as in `write`.

  Raises:
    ValueError: as in `write`.
  """
  grid = make_grid(cells)
  out = console.Console(file=sys.stdout, highlight=False)
  for content in _tables(grid):
    out.print(text.Text(content.title, "bold"))
    for part in _parts(content, out.width):
      rows = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
      for i, header in enumerate(part.header):
        width = _column_width(part, i)
        rows.add_column(
          text.Text(header),
          width=width,
          justify="right" if i and part.right else "left",
        )
      for row in part.rows:
        # As Text, no method or field name is read as markup.
        rows.add_row(*map(text.Text, row))
      out.print(rows)
  for note in _notes(grid):
    out.print(text.Text(note))


def make_grid(cells: Sequence[Cell]) -> Grid:
  """Order the cells by method and column; compute each one's statistics."""
  if not cells:
    raise ValueError("a comparison needs at least one cell")
  by_place: dict[tuple[str, str], Cell] = {}
  for cell in cells:
    if by_place.setdefault((cell.method, cell.column), cell) is not cell:
      raise ValueError(
        f"two cells for method {cell.method!r}, column {cell.column!r}"
      )
  methods = tuple(dict.fromkeys(cell.method for cell in cells))
  columns = tuple(dict.fromkeys(cell.column for cell in cells))
  in_percent = {cell.column: cell.in_percent for cell in cells}
  stats = {}
  for place in ((m, c) for m in methods for c in columns):
    stats[place] = _statistics(
      by_place[place].summaries if place in by_place else (),
      100 if in_percent[place[1]] else 1,
    )
  departures = {
    column: tuple(
      dict.fromkeys(
        d for c in cells if c.column == column for d in c.departures
      )
    )
    for column in columns
  }
  return Grid(methods, columns, by_place, stats, in_percent, departures)


def _statistics(summaries: Sequence[Mapping[str, Any]], factor: float) -> Stats:
  if not summaries:
    return Stats(())
  test, val = (
    tuple(factor * float(summary[key]) for summary in summaries)
    for key in ("test_accuracy", "val_accuracy")
  )
  memory = [s["memory_bytes"] for s in summaries if s.get("memory_bytes")]
  std = lambda x: float(np.std(x, ddof=1)) if len(x) > 1 else None
  return Stats(
    test=test,
    test_mean=float(np.mean(test)),
    test_std=std(test),
    val_mean=float(np.mean(val)),
    val_std=std(val),
    seconds=float(np.mean([s["seconds"] for s in summaries])),
    memory_mib=max(memory) / 2**20 if memory else None,
  )


def paper(grid: Grid, method: str, column: str) -> float | None:
  """Return what the paper reports, where its setting is that of the column."""
  cell = grid.cells.get((method, column))
  return cell.paper if cell and not grid.departures[column] else None


def seeds(cell: Cell | None) -> str:
  """Say how many seeds are done, and of how many if some are not."""
  if cell is None:
    return "0"
  done = len(cell.summaries)
  return str(done) if done >= cell.num_seeds else f"{done} of {cell.num_seeds}"


def mean_and_std(
  mean: float | None, std: float | None, in_percent: bool
) -> str:
  if mean is None:
    return UNKNOWN
  # Not in %, they are of any scale.
  of_mean, of_std = (".1f", ".1f") if in_percent else (".4g", ".2g")
  text = f"{mean:{of_mean}}"
  return text if std is None else f"{text} ± {std:{of_std}}"


def _number(value: float | None, digits: int) -> str:
  return UNKNOWN if value is None else f"{value:.{digits}f}"


def _memory(mib: float | None) -> str:
  if mib is None:
    return UNKNOWN
  return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def to_csv(grid: Grid) -> str:
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(_CSV_HEADER)
  for (method, column), stats in grid.stats.items():
    values = (
      stats.test_mean,
      stats.test_std,
      stats.val_mean,
      stats.val_std,
      paper(grid, method, column),
      stats.seconds,
      stats.memory_mib,
    )
    digits = 4 if grid.in_percent[column] else 6
    rounded = ["" if v is None else round(v, digits) for v in values]
    writer.writerow([method, column, len(stats.test), *rounded])
  return out.getvalue()


def to_markdown(grid: Grid) -> str:
  parts = []
  for content in _tables(grid):
    dash = "---:" if content.right else "---"
    dashes = ["---"] + [dash] * (len(content.header) - 1)
    rows = [[_escape(cell) for cell in content.header], dashes]
    for method, *values in content.rows:
      # Within backticks only a bar means something.
      rows.append([f"`{method}`".replace("|", r"\|"), *values])
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    parts.append(f"**{_escape(content.title)}**\n\n{body}")
  parts.append("\n".join(f"- {_escape(note)}" for note in _notes(grid)))
  return "\n\n".join(part for part in parts if part) + "\n"


def _escape(line: str) -> str:
  """Keep GitHub from reading a bar as a column's end, a "<" as HTML."""
  return line.replace("|", r"\|").replace("<", "&lt;")


def _tables(grid: Grid) -> tuple[_Table, ...]:
  """Set out the results: one table for one column, else accuracy and cost."""
  if len(grid.columns) == 1:
    return (_single_table(grid),)
  accuracies, costs = [], []
  for method in grid.methods:
    places = [(method, column) for column in grid.columns]
    accuracies.append((method, *(_accuracy(grid, *place) for place in places)))
    costs.append((method, *(_cost(grid.stats[place]) for place in places)))
  header = ("method", *grid.columns)
  title, named = "Test accuracy in % at the best validation epoch", header
  if not all(grid.in_percent.values()):
    title = "Test accuracy at the best validation epoch"
    named = ("method", *(f"{c}{_unit(grid, c)}" for c in grid.columns))
  return (
    _Table(title, named, tuple(accuracies), False),
    _Table("Time of a run and memory", header, tuple(costs), False),
  )


def _unit(grid: Grid, column: str) -> str:
  """What follows the name of an accuracy."""
  return " %" if grid.in_percent[column] else ""


def _single_table(grid: Grid) -> _Table:
  column = grid.columns[0]
  in_percent, unit = grid.in_percent[column], _unit(grid, column)
  header = ["method", f"test{unit}", f"validation{unit}"]
  header += ["seeds", "s a run", "memory"]
  rows = []
  for method in grid.methods:
    stats = grid.stats[method, column]
    row = [
      method,
      mean_and_std(stats.test_mean, stats.test_std, in_percent),
      mean_and_std(stats.val_mean, stats.val_std, in_percent),
      seeds(grid.cells.get((method, column))),
      _number(stats.seconds, 0),
      _memory(stats.memory_mib),
    ]
    rows.append(row)
  if has_paper(grid):
    header.insert(2, "paper %")
    for row in rows:
      row.insert(2, _number(paper(grid, row[0], column), 1))
  title = f"{column}: accuracy at the best validation epoch"
  return _Table(title, tuple(header), tuple(map(tuple, rows)), True)


def _accuracy(grid: Grid, method: str, column: str) -> str:
  """Write a cell of the table of accuracies."""
  stats = grid.stats[method, column]
  cell = grid.cells.get((method, column))
  parts = mean_and_std(stats.test_mean, stats.test_std, grid.in_percent[column])
  reported = paper(grid, method, column)
  if reported is not None:
    parts += f" [{reported:.1f}]"
  if cell and 0 < len(cell.summaries) < cell.num_seeds:
    parts += f", {seeds(cell)} seeds"
  return parts


def _cost(stats: Stats) -> str:
  if stats.seconds is None:
    return UNKNOWN
  memory = "" if stats.memory_mib is None else f", {_memory(stats.memory_mib)}"
  return f"{stats.seconds:.0f} s{memory}"


def _notes(grid: Grid) -> list[str]:
  """Say what is missing, what the signs mean and what it ran on."""
  notes = []
  for method, column in grid.stats:
    name = method if len(grid.columns) == 1 else f"{method}, {column}"
    cell = grid.cells.get((method, column))
    if cell is None:
      notes.append(f"{name}: not run")
      continue
    notes += [f"{name}, {' '.join(error.split())}" for error in cell.errors]
    unaccounted = cell.num_seeds - len(cell.summaries) - len(cell.errors)
    if unaccounted > 0:
      notes.append(f"{name}: {seeds(cell)} seeds")
  if any(stats.test_std is not None for stats in grid.stats.values()):
    notes.append("±: sample standard deviation over the seeds.")
  if has_paper(grid):
    sign = "paper %" if len(grid.columns) == 1 else "[ ]"
    notes.append(f"{sign}: reported by the paper, not measured here.")
  for column, departures in grid.departures.items():
    if departures:
      where = "" if len(grid.columns) == 1 else f"{column}: "
      notes.append(
        f"{where}the paper's numbers are left out: {_shortened(departures)}."
      )
  summaries = [s for cell in grid.cells.values() for s in cell.summaries]
  if any(stats.memory_mib is not None for stats in grid.stats.values()):
    notes.append("Memory: what the compiled training step needs.")
  together = {s.get("seeds_together", 1) for s in summaries} - {1}
  if together:
    notes.append(
      f"{_distinct(sorted(together))} seeds trained at once: time is a seed's"
      " share, memory that of all."
    )
  if summaries:
    epochs = _distinct(summary["epochs"] for summary in summaries)
    notes.append(f"Epochs: {epochs}. {_ran_on(summaries)}.")
  return notes


def _shortened(departures: Sequence[str]) -> str:
  first, rest = departures[:_NUM_DEPARTURES], departures[_NUM_DEPARTURES:]
  return "; ".join([*first, *([f"{len(rest)} more"] if rest else [])])


def has_paper(grid: Grid) -> bool:
  return any(paper(grid, *place) is not None for place in grid.stats)


def _ran_on(summaries: Sequence[Mapping[str, Any]]) -> str:
  """Say on what devices, and with which versions, the runs were made."""
  names = dict.fromkeys(n for s in summaries for n in s["versions"])
  versions = (
    f"{name} {_distinct(s['versions'].get(name, '?') for s in summaries)}"
    for name in names
  )
  devices = _distinct(summary["device"] for summary in summaries)
  return f"Device: {devices}; {', '.join(versions)}"


def _distinct(values: Iterable[Any]) -> str:
  return " or ".join(dict.fromkeys(map(str, values)))


def _column_width(content: _Table, column: int) -> int:
  """Return the width at which no cell, and no word of the header, breaks."""
  words = content.header[column].split()
  return max(map(len, [*words, *(row[column] for row in content.rows)]))


def _parts(content: _Table, width: int) -> list[_Table]:
  """Split a table that is wider than the terminal; each part has methods."""
  gap = 3  # Between two columns.
  taken = first = _column_width(content, 0)
  parts: list[list[int]] = [[0]]
  for i in range(1, len(content.header)):
    needed = gap + _column_width(content, i)
    if taken + needed > width and len(parts[-1]) > 1:
      parts.append([0])
      taken = first
    parts[-1].append(i)
    taken += needed
  pick = lambda row, part: tuple(row[i] for i in part)
  return [
    content._replace(
      header=pick(content.header, part),
      rows=tuple(pick(row, part) for row in content.rows),
    )
    for part in parts
  ]
