"""The table of results, as CSV, Markdown, text and rows of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import csv
import io
import itertools
import sys
import textwrap
from typing import Any, NamedTuple

from rich import box, console, table, text

from l2t_jax.results import run_reader, statistics

_CSV_HEADER = (
  *("method", "column", "seeds", "test_mean", "test_std", "val_mean"),
  *("val_std", "paper", "seconds", "memory_mib"),
  *("reference", "difference", "difference_low", "difference_high"),
  "paired_seeds",
  *("tuned", "tuning_runs", "tuning_seconds", "tuning_plain_steps"),
)


_PLAIN = "scratch"  # The method whose iterations are plain steps.


class Tuning(NamedTuple):
  """How a cell was tuned; the content of its tuning.json."""

  chosen: Mapping[str, str] | None  # Field -> value; None if all trials failed.
  # Each has "fields", "val_accuracy" of its seeds, "seconds" and "iterations"
  # summed over them, "iteration_seconds" (None if unknown), "seeds_together" as
  # in a summary, and "errors".
  trials: Sequence[Mapping[str, Any]]

  @property
  def num_runs(self) -> int:
    return sum(
      len(trial["val_accuracy"]) + len(trial["errors"]) for trial in self.trials
    )

  @property
  def num_failed(self) -> int:
    """Number of trials with a failed seed."""
    return sum(bool(trial["errors"]) for trial in self.trials)

  @property
  def seconds(self) -> float:
    return sum(trial["seconds"] for trial in self.trials)

  @property
  def text(self) -> str:
    """The chosen values, for the table."""
    if self.chosen is None:
      return "nothing: all trials failed"
    return fields_text(self.chosen) or "the config's own"

  @property
  def edges(self) -> list[str]:
    """Fields whose chosen value is the largest or smallest of three or more."""
    found = []
    for field, value in (self.chosen or {}).items():
      tried = {trial["fields"].get(field) for trial in self.trials} - {None}
      try:
        numbers = sorted(float(text) for text in tried)
      except ValueError:
        continue
      if len(numbers) > 2 and float(value) in (numbers[0], numbers[-1]):
        found.append(f"{field}={value}")
    return found


def fields_text(fields: Mapping[str, str]) -> str:
  """Return fields as "a=1 b=2"."""
  return " ".join(f"{name}={value}" for name, value in fields.items())


class Cell(NamedTuple):
  """The results of one method in one column."""

  method: str
  column: str  # Name of a config, or of a swept value: "per_class=50".
  summaries: tuple[dict[str, Any], ...]  # summary.json of the finished seeds.
  num_seeds: int  # Requested; 0 if nothing is run.
  errors: tuple[str, ...] = ()  # One per failed seed: "seed 2: loss is nan".
  in_percent: bool = True  # How accuracies are shown; the same in a column.
  paper: float | None = None  # Test accuracy in % that the paper reports.
  # How the runs differ from the paper's: "epochs is 5, not 200".
  departures: tuple[str, ...] = ()
  tuning: Tuning | None = None  # None if there was nothing to tune.

  @property
  def test(self) -> run_reader.Accuracies:
    return run_reader.accuracies(
      self.summaries, "test_accuracy", self.in_percent
    )

  @property
  def validation(self) -> run_reader.Accuracies:
    return run_reader.accuracies(
      self.summaries, "val_accuracy", self.in_percent
    )

  @property
  def seconds(self) -> float | None:
    """Mean duration of a run over the seeds."""
    known = [s["seconds"] for s in self.summaries if "seconds" in s]
    return sum(known) / len(known) if known else None

  @property
  def memory_mib(self) -> float | None:
    """Largest memory of a run over the seeds."""
    known = [s.get("memory_bytes") or 0 for s in self.summaries]
    return max(known, default=0) / 2**20 or None

  @property
  def seeds(self) -> str:
    """Number of finished seeds: "3", or "2 of 3" if one is missing."""
    done, asked = len(self.summaries), self.num_seeds
    return str(done) if done >= asked else f"{done} of {asked}"

  @property
  def is_partial(self) -> bool:
    """True if some seeds, but not all, are finished."""
    return 0 < len(self.summaries) < self.num_seeds


class Grid(NamedTuple):
  """Methods by columns, both in the order given."""

  methods: tuple[str, ...]
  columns: tuple[str, ...]
  cells: dict[tuple[str, str], Cell]  # One per method and column.
  in_percent: dict[str, bool]  # Column -> how its accuracies are shown.
  departures: Mapping[str, Iterable[str]]  # Column -> those of its cells.
  reference: str = ""  # The method that the others are compared with.

  def name_of(self, cell: Cell) -> str:
    """Return its method, and its column if there are several."""
    is_single = len(self.columns) == 1
    return cell.method if is_single else f"{cell.method}, {cell.column}"

  def difference(self, cell: Cell) -> statistics.Difference | None:
    """Return a cell's test accuracy minus the reference's, paired by seed."""
    other = self.cells.get((self.reference, cell.column))
    if other is None or cell.method == self.reference:
      return None
    return difference(cell, other)

  def plain_steps(self, cell: Cell) -> float | None:
    """Return the cost of a cell's tuning in iterations of `scratch`.

    None if it is unknown: where seeds train together, the time of an iteration
    is a seed's share, so that as many of `scratch` must have done so.
    """
    plain = self.cells.get((_PLAIN, cell.column))
    if plain is None or not cell.tuning:
      return None
    together = lambda record: record.get("seeds_together", 1)
    trials = plain.tuning.trials if plain.tuning else ()
    fastest: dict[int, float] = {}  # By the number of seeds together.
    for record in (*plain.summaries, *trials):
      if seconds := record.get("iteration_seconds"):
        before = fastest.get(together(record), seconds)
        fastest[together(record)] = min(seconds, before)
    steps = 0.0
    for trial in filter(lambda trial: trial["iterations"], cell.tuning.trials):
      seconds = trial.get("iteration_seconds")
      if seconds is None or together(trial) not in fastest:
        return None
      steps += trial["iterations"] * seconds / fastest[together(trial)]
    return steps


class _Table(NamedTuple):
  """A table of text whose first column names the method."""

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  right: bool  # Whether to align all but the methods to the right.


def difference(cell: Cell, other: Cell) -> statistics.Difference | None:
  """Compare the test accuracies of two cells, in % for classifiers.

  Runs are paired if they have the same seed and the same split of the images.
  """
  by_seed = lambda one: {
    (summary["seed"], summary.get("split_hash")): (100 if one.in_percent else 1)
    * summary["test_accuracy"]
    for summary in one.summaries
    if summary.get("test_accuracy") is not None
  }
  return statistics.paired_difference(by_seed(cell), by_seed(other))


def make_grid(cells: Sequence[Cell], reference: str = "") -> Grid:
  """Arrange cells by method and column.

  If one cell of a column departs from the paper's setting, the paper's numbers
  are left out of the whole column: half a column would mislead.
  """
  methods = tuple(dict.fromkeys(cell.method for cell in cells))
  columns = tuple(dict.fromkeys(cell.column for cell in cells))
  in_percent = {cell.column: cell.in_percent for cell in cells}
  departures: dict[str, dict[str, None]] = {column: {} for column in columns}
  for cell in cells:
    departures[cell.column] |= dict.fromkeys(cell.departures)
  given = {(cell.method, cell.column): cell for cell in cells}
  places = {}
  for method, column in itertools.product(methods, columns):
    not_run = Cell(method, column, (), 0, in_percent=in_percent[column])
    cell = given.get((method, column), not_run)
    if departures[column]:
      cell = cell._replace(paper=None)
    places[method, column] = cell
  return Grid(methods, columns, places, in_percent, departures, reference)


def has_paper(grid: Grid) -> bool:
  """True if a number of the paper is shown."""
  return any(cell.paper is not None for cell in grid.cells.values())


def print_table(cells: Sequence[Cell], reference: str = "") -> None:
  """Print the content of `table.md`; a narrow terminal folds its cells."""
  grid = make_grid(cells, reference)
  out = console.Console(file=sys.stdout, highlight=False)
  for content in _tables(grid):
    out.print(text.Text(content.title, "bold"))
    rows = table.Table(
      box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    # As Text, so that rich does not read names as markup.
    for i, header in enumerate(content.header):
      justify: Any = "right" if i and content.right else "left"
      rows.add_column(text.Text(header), justify=justify, overflow="fold")
    for row in content.rows:
      rows.add_row(*map(text.Text, row))
    out.print(rows)
  for note in _notes(grid):
    out.print(text.Text(note))


def to_csv(grid: Grid) -> str:
  """Return the content of table.csv: a line per method and column."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(_CSV_HEADER)
  for (method, column), cell in grid.cells.items():
    test, validation = cell.test, cell.validation
    values = [test.mean, test.std, validation.mean, validation.std]
    values += [cell.paper, cell.seconds, cell.memory_mib]
    digits = 4 if cell.in_percent else 6
    rounded = lambda values, digits: [
      "" if value is None else round(value, digits) for value in values
    ]
    row = [method, column, len(cell.summaries), *rounded(values, digits)]
    compared = grid.difference(cell)
    if compared:
      interval = compared.mean, compared.low, compared.high
      row += [grid.reference, *rounded(interval, digits), len(compared.values)]
    else:
      row += [""] * 5
    if tuning := cell.tuning:
      cost = rounded((tuning.seconds, grid.plain_steps(cell)), 1)
      row += [fields_text(tuning.chosen or {}), tuning.num_runs, *cost]
    else:
      row += [""] * 4
    writer.writerow(row)
  return out.getvalue()


