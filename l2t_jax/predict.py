"""Classify images with the target of a finished run.

    python -m l2t_jax.predict RUN IMAGES... > predictions.csv

RUN is the folder of a run, or its target.safetensors; IMAGES are files, and
folders that are searched with their subfolders. The table has the columns
image, class and probability.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import csv
import io
import pathlib
import sys

from l2t_jax import errors
from l2t_jax.data import from_folders, records
from l2t_jax.run import predictor
from l2t_jax.runtime import cpu_lowering


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument("run", type=pathlib.Path)
  parser.add_argument("images", type=pathlib.Path, nargs="+")
  return parser


def main(args: argparse.Namespace) -> None:
  """Print the class of each image as CSV."""
  cpu_lowering.install()
  paths = find_images(args.images)
  trained = predictor.load(args.run)
  if isinstance(sys.stdout, io.TextIOWrapper):
    # Names of files may be in any encoding.
    sys.stdout.reconfigure(errors="surrogateescape")
  table = csv.writer(sys.stdout)
  table.writerow(("image", "class", "probability"))
  for path, name, probability in trained.classify(paths):
    table.writerow((path, name, f"{probability:.4f}"))


def find_images(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """List image files: the given files, and the sorted files of given folders.

  Raises:
    errors.InputError: a path does not exist, or a folder has no images.
  """
  found: list[pathlib.Path] = []
  for path in paths:
    if path.is_dir():
      images, others = from_folders.list_images(path)
      found += images
      if others:
        passed_over = records.counted(others)
        print(f"{path}: passed over {passed_over}", file=sys.stderr)
    elif path.exists():
      found.append(path)
    else:
      raise errors.InputError(f"there is no image or folder {path}")
  return found


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
