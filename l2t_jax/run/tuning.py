"""Choose hyper-parameters for the cells of a table, on validation images.

Each cell, a method in a column, is tuned independently. A trial is a
combination of values of the fields that the method reads. Trials use seeds that
the table does not use, and never evaluate the test images. The seeds of the
table then train with the trial of the highest mean validation accuracy.

For `fm_search` and its combinations, a greedy search also finds a set of fixed
pairs: it adds the pair that improves validation accuracy most, until none does.
It tries at most `MAX_PAIR_SETS` sets, and all pairs together.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
import functools
import hashlib
import itertools
import math
import statistics
from typing import Any, NamedTuple

from l2t_jax import cli, data, errors
import l2t_jax.config
from l2t_jax.results import run_reader, tables, transfer_map
from l2t_jax.run import cells as table_cells
from l2t_jax.run import from_config
from l2t_jax.runtime import run_folder

MAX_PAIR_SETS = 30  # Per search.
# The table's seeds start at the config's seed, those of trials this far above.
_SEED_DISTANCE = 10_000
# Fields that cannot be tuned: they say what is compared, or on which images.
_FIXED = (
  *("method", "seed", "evaluate_test", "target.task", "target.num_outputs"),
  *("data.source", "data.name", "data.path", "data.classes", "data.per_class"),
  *("data.split_file", "data.split_prefix", "data.split_seed"),
  *("data.val_fraction", "data.test_fraction", "bilevel.outer_images"),
)
# Fields that decide whether anything is learned in the outer loss.
_SWITCHES = (
  "transfer.channel_weights",
  "transfer.pair_weights",
  "transfer.map",
)
_LONGEST_NAME = 150  # Of a trial's folder; most file systems allow 255 bytes.


class Tuning(NamedTuple):
  """The values to try for each cell."""

  values: Mapping[str, tuple[str, ...]] = {}  # Field -> texts of its values.
  num_seeds: int = 1  # Per trial.


class _Outcome(NamedTuple):
  """The result of a trial."""

  fields: dict[str, str]
  score: float  # Mean validation accuracy; -inf if a seed failed.
  record: dict[str, Any]  # For tuning.json.
  cell: table_cells.Cell

  def failed(self, error: str) -> _Outcome:
    """Return the outcome of the same trial, had it ended with an error."""
    record = self.record | {"errors": [*self.record["errors"], error]}
    return self._replace(score=-math.inf, record=record)


def parse(texts: Sequence[str], num_seeds: int) -> Tuning:
  """Read "FIELD=VALUE,VALUE,..." of the command line.

  Raises:
    errors.InputError: a text has another form, or names a field twice or one
      that cannot be tuned.
  """
  values: dict[str, tuple[str, ...]] = {}
  for text in texts:
    field, _, listed = text.partition("=")
    given = tuple(map(str.strip, listed.split(",")))
    if not field or not all(given) or len(set(given)) < len(given):
      raise errors.InputError(
        f"--tune={text} must be a field and different values without commas in"
        " them, such as --tune=transfer.beta=0.5,2"
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
  """Reject values that cannot be trained, before anything is trained.

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
    table_cells.check_is_read("tune", field, cells)
    outer = {cell.config.bilevel.outer_images for cell in cells}
    if field in _SWITCHES and "validation" in outer:
      raise errors.InputError(
        f"--tune={field}: with config.bilevel.outer_images=validation, some"
        " trials would train on the validation images that all are judged by;"
        f" use --sweep={field}, which compares test accuracies"
      )
    _check_values_differ(field, tuning.values[field], cells[0].config)
  _check_pairs(tuning, cells)
  digest = functools.cache(data.digest)
  for cell in cells:
    combinations = _combinations(cell, tuning)
    if not num_trials(cell, tuning):
      chosen = cli.with_fields(cell.config, combinations[0])
      from_config.check(chosen, cell.workdirs, digest)
      continue
    for fields in combinations:
      trial = _trial(cell, fields, tables.fields_text(fields), tuning.num_seeds)
      from_config.check(trial.config, trial.workdirs, digest)


