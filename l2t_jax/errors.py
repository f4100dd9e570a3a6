"""Errors that end a run or a command, each with its exit code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
import contextlib
import os
import re
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
  """Argument parser that reports a wrong command line in one line on stderr."""

  def __init__(self, description: str | None):
    spec = sys.modules["__main__"].__spec__
    super().__init__(
      prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def parse_known_args(self, args=None, namespace=None):  # type: ignore
    """Parse arguments as argparse does, with ~ for the home folder.

    A shell expands it in `~/runs`, but not in `--workdir=~/runs`.
    """
    arguments = []
    for argument in sys.argv[1:] if args is None else args:
      match = re.match(r"(--\w+=)?(?=~(/|$))", argument)
      start = match.end() if match else len(argument)
      arguments.append(argument[:start] + os.path.expanduser(argument[start:]))
    return super().parse_known_args(arguments, namespace)

  def error(self, message: str) -> NoReturn:
    self.exit(InputError.exit_code, f"error: {message}; see --help\n")


class Stop(Exception):
  """A run cannot start or continue; the message gives the reason in one line.

  `train.py` and the package's commands print the message without a traceback
  and exit with `exit_code`, which tells a scheduler whether to restart them.
  """

  exit_code = 1
  # True if every process raises this error at the same iteration, so that none
  # is left waiting.
  meets_all_processes = False


class InputError(Stop, ValueError):
  """The user's input is wrong; the message says what to do."""

  exit_code = 2


class BadNumbersError(Stop, ArithmeticError):
  """A loss, a gradient or a weight is NaN or infinite."""

  exit_code = 3
  meets_all_processes = True


class StorageError(Stop, OSError):
  """A file cannot be read or written: the disk is full, read-only or broken."""

  exit_code = 4


class LostProcessError(Stop):
  """Another process of the run ended or stopped responding."""

  exit_code = 5


class Interrupted(Stop):
  """A signal ended the run after it saved; the same command resumes it."""

  exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again.
  meets_all_processes = True


def in_one_line(error: BaseException) -> str:
  """Return an error's message in one line of at most about 600 characters.

  It starts with the type of the error, unless the error is a `Stop`.
  """
  text = " ".join(str(error).split())
  if not isinstance(error, Stop):
    text = f"{type(error).__name__}: {text}"
  # Keep both ends: a message starts with the problem and ends with the advice.
  return text if len(text) <= 600 else f"{text[:300]} ... {text[-290:]}"


def first_line(error: BaseException) -> str:
  """Return an error's type and the first 300 characters of its first line.

  Some libraries raise errors of several pages, whose first line is the cause.
  """
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:300]}"


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
  """Context manager: print a `Stop` in one line and exit with its code."""
  try:
    yield
  except Stop as stop:
    print(f"error: {stop}", file=sys.stderr)
    sys.exit(stop.exit_code)


def run_command(
  parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], object]
) -> None:
  """Run `main` with the parsed command line; report a `Stop` in one line."""
  args = parser.parse_args()
  with errors_in_one_line():
    main(args)