def to_markdown(grid: Grid) -> str:
  """Return the content of table.md: the tables, and notes about them."""
  parts = []
  for content in _tables(grid):
    dash = "---:" if content.right else "---"
    dashes = ["---"] + [dash] * (len(content.header) - 1)
    rows = [[_escape(cell) for cell in content.header], dashes]
    for method, *values in content.rows:
      # Within backticks, only a bar needs an escape.
      rows.append([f"`{method}`".replace("|", r"\|"), *values])
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    parts.append(f"**{_escape(content.title)}**\n\n{body}")
  parts.append("\n".join(f"- {_escape(note)}" for note in _notes(grid)))
  return "\n\n".join(part for part in parts if part) + "\n"


def _escape(line: str) -> str:
  """Escape what GitHub would read as the end of a column or as HTML."""
  return line.replace("|", r"\|").replace("<", "&lt;")


def run_rows(
  runs: Sequence[run_reader.Run], reference: str = ""
) -> list[dict[str, str]]:
  """Return the table of single runs, as the report shows it.

  Args:
    runs: from `run_reader.find_runs`.
    reference: the method that others are compared with, seed by seed and on the
      same split; "" for none.

  Returns:
    Rows of column -> text: one per run, and a row of means after runs that
    differ in their seed alone.
  """
  rows = []
  groups = run_reader.by_experiment(runs)
  for group in groups:
    # One run per seed and split, in case a folder was copied.
    done = tuple(
      {
        (run.config["seed"], run.summary.get("split_hash")): run.summary
        for run in group
        if run.summary
      }.values()
    )
    minus = _minus(reference, group, groups) if done else ""
    has_mean = len(done) > 1
    for run in group:
      known = run.summary or run.best  # The best epoch of an unfinished run.
      cell = _cell_of(run, run.name, (known,) if known else ())
      row = _accuracy_row(cell, str(run.config["seed"]))
      if reference:
        shows_difference = run.summary and not has_mean
        row[f"minus {reference}"] = minus if shows_difference else ""
      row["best epoch"] = str(run.best.get("epoch", run_reader.UNKNOWN))
      row["epochs"] = f"{len(run.epochs)} of {run.config['epochs']}"
      row |= {"seconds": _seconds(cell), "memory": _memory(cell)}
      rows.append(row)
    if has_mean:
      name = f"{run_reader.common_name(group)}: mean ± std"
      row = _accuracy_row(_cell_of(group[0], name, done), f"{len(done)} seeds")
      rows.append(row | ({f"minus {reference}": minus} if reference else {}))
  return rows