def _check_values_differ(field, texts, config):
  seen: dict[str, str] = {}
  for text in texts:
    value = l2t_jax.config.get(cli.with_fields(config, {field: text}), field)
    if (same := seen.setdefault(repr(value), text)) != text:
      raise errors.InputError(
        f"--tune={field}: {same} and {text} are the same value"
      )


def _check_pairs(tuning, cells):
  """Reject pairs and maps that make two rows equal."""
  methods = list(dict.fromkeys(cell.method for cell in cells))
  for field in ("transfer.pairs", "transfer.map"):
    for text in tuning.values.get(field, ()):
      fields = cli.with_fields(cells[0].config, {field: text}).transfer
      table_cells.check_rows_differ(methods, fields)


def num_trials(cell: table_cells.Cell, tuning: Tuning) -> int:
  """Return how many trials a cell has, not counting sets of pairs."""
  count = len(_combinations(cell, tuning))
  return count if count > 1 or cell.is_search else 0


def jobs(
  cells: Sequence[table_cells.Cell], tuning: Tuning, together: int
) -> Iterator[table_cells.Cell]:
  """Yield the runs that are left, cell by cell; tune each before it trains.

  Which runs come next depends on the results of earlier ones: train each job
  before asking for the next. The trials and the choice of a cell are written to
  tuning.json in its folder.

  Args:
    cells: cells of the table.
    tuning: the values to try.
    together: see `cells.make_jobs`.

  Raises:
    errors.InputError: a folder holds a run of another config, such as a seed
      that was trained with an earlier choice.
  """
  for cell in cells:
    chosen = yield from _tune(cell, tuning, together)
    if chosen:
      yield from table_cells.make_jobs([chosen], together)


def _tune(
  cell: table_cells.Cell, tuning: Tuning, together: int
) -> Generator[table_cells.Cell, None, table_cells.Cell | None]:
  """Yield the runs of a cell's trials; return the cell with what was chosen."""
  outcomes: list[_Outcome] = []

  def attempt(fields, label):
    trial = _trial(cell, fields, label, tuning.num_seeds)
    from_config.check(trial.config, trial.workdirs)
    yield from table_cells.make_jobs([trial], together)
    outcomes.append(_outcome(trial, fields))
    return outcomes[-1]

  combinations = _combinations(cell, tuning)
  chosen: dict[str, str] | None = combinations[0]
  if num_trials(cell, tuning):
    for fields in combinations:
      outcome = yield from attempt(fields, tables.fields_text(fields))
      if cell.is_search and (too_many := _too_many_pairs(outcome)):
        outcomes[-1] = outcome.failed(too_many)
        break  # None of the others would be searched either.
    best = max(outcomes, key=lambda outcome: outcome.score)
    if cell.is_search and best.score > -math.inf:
      best = yield from _search_pairs(best, attempt)
    chosen = best.fields if best.score > -math.inf else None
  if chosen is not None:
    _check_seeds(cell, chosen)
  file = cell.folder / run_reader.TUNING
  if outcomes or chosen:
    run_folder.make(cell.folder)
    trials = [outcome.record for outcome in outcomes]
    run_folder.write_json(file, {"chosen": chosen, "trials": trials})
  else:  # There was nothing to tune.
    file.unlink(missing_ok=True)
  if chosen is None:
    return None
  if outcomes:
    text = tables.fields_text(chosen) or "the config's own fields"
    table_cells.CONSOLE.print(
      f"{cell.column}  {cell.method}: chose {text} among {len(outcomes)} trials"
    )
  return cell._replace(config=cli.with_fields(cell.config, chosen))


def _check_seeds(cell, chosen):
  """Reject seeds that were trained with other values than those chosen."""
  try:
    from_config.check(cli.with_fields(cell.config, chosen), cell.workdirs)
  except errors.InputError as error:
    raise errors.InputError(
      f"{cell.column} {cell.method}: chosen is now"
      f" {tables.fields_text(chosen) or 'what the config says'}, but {error}"
    ) from error


