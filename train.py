"""Train one experiment.

    python train.py --config=configs/digits.py --workdir=runs/digits

A field is set as --config.field=value. The same command again resumes, or says
that the run is complete. With --plan it says what memory and time the run
would need, and trains nothing. On several machines, or in several processes of
one, each process gets the same command and --distributed.
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
    "--plan", action="store_true", help="say what the run would need"
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
  """Train, or plan, what the config says."""
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
