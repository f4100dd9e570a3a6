"""Choose hyper-parameters for the cells of a table, on validation images.

Each cell, a method in a column, is tuned by itself. A trial is a combination of
values of the fields that its method reads. Trials train with seeds of their own
and never look at the test images. The seeds of the table then train with the
trial that has the highest mean validation accuracy.

The row `SEARCH` also searches for the best fixed pairs: it adds one pair after
the other, each time the one that helps most, as long as one helps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
import itertools
import json
import statistics
from typing import Any, NamedTuple

from l2t_jax import cli, errors
import l2t_jax.config
from l2t_jax.results import run_reader, tables, transfer_map
from l2t_jax.run import cells as table_cells
from l2t_jax.run import from_config
from l2t_jax.runtime import run_folder

MAX_PAIR_SETS = 30  # That a search tries.
# Seeds of trials count from here, those of the table from the config's.
_FIRST_SEED = 10_000
_FIXED = ("method", "seed", "evaluate_test")


class Tuning(NamedTuple):
  """What is tried for each cell."""

  values: Mapping[str, tuple[str, ...]] = {}  # Field -> texts of its values.
  num_seeds: int = 1  # Per trial.


class _Outcome(NamedTuple):
  """What came of a trial."""

  fields: dict[str, str]
  score: float  # Mean validation accuracy; -inf if a seed failed.
  record: dict[str, Any]  # For tuning.json.
  cell: table_cells.Cell


def parse(texts: Sequence[str], num_seeds: int) -> Tuning:
  """Read "FIELD=VALUE,VALUE,..." of the command line.

  Raises:
    errors.InputError: a text has another form, or names a field that cannot be
      tuned, or one twice.
  """
  values: dict[str, tuple[str, ...]] = {}
  for text in texts:
    field, _, listed = text.partition("=")
    given = tuple(map(str.strip, listed.split(",")))
    if not field or not all(given) or len(set(given)) < len(given):
      raise errors.InputError(
        f"--tune={text} must be a field and different values, such as"
        " --tune=transfer.beta=0.5,2"
      )
    l2t_jax.config.check_fields([f"config.{field}"])
    if field in _FIXED or field in values:
      why = "is given twice" if field in values else "cannot be tuned"
      raise errors.InputError(f"--tune={text}: {field} {why}")
    values[field] = given
  return Tuning(values, num_seeds)


def check(
  tuning: Tuning,
  cells: Sequence[table_cells.Cell],
  set_elsewhere: Sequence[str] = (),
) -> None:
  """Refuse what no run of a table can have, before anything is trained.

  Args:
    tuning: what is tried.
    cells: of the table.
    set_elsewhere: fields that the command line sets or sweeps.

  Raises:
    errors.InputError: a field is not read by any method, or is set elsewhere;
      or `from_config.check` refuses a cell or a trial.
  """
  for field in tuning.values:
    if field in set_elsewhere:
      raise errors.InputError(
        f"--tune={field} and --config.{field} or --sweep={field} both set it;"
        " leave one of them out"
      )
    if not any(l2t_jax.config.reads(cell.config, field) for cell in cells):
      raise errors.InputError(
        f"--tune={field}: no method of the table reads it"
      )
  for cell in cells:
    combinations = _combinations(cell, tuning)
    if len(combinations) == 1 and not cell.is_search:
      from_config.check(cli.with_fields(cell.config, combinations[0]))
      continue
    for fields in combinations:
      trial = _trial(cell, fields, _name(fields), tuning.num_seeds)
      from_config.check(trial.config, trial.workdirs)


def num_trials(cell: table_cells.Cell, tuning: Tuning) -> int:
  """Return how many trials a cell has, those of a search left out."""
  count = len(_combinations(cell, tuning))
  return count if count > 1 or cell.is_search else 0


def jobs(
  cells: Sequence[table_cells.Cell], tuning: Tuning, together: int
) -> Iterator[table_cells.Cell]:
  """Yield the runs that are left, cell by cell; tune each before it trains.

  What a cell is tuned to depends on what the runs that were yielded have left,
  so they must have been trained before the next one is asked for. It is written
  to tuning.json in the cell's folder.

  Args:
    cells: of the table.
    tuning: what is tried.
    together: see `cells.make_jobs`.
  """
  for cell in cells:
    chosen = yield from _tune(cell, tuning, together)
    if chosen:
      yield from table_cells.make_jobs([chosen], together)


def _tune(
  cell: table_cells.Cell, tuning: Tuning, together: int
) -> Generator[table_cells.Cell, None, table_cells.Cell | None]:
  """Yield the runs of a cell's trials; return what its seeds train with."""
  outcomes: list[_Outcome] = []

  def attempt(fields, name):
    trial = _trial(cell, fields, name, tuning.num_seeds)
    yield from table_cells.make_jobs([trial], together)
    outcomes.append(_outcome(trial, fields))
    return outcomes[-1]

  combinations = _combinations(cell, tuning)
  if not num_trials(cell, tuning):
    chosen = combinations[0]
  else:
    for fields in combinations:
      yield from attempt(fields, _name(fields))
    best = max(outcomes, key=lambda outcome: outcome.score)
    if cell.is_search and best.score > -float("inf"):
      best = yield from _search_pairs(best, attempt)
    chosen = best.fields if best.score > -float("inf") else None
  run_folder.make(cell.folder)
  run_folder.write_json(
    cell.folder / table_cells.TUNING,
    {
      "chosen": chosen,
      "trials": [outcome.record for outcome in outcomes],
    },
  )
  if chosen is None:
    return None
  if outcomes:
    text = tables.fields_text(chosen) or "the config's own fields"
    table_cells.CONSOLE.print(
      f"{cell.column}  {cell.method}: chose {text} among {len(outcomes)} trials"
    )
  return cell._replace(config=cli.with_fields(cell.config, chosen))


