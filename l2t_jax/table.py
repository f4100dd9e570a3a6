r"""Train every cell of a table of methods, and print it.

    python -m l2t_jax.table --config=configs/stl10.py \
      --methods=scratch,fm_one_to_one,l2t_ww --seeds=3 --workdir=runs/table

A cell is a method with a config. Each of its seeds is a run as `train.py` makes
it, in the folder WORKDIR/COLUMN/METHOD/seedN. The same command again skips
finished runs, resumes interrupted ones and repeats failed ones. Several configs
make several columns (--config=configs/stl10.py,configs/cifar10.py), and so do
several values of a field (--sweep=data.per_class=5,10,50). --config.field=value
sets a field of all cells.

    --tune=transfer.beta=0.5,2 --tune=optimizer.learning_rate=0.02,0.1

chooses among these values for each cell independently, by the validation
accuracy of extra runs, before the seeds of the table train. Fields that a
method does not read are not tuned for it. The row fm_search has fixed pairs,
which are found in the same way, one pair after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
import functools
import pathlib

from l2t_jax import cli, data, errors
from l2t_jax.results import (
  map_picture,
  paper,
  run_reader,
  table_picture,
  tables,
)
from l2t_jax.run import cells as table_cells
from l2t_jax.run import from_config, tuning
from l2t_jax.runtime import run_folder, signals


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument(
    "--config", type=_names, required=True, help="config files, a column each"
  )
  parser.add_argument("--workdir", required=True, help="folder of the table")
  parser.add_argument(
    "--methods",
    type=_names,
    default=paper.METHODS,
    help="rows, values of config.method; all of the paper's by default",
  )
  parser.add_argument(
    "--seeds", type=_at_least(1), default=3, help="runs per cell (3)"
  )
  parser.add_argument(
    "--sweep",
    default="",
    metavar="FIELD=VALUE,VALUE,...",
    help="a column for each value of a field",
  )
  parser.add_argument(
    "--tune",
    action="append",
    default=[],
    metavar="FIELD=VALUE,VALUE,...",
    help="choose a field's value for each cell; repeatable, for combinations",
  )
  parser.add_argument(
    "--tune-seeds",
    type=_at_least(1),
    default=1,
    help="runs per combination of values (1)",
  )
  parser.add_argument(
    "--reference",
    default="",
    metavar="METHOD",
    help="row that the others are compared with, seed by seed",
  )
  parser.add_argument(
    "--shard",
    type=parse_shard,
    default="1/1",
    metavar="I/N",
    help="train the I-th of N shares of the runs, or, with --tune or fm_search,"
    " of the cells; I from 1 on",
  )
  parser.add_argument(
    "--together",
    type=_at_least(0),
    default=0,
    help="seeds of a cell that train at once; 0 (the default): one on a CPU,"
    " elsewhere all that fit",
  )
  return parser


def _names(text: str) -> list[str]:
  return [name.strip() for name in text.split(",")]


def _fields_set(sweep: str, overrides: Sequence[str]) -> list[str]:
  names = [override.partition("=")[0] for override in overrides]
  names = [name.lstrip("-").removeprefix("config.") for name in names]
  return [*names, sweep.partition("=")[0]]


def _at_least(least: int) -> Callable[[str], int]:
  def parse(text: str) -> int:
    if not text.isdigit() or int(text) < least:
      raise argparse.ArgumentTypeError(
        f"{text!r} must be a whole number from {least} on"
      )
    return int(text)

  return parse


def parse_shard(shard: str) -> slice:
  """Turn "I/N" into every N-th element, starting with the I-th."""
  index, _, count = shard.partition("/")
  if not (
    index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)
  ):
    raise argparse.ArgumentTypeError(
      f"{shard!r} must be I/N with I from 1 to N, such as 2/4"
    )
  return slice(int(index) - 1, None, int(count))


def main(args: argparse.Namespace, overrides: list[str]) -> int:
  """Train the runs that are not done yet.

  Returns:
    The exit code: 0, 1 if a run failed, 75 after SIGTERM or Ctrl-C.
  """
  if not args.workdir:
    raise errors.InputError("--workdir must name a folder")
  workdir = pathlib.Path(args.workdir)
  columns = table_cells.load_columns(args.config, args.sweep, overrides)
  cells = table_cells.make_cells(columns, args.methods, args.seeds, workdir)
  if args.reference and args.reference not in args.methods:
    raise errors.InputError(
      f"--reference={args.reference} is not in"
      f" --methods={','.join(args.methods)}"
    )
  if [args.reference] == args.methods:
    raise errors.InputError(
      f"--reference={args.reference} is the only row; name more --methods"
    )
  if args.sweep:
    table_cells.check_is_read("sweep", args.sweep.partition("=")[0], cells)
  say = table_cells.CONSOLE.print
  jobs: Iterable[table_cells.Cell]
  is_tuned = args.tune or any(cell.is_search for cell in cells)
  if args.tune_seeds > 1 and not is_tuned:
    raise errors.InputError(
      f"--tune-seeds={args.tune_seeds} is for trials; give --tune, too"
    )
  if is_tuned:
    tried = tuning.parse(args.tune, args.tune_seeds)
    tuning.check(tried, cells, _fields_set(args.sweep, overrides))
    mine = table_cells.interleave(cells)[args.shard]
    trials = sum(tuning.num_trials(cell, tried) for cell in mine)
    searches = sum(cell.is_search for cell in mine)
    more = f" and {searches} searches for pairs" if searches else ""
    say(f"{len(mine)} of {len(cells)} cells here; {trials} trials{more}")
    jobs = tuning.jobs(mine, tried, args.together)
  else:
    digest = functools.cache(data.digest)
    for cell in cells:  # Before anything is trained.
      if (cell.folder / run_reader.TUNING).exists():
        raise errors.InputError(
          f"{cell.folder} was tuned: give --tune as before, or use another"
          " --workdir"
        )
      from_config.check(cell.config, cell.workdirs, digest)
    jobs = table_cells.make_jobs(cells, args.together)[args.shard]
    runs = sum(len(job.workdirs) for job in jobs)
    say(f"{len(cells)} cells; {runs} runs to do here")
  run_folder.make(workdir)
  code, runner = 0, table_cells.Runner()
  try:
    with signals.StopRequests() as requests:
      for job in jobs:
        if requests.received():
          raise errors.Interrupted("asked to stop")
        if job.workdirs:
          runner.run(job)
          results = table_cells.results(cells)
          table_picture.write(workdir, results, args.reference)
  except errors.Interrupted as error:
    say("interrupted; the same command resumes")
    code = error.exit_code
  results = table_cells.results(cells)
  table_picture.write(workdir, results, args.reference)
  tables.print_table(results, args.reference)
  more = ", differences.png" if args.reference else ""
  say(f"saved as {workdir}/table.md, table.csv{more} and table.png")
  for cell in cells[::-1]:
    picture = next(iter(cell.workdirs.values())) / map_picture.FILE
    if picture.exists():
      say(f"what {cell.method} transferred where: {picture}")
      break
  return code or int(any(cell.errors for cell in results))


if __name__ == "__main__":
  cli.run(make_parser(), main)
