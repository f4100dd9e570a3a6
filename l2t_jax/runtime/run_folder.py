"""The folder of a run: its lock, its JSON files, and errors of the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import errno
import json
import pathlib
from typing import Any

from l2t_jax import errors, files
from l2t_jax.runtime import distributed

CONFIG = "config.json"
CONTENTS = "contents.json"  # Maps fields that are paths to digests.
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TARGET = "target.safetensors"
SUMMARY = "summary.json"  # Of a complete run.
ERROR = "error.txt"  # Why a run of a table failed.
# What the operating system reports when a folder cannot be written.
_STORAGE_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
)


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
  """Read the records of a run's `metrics.jsonl`.

  An incomplete last line, which an interrupted run may leave, is dropped.

  Args:
    workdir: the folder of the run.

  Returns:
    One dict per line, in the file's order.

  Raises:
    errors.InputError: the file is missing, or a line is not a JSON object.
  """
  path = pathlib.Path(workdir) / METRICS
  if not path.is_file():
    raise errors.InputError(
      f"{path} does not exist; name the folder of a run that was started"
    )
  lines = path.read_bytes().split(b"\n")
  records = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      if not isinstance(record, dict):
        raise ValueError("it is not an object")
    except ValueError as error:
      if number == len(lines):
        break  # A crash can cut the last line short.
      raise errors.InputError(
        f"{path}, line {number}: not a JSON object ({error}); mend or delete"
        " that line"
      ) from error
    records.append(record)
  return records


def make(workdir: pathlib.Path) -> None:
  """Make the folder of a run and check that it can be written.

  Raises:
    errors.InputError: there is a file of that name.
    errors.StorageError: the folder cannot be made or written.
  """
  try:
    files.check_place(workdir / METRICS)
  except OSError as error:
    is_file = isinstance(error, FileExistsError | NotADirectoryError)
    stop = errors.InputError if is_file else errors.StorageError
    raise stop(
      f"cannot use --workdir={workdir}: {error.strerror}; give a folder that"
      " can be written"
    ) from error


class LockedError(errors.InputError):
  """Another process is training in the folder."""


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Context manager: lock a folder, so that only one run trains in it.

  Raises:
    LockedError: another run holds the lock.
  """
  with contextlib.ExitStack() as stack:
    if distributed.is_first():
      file = stack.enter_context((workdir / ".lock").open("a"))
      try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise LockedError(
          f"another process is training in {workdir}; wait until it ends or use"
          " another --workdir"
        ) from error
      except (ImportError, OSError):
        pass  # Some systems and file systems have no locks.
    yield


@contextlib.contextmanager
def storage_errors(workdirs: Sequence[pathlib.Path]) -> Iterator[None]:
  """Context manager: turn an OSError about a run's folder into a StorageError.

  Args:
    workdirs: the folders of the runs.

  Raises:
    errors.StorageError: a file in a folder cannot be written.
  """
  try:
    yield
  except errors.Stop:
    raise
  except OSError as error:
    folders = pathlib.Path(str(error.filename)).absolute().parents
    is_ours = any(workdir.absolute() in folders for workdir in workdirs)
    # An error while writing into an open file has no file name.
    if error.errno not in _STORAGE_ERRORS or (error.filename and not is_ours):
      raise
    place = error.filename or f"into {', '.join(map(str, workdirs))}"
    raise errors.StorageError(
      f"cannot write {place}: {error.strerror}; make room or mend that, and the"
      " same command resumes from the last checkpoint"
    ) from error


def write_json(path: pathlib.Path, content: Any) -> None:
  """Write a JSON file atomically; processes other than 0 do nothing."""
  if distributed.is_first():
    files.write(path, json.dumps(content, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
  """Read a JSON file of a run; None if it does not exist.

  Raises:
    errors.InputError: the file is not JSON.
  """
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise errors.InputError(
      f"{path} is damaged ({error}); mend or delete it, or use another"
      " --workdir"
    ) from error
