"""Errors that end a run or a command, each with its exit code."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import contextlib
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
  """Says in one line what is wrong, as `errors.errors_in_one_line` does."""

  def error(self, message: str) -> NoReturn:
    self.exit(InputError.exit_code, f"error: {message}; see --help\n")


class Stop(Exception):
  """A run cannot begin or go on; the message says why, in one line.

  `train.py` and the package's commands print it without a traceback and exit
  with `exit_code`, by which a scheduler can tell whether to start them again.
  """

  exit_code = 1
  # Whether all processes of a run meet it, at the same iteration.
  meets_all_processes = False


class InputError(Stop, ValueError):
  """The user's input is wrong; the message says what would be right."""

  exit_code = 2


class BadNumbersError(Stop, ArithmeticError):
  """A loss, a gradient or a weight is NaN or infinite."""

  exit_code = 3
  meets_all_processes = True


class StorageError(Stop, OSError):
  """Something could not be written: the disk is full, or only to be read."""

  exit_code = 4


class LostProcessError(Stop):
  """Another process of the run ended or no longer answers."""

  exit_code = 5


class Interrupted(Stop):
  """A signal asked the run to leave; it saved, and the same command goes on."""

  exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again.
  meets_all_processes = True


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
  """Turn a `Stop` into one line on stderr and its exit code."""
  try:
    yield
  except Stop as stop:
    print(f"error: {stop}", file=sys.stderr)
    sys.exit(stop.exit_code)