def _minus(reference, group, groups):
  """Return the difference of a group from those of a method, as text."""
  others = [
    other
    for other in groups
    if other[0].config["method"] == reference
    # An unfinished run knows no split.
    and _splits(other) in (_splits(group), set())
    and run_reader.same_task(other[0], group[0])
  ]
  if len(others) > 1:  # As in a table with a swept field.
    of_column = [
      other
      for other in others
      if run_reader.differing_fields(other[0], group[0]) <= {"method", "seed"}
    ]
    others = of_column or others
  return _compare_groups(group, others)


def _splits(group):
  return {run.summary.get("split_hash") for run in group if run.summary}


def _compare_groups(group, others):
  """Return a difference as text; "" without a reference."""
  if not others or any(other is group for other in others):
    return ""
  if len(others) > 1:
    return f"unclear: {len(others)} configs of {others[0][0].config['method']}"
  done = lambda runs: tuple(run.summary for run in runs if run.summary)
  compared = difference(
    *(_cell_of(runs[0], "", done(runs)) for runs in (group, others[0]))
  )
  if compared is None:
    return ""
  return difference_text(compared, group[0].in_percent)


def _cell_of(run: run_reader.Run, name: str, summaries: tuple) -> Cell:
  method, in_percent = run.config["method"], run.in_percent
  return Cell(method, name, summaries, len(summaries), in_percent=in_percent)