def _search_pairs(all_pairs, attempt):
  """Add pairs greedily; return the best outcome, that of all pairs included."""
  names = _pairs_of(all_pairs)
  best, num_tried = None, 0
  chosen: tuple[str, ...] = ()
  left = names
  while len(chosen) + 1 < len(names) and num_tried < MAX_PAIR_SETS:
    tried = {}
    candidates = left[: MAX_PAIR_SETS - num_tried]
    is_cut_short = len(candidates) < len(left)
    for pair in candidates:
      listed = ", ".join(n for n in names if n in (*chosen, pair))
      tried[pair] = yield from attempt(
        all_pairs.fields | {"transfer.pairs": listed}, listed
      )
    num_tried += len(tried)
    # The most promising pairs come first, in case not all can be tried.
    left = sorted(tried, key=lambda pair: -tried[pair].score)
    winner = left.pop(0)
    if best and tried[winner].score <= best.score:
      break
    best, chosen = tried[winner], (*chosen, winner)
  else:
    is_cut_short = len(chosen) + 1 < len(names)
  if is_cut_short:
    table_cells.CONSOLE.print(
      f"{all_pairs.cell.method}: ended at its limit of {MAX_PAIR_SETS} sets;"
      " more pairs may help"
    )
  outcomes = [all_pairs] if best is None else [best, all_pairs]
  return max(outcomes, key=lambda outcome: outcome.score)


def _pairs_of(outcome):
  """Return the names of the pairs of a trial that has succeeded."""
  first = next(iter(outcome.cell.workdirs.values()))
  content = run_folder.read_json(first / transfer_map.FILE)
  return [f"{pair['source']}->{pair['target']}" for pair in content["pairs"]]


def _too_many_pairs(outcome):
  """Return why the pairs of a trial cannot be searched; "" if they can."""
  count = 0 if outcome.score == -math.inf else len(_pairs_of(outcome))
  if count <= MAX_PAIR_SETS:
    return ""
  return (
    f"{outcome.cell.method} has {count} pairs to choose from, but tries at most"
    f" {MAX_PAIR_SETS} sets; name fewer layers in config.source.taps and"
    " config.target.taps"
  )


def _combinations(cell, tuning):
  """Return the combinations of values of the fields that a cell reads."""
  values = {
    field: texts
    for field, texts in tuning.values.items()
    if l2t_jax.config.reads(cell.config, field)
  }
  if cell.is_search:
    values["transfer.pairs"] = ("all_to_all",)
  return [
    dict(zip(values, combination, strict=True))
    for combination in itertools.product(*values.values())
  ]


def _trial(cell, fields, label, num_seeds):
  """Return a cell of the runs of a trial."""
  config = cli.with_fields(cell.config, fields)
  config.evaluate_test = False
  name = table_cells.folder_name(tables.fields_text(fields) or "untuned")
  if len(name) > _LONGEST_NAME:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    name = f"{name[:_LONGEST_NAME]} {digest}"
  folder = cell.folder / run_reader.TRIALS / name
  first = config.seed + _SEED_DISTANCE
  seeds = range(first, first + num_seeds)
  return cell._replace(
    config=config,
    workdirs={seed: folder / f"seed{seed}" for seed in seeds},
    trial=label or "the config's own fields",
  )


def _outcome(trial, fields):
  summaries, failures = table_cells.read_runs(trial)
  accuracies = [summary["val_accuracy"] for summary in summaries]
  score = -math.inf if failures else statistics.fmean(accuracies)
  record = {
    "fields": fields,
    "val_accuracy": accuracies,
    "seconds": sum(summary["seconds"] for summary in summaries),
    "iterations": sum(summary["iterations"] for summary in summaries),
    "iteration_seconds": min(
      filter(None, (s.get("iteration_seconds") for s in summaries)),
      default=None,
    ),
    "seeds_together": max(
      (s.get("seeds_together", 1) for s in summaries), default=1
    ),
    "errors": failures,
  }
  return _Outcome(fields, score, record, trial)
