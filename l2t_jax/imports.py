"""Imports of what may be absent: optional packages, and users' own code."""

from __future__ import annotations

import importlib.util
from typing import Any

from l2t_jax import errors


def require(
  module: str, *, needed_for: str, package: str = "", otherwise: str = ""
) -> Any:
  """Import a module that is heavy or may be absent, when it is needed.

  Args:
    module: its name.
    needed_for: what cannot go on without it, for the message.
    package: what installs it, where that has another name.
    otherwise: what would do without it, for the message.

  Raises:
    errors.InputError: it is absent, or fails to be imported.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    alternative = f", or {otherwise}" if otherwise else ""
    raise errors.InputError(
      f"{needed_for} needs {module}: pip install"
      f" {package or module}{alternative} ({error})"
    ) from error


def is_installed(module: str) -> bool:
  """Return whether there is a module, without importing it."""
  spec = importlib.util.find_spec(module)
  return spec is not None and spec.origin is not None  # No mere folder.


def by_name(name: str, what: str) -> Any:
  """Import "package.module:attribute".

  Args:
    name: of the attribute; see above.
    what: for messages, such as "model".

  Raises:
    errors.InputError: there is no such thing.
  """
  module, _, attribute = name.partition(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except Exception as error:  # The module is a user's: it may raise anything.
    raise errors.InputError(
      f"cannot import the {what} {name!r}: {type(error).__name__}: {error}"
    ) from error
