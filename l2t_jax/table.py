r"""Train every cell of a table of methods, and print it.

    python -m l2t_jax.table --config=configs/stl10.py \
      --methods=scratch,fm_one_to_one,l2t_ww --seeds=3 --workdir=runs/table

A cell is a method with a config; each of its seeds has a folder of its own,
WORKDIR/COLUMN/METHOD/seedN, as `train.py` makes it. The same command again
skips what is done, resumes what was cut off and repeats what failed. Several
configs are several columns (--config=configs/stl10.py,configs/cifar10.py), and
so are several values of a field (--sweep=data.per_class=5,10,50). A field of
all cells is set as --config.field=value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import copy
import pathlib
import sys
import time
import traceback
from typing import Any, NamedTuple

from absl import flags
import jax
import ml_collections
from rich import console

from l2t_jax import cli, errors
import l2t_jax.config
from l2t_jax.method import objectives
from l2t_jax.models import weight_files
from l2t_jax.results import paper, run_reader, table_picture, tables
from l2t_jax.run import experiments, from_config
from l2t_jax.runtime import run_folder, signals

flags.declare_key_flag("workdir")
flags.register_validator("workdir", bool, "it must name a folder")
_CONFIG = flags.DEFINE_list(
  "config", None, "Config files, a column each.", required=True
)
_METHODS = flags.DEFINE_list(
  "methods", None, "Rows: values of config.method; all of the paper's if none."
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs a cell.", lower_bound=1)
_SWEEP = flags.DEFINE_string(
  "sweep", "", "FIELD=VALUE,VALUE,...: a column for each value of a field."
)
_SHARD = flags.DEFINE_string(
  "shard", "1/1", "I/N: train the I-th of N shares of the cells, from 1 on."
)
_TOGETHER = flags.DEFINE_integer(
  "together",
  0,
  "Seeds of a cell that train at once; 0: one on a CPU, else as many as fit.",
  lower_bound=0,
)
_SUMMARY, _ERROR = "summary.json", "error.txt"  # What a run leaves.

_OUT = console.Console(file=sys.stdout, highlight=False, soft_wrap=True)


class Cell(NamedTuple):
  """A method in a column, with all of its seeds."""

  column: str
  method: str
  config: ml_collections.ConfigDict
  workdirs: dict[int, pathlib.Path]  # Seed -> folder of its run.


def main(overrides: list[str]) -> int:
  """Train what is not done yet.

  Returns:
    The exit status: 0, 1 where something failed, 75 where SIGTERM and 130
    where Ctrl-C interrupted it.
  """
  workdir = pathlib.Path(flags.FLAGS.workdir)
  share = _parse_shard(_SHARD.value)
  columns = load_columns(_CONFIG.value, _SWEEP.value, overrides)
  methods = _METHODS.value or paper.METHODS
  cells = make_cells(columns, methods, _SEEDS.value, workdir)
  for cell in cells:  # Before anything is trained.
    from_config.check(cell.config, cell.workdirs)
  run_folder.make(workdir)
  jobs = make_jobs(cells, _TOGETHER.value or _default_together())[share]
  runs = sum(len(job.workdirs) for job in jobs)
  _OUT.print(f"{len(cells)} cells; {runs} runs to do here")
  status = 0
  try:
    with signals.StopRequests() as requests:
      for job in jobs:
        if requests.received():
          raise errors.Interrupted("asked to stop")
        if job.workdirs:
          run_job(job)
          table_picture.write(workdir, results(cells))
  except (KeyboardInterrupt, errors.Interrupted) as error:
    _OUT.print("interrupted; the same command goes on from here")
    status = getattr(error, "exit_code", 130)
  final = results(cells)
  table_picture.write(workdir, final)
  tables.print_table(final)
  _OUT.print(f"saved as {workdir}/table.md, table.csv and table.png")
  for cell in cells[::-1]:
    picture = next(iter(cell.workdirs.values())) / "transfer_map.png"
    if picture.exists():
      _OUT.print(f"what {cell.method} transferred where: {picture}")
      break
  return status or int(any(cell.errors for cell in final))


def load_columns(
  paths: Sequence[str], sweep: str, overrides: Sequence[str]
) -> dict[str, ml_collections.ConfigDict]:
  """Read the configs of a table's columns.

  Args:
    paths: config files.
    sweep: "FIELD=VALUE,VALUE,...", or "" for none.
    overrides: such as "--config.epochs=5"; for all columns.

  Returns:
    Column -> config. A column's name is that of the config file, that of a
    swept value ("per_class=5"), or both.

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
    name = cli.column_name(path)
    for value in map(str.strip, values.split(",")) if sweep else ("",):
      column, more = name, list(overrides)
      if sweep:
        value_name = f"{field.rpartition('.')[2]}={value}"
        column = value_name if len(paths) == 1 else f"{name} {value_name}"
        more.append(f"--config.{field}={value}")
      for other in columns:
        if other == column:
          raise errors.InputError(f"there are two columns named {column!r}")
        if _folder_name(other) == _folder_name(column):
          raise errors.InputError(
            f"the columns {other!r} and {column!r} would share the folder"
            f" {_folder_name(column)}; rename what one of them names, or give"
            " each a --workdir of its own"
          )
      columns[column] = cli.load_config(path, more)
  return columns


