"""Imports that can fail: optional packages and the user's own modules."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import importlib.util
import sys
from typing import Any

from l2t_jax import errors


def require(
  module: str, *, needed_for: str, package: str = "", otherwise: str = ""
) -> Any:
  """Import an optional or slow module when it is needed.

  Args:
    module: the module's name.
    needed_for: the feature that needs the module, for the error message.
    package: the package to install, if it has another name than the module.
    otherwise: the alternative to installing the module, for the error message.

  Raises:
    errors.InputError: the module is not installed or cannot be imported.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    alternative = f", or {otherwise}" if otherwise else ""
    raise errors.InputError(
      f"{needed_for} needs {module}: pip install"
      f" {package or module}{alternative} ({error})"
    ) from error


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
  """Context manager: hide a module, unless it has been imported before.

  For libraries that import a slow module that they do not need.
  """
  if module in sys.modules:
    yield
    return
  sys.modules[module] = None  # type: ignore[assignment]  # Import fails then.
  try:
    yield
  finally:
    del sys.modules[module]


def is_installed(module: str) -> bool:
  """Return whether a module is installed, without importing it."""
  spec = importlib.util.find_spec(module)
  # A plain folder of that name in the working directory has no origin.
  return spec is not None and spec.origin is not None


def by_name(name: str, what: str) -> Any:
  """Import "package.module:attribute".

  Args:
    name: "package.module:attribute".
    what: what the attribute is, such as "model", for the error message.

  Raises:
    errors.InputError: the module cannot be imported or has no such attribute.
  """
  module, _, attribute = name.partition(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except Exception as error:  # A user's module may raise anything.
    raise errors.InputError(
      f"cannot import the {what} {name!r}: {type(error).__name__}: {error}"
    ) from error
