"""Train one experiment.

    python train.py --config=configs/digits.py --workdir=runs/digits

A field is set as --config.field=value. Running the same command again resumes
the run, or reports that it is complete. --plan estimates the memory and time of
the run without training. On several machines, or with several processes on one
machine, start each process with the same command and --distributed.
"""

from __future__ import annotations

import argparse

from l2t_jax import cli, errors
from l2t_jax.run import from_config, plan
from l2t_jax.runtime import distributed


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument(
    "--config", required=True, help="config file, or config.json of a run"
  )
  parser.add_argument("--workdir", help="folder of the run")
  parser.add_argument(
    "--plan", action="store_true", help="estimate memory and time"
  )
  parser.add_argument(
    "--distributed",
    action="store_true",
    help="this is one of several processes; Slurm, Open MPI, Kubernetes or a"
    " TPU pod says which, elsewhere the next three arguments do",
  )
  parser.add_argument("--coordinator", help="HOST:PORT of process 0")
  parser.add_argument("--num_processes", type=int)
  parser.add_argument("--process_id", type=int, help="from 0")
  return parser


def main(args: argparse.Namespace, overrides: list[str]) -> None:
  """Train the experiment of the config, or plan it."""
  if not (args.workdir or args.plan):
    raise errors.InputError("--workdir must name a folder")
  place = (args.coordinator, args.num_processes, args.process_id)
  if args.distributed or place != (None, None, None):
    distributed.start(*place)
  with distributed.exit_together():
    config = cli.load_config(args.config, overrides)
    if args.plan:
      from_config.check(config)
      plan.show(plan.make(from_config.resolve(config)))
    else:
      from_config.train_and_evaluate(config, {config.seed: args.workdir})


if __name__ == "__main__":
  cli.run(make_parser(), main)
