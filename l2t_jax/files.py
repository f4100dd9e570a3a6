"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import tempfile
import uuid

from l2t_jax import errors


def write(
  path: pathlib.Path, content: str | bytes, *, shared: bool = False
) -> None:
  """Write a file atomically, creating parent folders.

  On failure the old file is left untouched.

  Args:
    path: the file.
    content: of the file.
    shared: whether several processes may write it at once.

  Raises:
    OSError: what the operating system says.
  """
  if isinstance(content, str):
    content = content.encode()
  path.parent.mkdir(parents=True, exist_ok=True)
  # One name where that is safe: what a killed process leaves is overwritten.
  unique = f".{uuid.uuid4().hex}" if shared else ""
  partial = path.with_name(f"{path.name}{unique}.partial")
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink()  # Of use to nobody, on a disk that may be full.
    raise


def check_place(path: pathlib.Path) -> None:
  """Find out before some work whether its result can be written.

  Raises:
    OSError: what the operating system says.
  """
  if path.is_dir():
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=path.parent):
    pass


@contextlib.contextmanager
def output_errors(path: pathlib.Path) -> Iterator[None]:
  """Turn an OSError met while writing what a user named into an InputError."""
  try:
    yield
  except OSError as error:
    raise errors.InputError(
      f"cannot write {path}: {error.strerror}; choose another place"
    ) from error
