"""Show runs on one page: what was transferred where, and how well it worked.

    python -m l2t_jax.report RUN [RUN ...] --output=report.html

RUN is the folder of a run, finished or not, or a folder that is searched for
runs, such as that of a table. The page is a single file that works offline.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import pathlib

from l2t_jax import errors, files, quiet  # noqa: F401
import l2t_jax.config
from l2t_jax.results import html_report, run_reader
from l2t_jax.run import saliency_images
from l2t_jax.runtime import compilation, cpu_lowering


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument("runs", type=pathlib.Path, nargs="+", metavar="RUN")
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("report.html")
  )
  parser.add_argument(
    "--images", type=int, default=6, help="images with saliency; 0 for none"
  )
  parser.add_argument(
    "--reference",
    default="",
    metavar="METHOD",
    help="method that the others are compared with, seed by seed",
  )
  return parser


def main(args: argparse.Namespace) -> None:
  """Write the report of some runs."""
  if args.images < 0:
    raise errors.InputError(f"--images={args.images} must be 0 or more")
  compilation.use_cache()
  cpu_lowering.install()
  runs = find_runs(args.runs)
  with files.output_errors(args.output):
    files.check_place(args.output)  # Fail early, not after the work.
  methods = sorted({run.config["method"] for run in runs})
  if args.reference and args.reference not in methods:
    raise errors.InputError(
      f"--reference={args.reference} is the method of none of the runs; theirs"
      f" are {', '.join(methods)}"
    )
  content = make_page(runs, args.images, args.reference)
  with files.output_errors(args.output):
    files.write(args.output, content)
  print(f"wrote {args.output}")


def find_runs(folders: Sequence[pathlib.Path]) -> list[run_reader.Run]:
  """Read all runs in some folders; see `run_reader.find_runs`."""
  return run_reader.find_runs(folders, l2t_jax.config.FREE_FIELDS)


def make_page(
  runs: Sequence[run_reader.Run], num_images: int, reference: str = ""
) -> str:
  """Return the page of some runs.

  Args:
    runs: from `find_runs`.
    num_images: number of images with saliency.
    reference: method that the others are compared with; "" for none.
  """
  saliency: dict[str, saliency_images.Saliency | str] = {}
  learned = [run for run in runs if run.learned_channels and num_images]
  # The seeds of an experiment look alike: show the saliency of one of them.
  for run, *_ in run_reader.by_experiment(learned):
    try:
      saliency[run.name] = saliency_images.compute_saliency(run, num_images)
    except (errors.InputError, errors.StorageError) as error:
      saliency[run.name] = str(error)
  default = json.loads(l2t_jax.config.get_config().to_json())
  return html_report.make_page(
    runs, default_config=default, saliency=saliency, reference=reference
  )


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
