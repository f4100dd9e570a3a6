from __future__ import annotations

import argparse
import pathlib

from l2t_jax import errors, files
from l2t_jax.results import html_report, run_reader
from l2t_jax.runtime import compilation, cpu_lowering


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", type=pathlib.Path, nargs="+", metavar="RUN")
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("report.html")
  )
  parser.add_argument(
    "--images", type=int, default=6, help="to show saliency of (6); 0: none"
  )
  return parser


def main(args: argparse.Namespace) -> None:
  """Write the report of some runs."""
  if args.images < 0:
    raise errors.InputError(f"--images={args.images} must be 0 or more")
  compilation.use_cache()
  cpu_lowering.install()
  runs = run_reader.find_runs(args.runs)
  with files.output_errors(args.output):
    files.check_place(args.output)  # Before the work.
  content = html_report.make_page(runs, args.images)
  with files.output_errors(args.output):
    files.write(args.output, content)
  print(f"wrote {args.output}")


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