def make_cells(
  columns: Mapping[str, ml_collections.ConfigDict],
  methods: Sequence[str],
  num_seeds: int,
  workdir: pathlib.Path,
) -> list[Cell]:
  """Lay the table out, column by column.

  Args:
    columns: name -> config.
    methods: keys of `objectives.METHODS`.
    num_seeds: seeds count from the config's own.
    workdir: of the table.

  Raises:
    errors.InputError: for a method that is unknown or named twice, and where a
      column's config makes two of them the same.
  """
  if len(set(methods)) < len(methods):
    raise errors.InputError(f"--methods={','.join(methods)} names one twice")
  cells = []
  for column, base in columns.items():
    _check_rows_differ(methods, base.transfer)
    for method in methods:
      config = copy.deepcopy(base)
      config.method = method
      folder = workdir / _folder_name(column) / method
      seeds = range(base.seed, base.seed + num_seeds)
      cells.append(
        Cell(column, method, config, {s: folder / f"seed{s}" for s in seeds})
      )
  return cells


def _folder_name(column):
  """One folder, also of a swept path, such as that of source weights."""
  return column.replace("/", "_")


def _check_rows_differ(methods, fields):
  """Refuse rows that pairs or a map of the user's make the same."""
  rows: dict[objectives.Method, str] = {}
  for name in methods:
    method = objectives.get_method(name)
    if method.pair_set and (fields.pairs or fields.map):
      method = method._replace(pair_set="")
    if method.pair_set == "" and fields.map:
      method = method._replace(learn_channels=False, learn_pairs=False)
    same = rows.setdefault(method, name)
    if same != name:
      field = "map" if fields.map else "pairs"
      raise errors.InputError(
        f"config.transfer.{field} is set, which makes {same} and {name} the"
        " same; leave one of them out of --methods"
      )


def make_jobs(cells: Sequence[Cell], together: int) -> list[Cell]:
  """Divide the runs that are not done into those that train at once.

  The division does not depend on what is done, so that the shares of several
  processes never overlap; a job without anything left to do stays in the list.
  """
  jobs = []
  for cell in cells:
    seeds = list(cell.workdirs)
    for first in range(0, len(seeds), together):
      mine = seeds[first : first + together]
      left = {
        seed: cell.workdirs[seed]
        for seed in mine
        if not (cell.workdirs[seed] / _SUMMARY).exists()
      }
      jobs.append(cell._replace(workdirs=left))
  return jobs