def _accuracy_row(cell: Cell, seed: str) -> dict[str, str]:
  return {
    "run": cell.column,
    "method": cell.method,
    "seed": seed,
    "validation": cell.validation.text(unit=True),
    "test": cell.test.text(unit=True),
  }


def _tables(grid: Grid) -> tuple[_Table, ...]:
  """Return one table of one column, else one of accuracies and one of costs."""
  return (*_accuracy_tables(grid), *_tuning_tables(grid))


def _accuracy_tables(grid: Grid) -> tuple[_Table, ...]:
  if len(grid.columns) == 1:
    return (_single_table(grid),)
  accuracies, costs = [], []
  for method in grid.methods:
    cells = [grid.cells[method, column] for column in grid.columns]
    accuracies.append((method, *map(_accuracy, cells)))
    costs.append((method, *map(_cost, cells)))
  in_percent = all(grid.in_percent.values())
  accuracy = "Test accuracy in %" if in_percent else "Test accuracy"
  named = [c if in_percent else f"{c}{_unit(grid, c)}" for c in grid.columns]
  title = f"{accuracy} at the best validation epoch"
  result = [_Table(title, ("method", *named), accuracies, False)]
  if grid.reference:
    rows = [
      (
        method,
        *(_difference(grid, grid.cells[method, c]) for c in grid.columns),
      )
      for method in grid.methods
      if method != grid.reference
    ]
    title = f"Test accuracy minus that of {grid.reference}"
    result.append(_Table(title, ("method", *named), rows, False))
  header = ("method", *grid.columns)
  return (*result, _Table("Time per run and memory", header, costs, False))


def _tuning_tables(grid: Grid) -> tuple[_Table, ...]:
  """Return the table of what was tuned, if anything was."""
  rows = [
    (
      grid.name_of(cell),
      cell.tuning.text,
      str(cell.tuning.num_runs),
      f"{cell.tuning.seconds:,.0f}",
      run_reader.UNKNOWN if steps is None else f"{steps:,.0f}",
    )
    for cell in grid.cells.values()
    if cell.tuning
    for steps in (grid.plain_steps(cell),)
  ]
  if not rows:
    return ()
  header = ("method", "chosen", "runs", "seconds", "plain steps, about")
  return (_Table("Tuning on validation accuracy", header, rows, False),)


def _difference(grid: Grid, cell: Cell) -> str:
  compared = grid.difference(cell)
  if compared is None:
    return run_reader.UNKNOWN
  return difference_text(compared, cell.in_percent)


def difference_text(compared: statistics.Difference, in_percent: bool) -> str:
  """Format as "+1.2 [0.4, 2.0]"."""
  digits = ".1f" if in_percent else ".2g"
  text = f"{compared.mean:+{digits}}"
  if compared.low is not None:
    text += f" [{compared.low:{digits}}, {compared.high:{digits}}]"
  return text


def _unit(grid: Grid, column: str) -> str:
  return " %" if grid.in_percent[column] else ""


def _single_table(grid: Grid) -> _Table:
  (column,) = grid.columns
  unit = _unit(grid, column)
  header = ["method", f"test{unit}", "paper %", f"validation{unit}"]
  compared = [f"minus {grid.reference}"] if grid.reference else []
  rows = [[*header, *compared, "seeds", "seconds", "memory"]]
  for method in grid.methods:
    cell = grid.cells[method, column]
    reported = run_reader.UNKNOWN if cell.paper is None else f"{cell.paper:.1f}"
    row = [method, cell.test.text(), reported, cell.validation.text()]
    if grid.reference:
      row.append(_difference(grid, cell))
    rows.append([*row, cell.seeds, _seconds(cell), _memory(cell)])
  if not has_paper(grid):
    for row in rows:
      del row[2]
  title = f"{column}: accuracy at the best validation epoch"
  return _Table(title, rows[0], rows[1:], True)


def _accuracy(cell: Cell) -> str:
  reported = "" if cell.paper is None else f" [{cell.paper:.1f}]"
  seeds = f", {cell.seeds} seeds" if cell.is_partial else ""
  return f"{cell.test.text()}{reported}{seeds}"


