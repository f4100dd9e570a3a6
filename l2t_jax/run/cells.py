"""The cells of a table: a method and a config, trained with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import copy
import pathlib
import sys
import time
import traceback
from typing import Any, NamedTuple

import jax
import ml_collections
from rich import console

from l2t_jax import cli, errors, files
import l2t_jax.config
from l2t_jax.method import objectives
from l2t_jax.models import weight_files
from l2t_jax.results import paper, run_reader, tables
from l2t_jax.run import experiments, from_config, train
from l2t_jax.runtime import phases, run_folder

CONSOLE = console.Console(file=sys.stdout, highlight=False, soft_wrap=True)


class Cell(NamedTuple):
  """A method in a column of the table, with the runs of all seeds."""

  column: str
  method: str
  config: ml_collections.ConfigDict
  workdirs: dict[int, pathlib.Path]  # Seed -> folder of its run.
  folder: pathlib.Path  # Contains the folders of its runs.
  trial: str = ""  # Label of the trial that these runs are part of.

  @property
  def is_search(self) -> bool:
    """True if its pairs are searched for; see `tuning`."""
    return objectives.get_method(self.method).searches_pairs


def load_columns(
  paths: Sequence[str], sweep: str, overrides: Sequence[str]
) -> dict[str, ml_collections.ConfigDict]:
  """Read the configs of a table's columns.

  Args:
    paths: config files.
    sweep: "FIELD=VALUE,VALUE,...", or "" for none.
    overrides: such as "--config.epochs=5"; they apply to all columns.

  Returns:
    Column -> config. A column is named after the config file, the swept value
    ("per_class=5"), or both.

  Raises:
    errors.InputError: a file, a field or a value is wrong, or two columns have
      the same name.
  """
  field, _, values = sweep.partition("=")
  for name in (f"--config.{field}=", *overrides):
    if name.startswith("--config.method="):
      raise errors.InputError(
        "the rows of a table are its methods: set --methods, not config.method"
      )
  if sweep and not (field and values):
    raise errors.InputError(
      f"--sweep={sweep} must be a field and its values, such as"
      " --sweep=data.per_class=5,10,50"
    )
  columns: dict[str, ml_collections.ConfigDict] = {}
  for path in paths:
    file, _, argument = path.partition(":")
    name = ":".join(filter(None, (pathlib.Path(file).stem, argument)))
    for value in map(str.strip, values.split(",")) if sweep else ("",):
      column, more = name, list(overrides)
      if sweep:
        value_name = f"{field.rpartition('.')[2]}={value}"
        column = value_name if len(paths) == 1 else f"{name} {value_name}"
        more.append(f"--config.{field}={value}")
      folder = folder_name(column)
      for other in columns:
        if folder_name(other) == folder:
          raise errors.InputError(
            f"the columns {other!r} and {column!r} would share the folder"
            f" {folder}; name each once, or give each a --workdir of its own"
          )
      columns[column] = cli.load_config(path, more)
  return columns


def make_cells(
  columns: Mapping[str, ml_collections.ConfigDict],
  methods: Sequence[str],
  num_seeds: int,
  workdir: pathlib.Path,
) -> list[Cell]:
  """Make the cells of a table, column by column.

  Args:
    columns: name -> config.
    methods: names for `objectives.get_method`.
    num_seeds: number of seeds, counted from the config's seed.
    workdir: folder of the table.

  Raises:
    errors.InputError: a method is unknown or named twice, or a column's config
      makes two of them the same.
  """
  if len(set(methods)) < len(methods):
    raise errors.InputError(f"--methods={','.join(methods)} names one twice")
  cells = []
  for column, base in columns.items():
    check_rows_differ(methods, base.transfer)
    for method in methods:
      config = copy.deepcopy(base)
      config.method = method
      folder = workdir / folder_name(column) / method
      seeds = range(base.seed, base.seed + num_seeds)
      workdirs = {seed: folder / f"seed{seed}" for seed in seeds}
      cells.append(Cell(column, method, config, workdirs, folder))
  return cells


def check_is_read(option: str, field: str, cells: Sequence[Cell]) -> None:
  """Raise an `errors.InputError` if no method of the cells reads a field."""
  if not any(l2t_jax.config.reads(cell.config, field) for cell in cells):
    raise errors.InputError(
      f"--{option}={field}: no method of the table reads it"
    )


def interleave(cells: Sequence[Cell]) -> list[Cell]:
  """Order cells so that the shares of a table contain different methods.

  A share takes every N-th cell. In column order, one share could get the most
  expensive method of every column.
  """
  columns = list(dict.fromkeys(cell.column for cell in cells))
  methods = list(dict.fromkeys(cell.method for cell in cells))

  def diagonal(cell):
    column = columns.index(cell.column)
    return (methods.index(cell.method) - column) % len(methods), column

  return sorted(cells, key=diagonal)


def folder_name(name: str) -> str:
  """Turn a name that may contain a path into the name of one folder."""
  return name.replace("/", "_")


def check_rows_differ(
  methods: Sequence[str], fields: ml_collections.ConfigDict
) -> None:
  """Reject rows that train the same, be it because of config.transfer.

  Args:
    methods: rows of the table.
    fields: config.transfer.

  Raises:
    errors.InputError: naming two such rows.
  """
  changed = [
    f"config.transfer.{name}={fields[name]}"
    for name in ("map", "pairs", "channel_weights", "pair_weights")
    if fields[name] != l2t_jax.config.FIELDS[f"transfer.{name}"].default
  ]
  rows: dict[objectives.Method, str] = {}
  for name in methods:
    method = objectives.get_method(name)
    has_pairs = bool(fields.map or fields.pairs)
    if method.searches_pairs and has_pairs:
      raise errors.InputError(
        f"{changed[0]} is set, but {name} searches for pairs; leave one of the"
        " two out"
      )
    learns = method.learns(
      fields.channel_weights, fields.pair_weights, is_frozen=bool(fields.map)
    )
    effective = method._replace(
      pair_set="" if method.pair_set and has_pairs else method.pair_set,
      learn_channels=learns[0],
      learn_pairs=learns[1],
      looks_ahead=method.looks_ahead and any(learns),
    )
    same = rows.setdefault(effective, name)
    if same != name:
      cause = f"with {' and '.join(changed)}, " if changed else ""
      raise errors.InputError(
        f"{cause}{same} and {name} are the same; leave out one of these methods"
      )


def make_jobs(cells: Sequence[Cell], together: int) -> list[Cell]:
  """Group the runs that are not done into jobs: seeds that train together.

  The grouping does not depend on which runs are done, so that the shares of
  several processes never overlap. A job with nothing left to do stays in the
  list.

  Args:
    cells: cells of the table.
    together: number of seeds per job. 0 for one on a CPU, where `jax.vmap`
      turns convolutions into slow grouped ones, and for all seeds of a cell on
      other devices.
  """
  if not together:
    on_cpu = jax.default_backend() == "cpu"
    together = 1 if on_cpu else max(len(cell.workdirs) for cell in cells)
  jobs = []
  for cell in cells:
    seeds = list(cell.workdirs)
    for first in range(0, len(seeds), together):
      mine = seeds[first : first + together]
      left = {
        seed: cell.workdirs[seed]
        for seed in mine
        if not train.is_complete(cell.workdirs[seed], cell.config.epochs)
      }
      jobs.append(cell._replace(workdirs=left))
  return jobs


class Runner:
  """Trains jobs. The jobs of a cell share images, networks and programs."""

  def __init__(self):
    """Start without anything to share."""
    self._cell: tuple[str, str, str] | None = None
    self._training: train.Training | None = None

  def run(self, job: Cell) -> None:
    """Train the seeds of a job together, and record failures.

    If training them together fails, each is trained alone.
    """
    start = time.time()
    trial = job.trial and f"  {job.trial}"
    seeds = ", ".join(map(str, job.workdirs))
    title = f"{job.column}  {job.method}{trial}  seed {seeds}"
    first = next(iter(job.workdirs.values()))
    run_folder.make(first)
    summaries, failure = self._train_logged(job, title, first)
    if failure:
      files.write(first / run_folder.ERROR, failure)
      line = failure.splitlines()[0]
      if len(job.workdirs) == 1:
        CONSOLE.print(f"{title}: FAILED: {line}")
        return
      CONSOLE.print(f"{title}: {line}; now each alone")
      for seed, workdir in job.workdirs.items():
        self.run(job._replace(workdirs={seed: workdir}))
      return
    for workdir in job.workdirs.values():
      (workdir / run_folder.ERROR).unlink(missing_ok=True)
    accuracies = lambda key: ", ".join(
      run_reader.accuracy_text(summary[key], job.config.target.task, digits=1)
      for summary in summaries
    )
    shown = f"validation {accuracies('val_accuracy')}"
    if not job.trial:
      shown += f", test {accuracies('test_accuracy')}"
    CONSOLE.print(f"{title}: {shown}  ({time.time() - start:.0f} s)")

  def _train_logged(
    self, job: Cell, title: str, folder: pathlib.Path
  ) -> tuple[list[dict[str, Any]], str]:
    """Train with the output redirected to train.log.

    Returns:
      (summaries, "" or the error as text). As text, because an exception keeps
      the frames of its traceback alive, and with them their arrays.
    """
    try:
      with (
        CONSOLE.status(f"training {title}"),
        (folder / "train.log").open("a") as log,
        contextlib.redirect_stdout(log),
      ):
        return self._train(job), ""
    except (errors.Interrupted, errors.StorageError, run_folder.LockedError):
      raise  # These end the whole table.
    except Exception as error:
      self._cell = self._training = None
      phases.take()  # Do not count its time for the next run.
      return [], f"{errors.in_one_line(error)}\n\n{traceback.format_exc()}"

  def _train(self, job):
    from_config.check(job.config, job.workdirs)
    cell = (job.column, job.method, job.trial)
    if self._training is None or self._cell != cell:
      self._training = None  # Free its arrays before the next one allocates.
      self._training = train.Training(from_config.resolve(job.config))
      self._cell = cell
    return self._training.run(job.workdirs)


def results(cells: Sequence[Cell]) -> list[tables.Cell]:
  """Read the results of all cells so far."""
  return [_result(cell) for cell in cells]


def read_runs(cell: Cell) -> tuple[list[dict[str, Any]], list[str]]:
  """Return (summaries of the finished runs, errors of the failed ones)."""
  summaries, failures = [], []
  for seed, workdir in cell.workdirs.items():
    error_file = workdir / run_folder.ERROR
    # A run that is to go on may have the summary of fewer epochs.
    if train.is_complete(workdir, cell.config.epochs):
      summaries.append(run_reader.read_summary(workdir) or {})
    elif error_file.exists():
      failures.append(f"seed {seed}: {error_file.read_text().splitlines()[0]}")
  return summaries, failures


def _result(cell: Cell) -> tables.Cell:
  tuning = run_folder.read_json(cell.folder / run_reader.TUNING)
  if tuning and tuning["chosen"] is None:
    first = next(error for t in tuning["trials"] for error in t["errors"])
    # Runs that may exist were trained with an earlier choice.
    summaries = list[dict[str, Any]]()
    failures = [f"tuning: all trials failed, such as {first}"]
  else:
    config = cli.with_fields(cell.config, tuning["chosen"] if tuning else {})
    cell = cell._replace(config=config)
    summaries, failures = read_runs(cell)
  reported = paper.REPORTED.get(cell.column, {}).get(cell.method)
  return tables.Cell(
    cell.method,
    cell.column,
    tuple(summaries),
    len(cell.workdirs),
    tuple(failures),
    in_percent=run_reader.is_classification(cell.config.target.task),
    paper=reported,
    departures=() if reported is None else _departures(cell, summaries),
    tuning=tables.Tuning(**tuning) if tuning else None,
  )


def _departures(cell, summaries):
  """List how a cell departs from the paper's setting; see `paper.departures`.

  The config stands for the runs: `from_config.check` has compared them.
  """
  config, source, num_images = cell.config, "", None
  if objectives.get_method(cell.method).needs_source and config.source.weights:
    source = _describe_source(pathlib.Path(config.source.weights))
  for summary in summaries[:1]:  # All seeds have as many images.
    num_labelled = summary["num_train"] + summary["num_val"]
    num_images = (num_labelled, summary["num_test"])
  return paper.departures(
    cell.column,
    experiments.comparable(from_config.describe(config)),
    experiments.comparable(from_config.describe(l2t_jax.config.get_config())),
    free_fields=l2t_jax.config.FREE_FIELDS,
    source=source,
    num_images=num_images,
  )


def _describe_source(path):
  try:
    metadata = weight_files.read_metadata(path)
  except errors.InputError:  # The runs have failed and reported it.
    return "unknown"
  return f"{metadata['model']} of {metadata['num_classes']} classes"