def run_job(job: Cell) -> None:
  """Train a job's seeds; where that fails, each alone; note what fails."""
  start = time.time()
  title = (
    f"{job.column}  {job.method}  seed {', '.join(map(str, job.workdirs))}"
  )
  first = next(iter(job.workdirs.values()))
  run_folder.make(first)
  summaries, failure = _train_logged(job, title, first)
  if failure:
    (first / _ERROR).write_text(failure)
    line = failure.splitlines()[0]
    if len(job.workdirs) == 1:
      _OUT.print(f"{title}: FAILED: {line}")
      return
    _OUT.print(f"{title}: {line}; now each alone")
    for seed, workdir in job.workdirs.items():
      run_job(job._replace(workdirs={seed: workdir}))
    return
  for workdir in job.workdirs.values():
    (workdir / _ERROR).unlink(missing_ok=True)
  accuracies = lambda key: ", ".join(
    run_reader.accuracy_text(summary[key], job.config.target.task, digits=1)
    for summary in summaries
  )
  _OUT.print(
    f"{title}: validation {accuracies('val_accuracy')}, test"
    f" {accuracies('test_accuracy')}  ({time.time() - start:.0f} s)"
  )


def _train_logged(
  job: Cell, title: str, folder: pathlib.Path
) -> tuple[list[dict[str, Any]], str]:
  """Train, its lines going to train.log; return (summaries, what failed).

  What failed is text: an exception would keep the memory of what it ended.
  """
  try:
    with (
      _OUT.status(f"training {title}"),
      (folder / "train.log").open("a") as log,
      contextlib.redirect_stdout(log),
    ):
      return from_config.train_together(job.config, job.workdirs), ""
  except (errors.Interrupted, errors.StorageError):
    raise  # The others would meet it, too.
  except Exception as error:
    return [], f"{_one_line(error)}\n\n{traceback.format_exc()}"


def results(cells: Sequence[Cell]) -> list[tables.Cell]:
  """Read what the runs of all cells have left so far."""
  return [_result(cell) for cell in cells]


def _result(cell: Cell) -> tables.Cell:
  summaries = _read_summaries(cell.workdirs.values())
  reported = paper.REPORTED.get(cell.column, {}).get(cell.method)
  departures: tuple[str, ...] = ()
  if reported is not None:
    departures = _departures(cell, summaries)
  return tables.Cell(
    cell.method,
    cell.column,
    tuple(summaries),
    len(cell.workdirs),
    tuple(_read_errors(cell.workdirs)),
    in_percent=run_reader.is_classification(cell.config.target.task),
    paper=reported,
    departures=departures,
  )


def _departures(cell, summaries):
  """List how a cell departs from the paper's setting; see `paper.departures`.

  `from_config.check` has made sure that the runs are of this config.
  """
  config, source, num_images = cell.config, "", None
  if objectives.METHODS[cell.method].needs_source and config.source.weights:
    source = _describe_source(pathlib.Path(config.source.weights))
  for summary in summaries[:1]:  # The others' are as many.
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
  except errors.InputError:  # It made the runs fail, too.
    return "unknown"
  return f"{metadata['model']} of {metadata['num_classes']} classes"


def _read_summaries(workdirs) -> list[dict[str, Any]]:
  summaries = map(run_reader.read_summary, workdirs)
  return [summary for summary in summaries if summary is not None]


def _read_errors(workdirs) -> list[str]:
  return [
    f"seed {seed}: {(workdir / _ERROR).read_text().splitlines()[0]}"
    for seed, workdir in workdirs.items()
    if (workdir / _ERROR).exists() and not (workdir / _SUMMARY).exists()
  ]


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  if not isinstance(error, errors.Stop):
    text = f"{type(error).__name__}: {text}"
  # What is wrong stands first, and what would be right last.
  return text if len(text) <= 600 else f"{text[:300]} ... {text[-290:]}"


def _parse_shard(shard: str) -> slice:
  """Turn "I/N" into every N-th element, starting with the I-th."""
  index, _, count = shard.partition("/")
  if not (
    index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)
  ):
    raise errors.InputError(
      f"--shard={shard} must be I/N with I from 1 to N, such as 2/4"
    )
  return slice(int(index) - 1, None, int(count))


def _default_together() -> int:
  """Grouped convolutions, what vmapped ones become, are slow on CPU."""
  return 1 if jax.default_backend() == "cpu" else _SEEDS.value


if __name__ == "__main__":
  cli.run(main)
