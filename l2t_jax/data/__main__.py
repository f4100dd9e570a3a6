"""Inspect a data set before training.

    python -m l2t_jax.data PATH
    python -m l2t_jax.data --config=configs/stl10.py --config.data.path=...

PATH is a folder of images or an npz file, as in config.data.path; --config
describes any other data set. Every image is read. The report, as text or with
--json as JSON on stdout, lists the number of images per class, sizes, modes and
formats, images that occur in two parts or two classes, files that are not
images, and files that cannot be read. The exit code is 2 if a file cannot be
read.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich import console, markup, table

from l2t_jax import cli, data, errors
from l2t_jax.data import look, records
from l2t_jax.run import from_config

_MAX_LISTED = 20  # Lines printed per list; --json has all.


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument("path", nargs="?", default="", metavar="PATH")
  parser.add_argument("--config", default="", help="a config file")
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def main(args: argparse.Namespace, overrides: list[str]) -> int:
  """Print a summary of a data set; return the exit code."""
  if bool(args.path) == bool(args.config):
    raise errors.InputError("give a PATH or --config, one of the two")
  if args.config:
    config = cli.load_config(args.config, overrides)
    fields = from_config.data_fields(config)
  else:
    if overrides:
      raise errors.InputError(
        f"{overrides[0]} needs --config; leave it out, or give --config in"
        " place of PATH"
      )
    # Images are opened, but not resized or normalised: other fields are unused.
    source = "npz" if args.path.endswith(".npz") else "folder"
    fields = data.DataFields(
      source=source,
      path=args.path,
      image_size=1,
      channels=1,
      mean=(0.0,),
      std=(1.0,),
    )
  found = look.look(data.open_images(fields))
  if args.json:
    print(json.dumps(found, indent=2))
  else:
    _show(found)
  return errors.InputError.exit_code if found["unreadable"] else 0


def _show(found: dict[str, Any]) -> None:
  """Print the summary as text."""
  out = console.Console(highlight=False)
  counts = table.Table("class", *found["parts"])
  for name in found["classes"]:
    numbers = (part["classes"].get(name, 0) for part in found["parts"].values())
    counts.add_row(markup.escape(name), *map(str, numbers))
  counts.add_section()
  counts.add_row("all", *(str(p["images"]) for p in found["parts"].values()))
  out.print(counts)
  for name, part in found["parts"].items():
    common = [f"{_common(part['sizes'])} pixels", _common(part["modes"])]
    if part["formats"]:
      common.append(_common(part["formats"]))
    out.print(f"{name}: {'; '.join(common)}")
  if found["bit_depth"]:
    white = 2 ** found["bit_depth"] - 1
    out.print(f"images with more than 8 bits: {white} is white")
  for note in found["notes"]:
    out.print(note)
  if found["passed_over"]:
    out.print(f"ignored files: {records.counted(found['passed_over'])}")
  _list(
    out,
    "images with the same pixels",
    [
      " = ".join(f"{one['file']} ({one['part']}, {one['class']})" for one in g)
      for g in found["equal"]
    ],
  )
  _list(
    out,
    "files that cannot be read",
    [f"{one['file']} {one['reason']}" for one in found["unreadable"]],
  )


def _common(counts: dict[str, int]) -> str:
  """List the most common values with their counts."""
  names = [f"{name} ({number})" for name, number in counts.items()]
  return records.some_of(names)


def _list(out: console.Console, title: str, lines: list[str]) -> None:
  """Print a title, the number of lines, and the first lines."""
  if not lines:
    return
  out.print(f"{title} ({len(lines)}):")
  for line in lines[:_MAX_LISTED]:
    out.print(f"  {line}", markup=False, soft_wrap=True)
  if len(lines) > _MAX_LISTED:
    out.print(f"  and {len(lines) - _MAX_LISTED} more; --json lists all")


if __name__ == "__main__":
  cli.run(make_parser(), main)