def _cost(cell: Cell) -> str:
  known = [_seconds(cell, " s"), _memory(cell)]
  return (
    ", ".join(text for text in known if text != run_reader.UNKNOWN)
    or run_reader.UNKNOWN
  )


def _seconds(cell: Cell, unit: str = "") -> str:
  return (
    run_reader.UNKNOWN if cell.seconds is None else f"{cell.seconds:,.0f}{unit}"
  )


def _memory(cell: Cell) -> str:
  mib = cell.memory_mib
  if mib is None:
    return run_reader.UNKNOWN
  return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def _notes(grid: Grid) -> list[str]:
  """Return notes on missing results, the signs, and the hardware."""
  notes = []
  cells = grid.cells.values()
  is_single = len(grid.columns) == 1
  for cell in cells:
    name = grid.name_of(cell)
    notes += [f"{name}, {' '.join(error.split())}" for error in cell.errors]
    if not cell.num_seeds:
      notes.append(f"{name}: not run")
    elif cell.num_seeds > len(cell.summaries) + len(cell.errors):
      notes.append(f"{name}: {cell.seeds} seeds")
    if any(s.get("trained_on_validation") for s in cell.summaries):
      chose = ", which chose its values," if cell.tuning else ""
      notes.append(
        f"{name}: validation images took part in training; the validation"
        f" accuracy{chose} is optimistic."
      )
  if any(cell.test.std is not None for cell in cells):
    notes.append("±: sample standard deviation over the seeds.")
  compared = filter(None, map(grid.difference, cells))
  if counts := sorted({len(difference.values) for difference in compared}):
    notes.append(
      f"minus {grid.reference}: mean difference in test accuracy over the"
      f" seeds that both have ({_distinct(counts)}), with its 95 % confidence"
      " interval (paired t; none for one seed)."
    )
    if any(cell.tuning for cell in cells):
      notes[-1] += " The interval takes the tuned values as given."
  for cell in cells:
    name = grid.name_of(cell)
    if cell.tuning and cell.tuning.num_failed:
      count, failed = len(cell.tuning.trials), cell.tuning.num_failed
      notes.append(f"{name}: {failed} of {count} trials failed.")
    for edge in cell.tuning.edges if cell.tuning else ():
      notes.append(f"{name}: {edge} is at the edge of the values tried.")
  if any(cell.tuning for cell in cells):
    notes.append(
      "Tuning: all trials of a method; plain steps: the time of their"
      f" iterations, divided by that of one of {_PLAIN}; evaluations are not"
      " counted."
    )
  if has_paper(grid):
    sign = "paper %" if is_single else "[ ]"
    notes.append(f"{sign}: reported by the paper, not measured here.")
  for column, departures in grid.departures.items():
    if departures:
      where = "" if is_single else f"{column}: "
      told = textwrap.shorten("; ".join(departures), 300, placeholder=" ...")
      notes.append(f"{where}the paper's numbers are left out: {told}.")
  if any(cell.memory_mib is not None for cell in cells):
    notes.append("Memory: what the compiled training step needs.")
  summaries = [summary for cell in cells for summary in cell.summaries]
  together = {s.get("seeds_together", 1) for s in summaries} - {1}
  if together:
    notes.append(
      f"{_distinct(sorted(together))} seeds trained at once: time is a seed's"
      " share, memory that of all."
    )
  if any(summary.get("test_accuracy", 0) is None for summary in summaries):
    notes.append(
      f"{run_reader.UNKNOWN}: test images were not evaluated"
      " (config.evaluate_test)."
    )
  if summaries:
    epochs = _distinct(summary["epochs"] for summary in summaries)
    notes.append(f"Epochs: {epochs}. {_hardware(summaries)}.")
  return notes


def _hardware(summaries: Sequence[Mapping[str, Any]]) -> str:
  """Return the devices and the versions of the runs."""
  names = dict.fromkeys(n for s in summaries for n in s["versions"])
  versions = (
    f"{name} {_distinct(s['versions'].get(name, '?') for s in summaries)}"
    for name in names
  )
  devices = _distinct(summary["device"] for summary in summaries)
  return f"Device: {devices}; {', '.join(versions)}"


def _distinct(values: Iterable[Any]) -> str:
  return " or ".join(dict.fromkeys(map(str, values)))
