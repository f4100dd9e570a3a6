"""Arguments of the commands that read no config."""

from __future__ import annotations

import argparse
from typing import NoReturn

from l2t_jax import types


class Parser(argparse.ArgumentParser):
  """Says in one line what is wrong, as `types.errors_in_one_line` does."""

  def error(self, message: str) -> NoReturn:
    self.exit(types.InputError.exit_code, f"error: {message}; see --help\n")
