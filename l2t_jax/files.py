"""Atomic writes of files."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
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
    content: its new content; text is encoded as UTF-8.
    shared: whether several processes may write the file at the same time.

  Raises:
    OSError: the file cannot be written.
  """
  if isinstance(content, str):
    content = content.encode()
  path.parent.mkdir(parents=True, exist_ok=True)
  # Without a unique part in the name, the next write replaces the partial file
  # that a killed process left behind.
  unique = f".{uuid.uuid4().hex}" if shared else ""
  partial = path.with_name(f"{path.name}{unique}.partial")
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink()  # The disk may be full.
    raise


def check_place(path: pathlib.Path) -> None:
  """Check that a file can be written, before its content is computed.

  Creates parent folders.

  Raises:
    OSError: the file cannot be written.
  """
  if path.is_dir():
    raise IsADirectoryError(errno.EISDIR, "Is a directory")
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=path.parent):
    pass


@contextlib.contextmanager
def output_errors(path: pathlib.Path) -> Iterator[None]:
  """Context manager: turn an OSError into an InputError about an output.

  Args:
    path: the file that a user named.
  """
  try:
    yield
  except OSError as error:
    raise errors.InputError(
      f"cannot write {path}: {error.strerror}; choose another place"
    ) from error