def _search_pairs(all_pairs, attempt):
  """Add pairs one by one; return the best outcome, also that of all pairs."""
  first = next(iter(all_pairs.cell.workdirs.values()))
  content = json.loads((first / transfer_map.FILE).read_text())
  names = [f"{pair['source']}->{pair['target']}" for pair in content["pairs"]]
  best, num_tried = None, 0
  chosen: tuple[int, ...] = ()
  left = list(range(len(names)))
  while left and num_tried < MAX_PAIR_SETS:
    tried = {}
    for index in left[: MAX_PAIR_SETS - num_tried]:
      pairs = sorted((*chosen, index))
      listed = ", ".join(names[i] for i in pairs)
      tried[index] = yield from attempt(
        all_pairs.fields | {"transfer.pairs": listed},
        f"pairs {' '.join(map(str, pairs))}",
      )
    num_tried += len(tried)
    # The most promising pairs come first, in case not all can be tried.
    left = sorted(tried, key=lambda index: -tried[index].score)
    winner = left.pop(0)
    if best and tried[winner].score <= best.score:
      break
    best, chosen = tried[winner], (*chosen, winner)
  return max(best, all_pairs, key=lambda outcome: outcome.score)


def _combinations(cell, tuning):
  """Return the combinations of values of the fields that a cell reads."""
  values = {
    field: texts
    for field, texts in tuning.values.items()
    if l2t_jax.config.reads(cell.config, field)
  }
  return [
    dict(zip(values, combination, strict=True))
    for combination in itertools.product(*values.values())
  ]


def _name(fields):
  return table_cells.folder_name(tables.fields_text(fields) or "untuned")


def _trial(cell, fields, name, num_seeds):
  """Return a cell of the runs of a trial."""
  config = cli.with_fields(cell.config, fields)
  config.evaluate_test = False
  folder = cell.folder / run_reader.TUNING / name
  seeds = range(_FIRST_SEED, _FIRST_SEED + num_seeds)
  return cell._replace(
    config=config,
    workdirs={seed: folder / f"seed{seed}" for seed in seeds},
    trial=name,
  )


def _outcome(trial, fields):
  summaries, failures = table_cells.read_runs(trial)
  accuracies = [summary["val_accuracy"] for summary in summaries]
  score = -float("inf") if failures else statistics.fmean(accuracies)
  record = {
    "fields": fields,
    "val_accuracy": accuracies,
    "seconds": sum(summary["seconds"] for summary in summaries),
    "iterations": sum(summary["iterations"] for summary in summaries),
    "errors": failures,
  }
  return _Outcome(fields, score, record, trial)
