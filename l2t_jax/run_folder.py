"""The folder of a run: who may use it, and its JSON files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import errno
import json
import pathlib
import tempfile
from typing import Any

import flax
import ml_collections

from l2t_jax import data, defaults, files, processes, types

# Fields that may differ between a run and its resumption.
FREE_FIELDS = (
  "bad_numbers",
  "shard_params",
  "log_every",
  "checkpoint_every",
  "checkpoint_steps",
  "trackers",
  "data.num_workers",
)
# What the operating system says where a folder cannot be written.
_STORAGE_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
)


def make(workdir: pathlib.Path) -> None:
  """Make the folder of a run.

  Raises:
    types.InputError: there is a file in its place.
    types.StorageError: nothing can be written into it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    in_place = isinstance(error, FileExistsError | NotADirectoryError)
    stop = types.InputError if in_place else types.StorageError
    raise stop(
      f"cannot use --workdir={workdir}: {error.strerror}; give a folder that"
      " can be written"
    ) from error


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Let no other run into a folder until this one has ended.

  Raises:
    types.InputError: another one is in it.
  """
  if not processes.is_first():
    yield
    return
  with (workdir / ".lock").open("a") as file:
    _lock_file(file, workdir)
    yield


def _lock_file(file, workdir):
  try:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise types.InputError(
      f"another process is training in {workdir}; wait for its end or use"
      " another --workdir"
    ) from error
  except (ImportError, OSError):
    pass  # A system or a file system without such locks.


@contextlib.contextmanager
def storage_errors(workdirs: Sequence[pathlib.Path]) -> Iterator[None]:
  """Turn what the system says of files in some folders into a StorageError."""
  try:
    yield
  except types.Stop:
    raise
  except OSError as error:
    files = pathlib.Path(str(error.filename)).absolute().parents
    is_ours = any(workdir.absolute() in files for workdir in workdirs)
    # A full disk, met while writing into an open file, has no name.
    if error.errno not in _STORAGE_ERRORS or (error.filename and not is_ours):
      raise
    place = error.filename or f"into {', '.join(map(str, workdirs))}"
    raise types.StorageError(
      f"cannot write {place}: {error.strerror}; make room or mend that, and the"
      " same command goes on from the last checkpoint"
    ) from error


def check_same_config(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
  """Make sure that a folder, if there is one, holds a run of this config.

  Raises:
    types.InputError: naming the fields that differ.
  """
  path = workdir / "config.json"
  if not path.exists():
    return
  old = comparable(read_json(path))
  new = comparable(json.loads(config.to_json()))
  differences = [
    f"{field} was {old.get(field)!r}, is {new.get(field)!r}"
    for field in new | old
    if old.get(field) != new.get(field) and field not in FREE_FIELDS
  ]
  if differences:
    raise types.InputError(
      f"{workdir} holds a run of another config: {'; '.join(differences)};"
      " use another --workdir"
    )


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a config by their dotted names, as they work.

  Runs of before a field existed were what its default is.
  """
  usual = json.loads(defaults.get_config().to_json())
  fields = _flatten(usual) | _flatten(dict(config))
  fields["data.eval_resize"] = data.resized_for_evaluation(
    fields["data.image_size"], fields["data.eval_resize"]
  )
  return fields


def write_json(path: pathlib.Path, content: Any) -> None:
  """Write a file, all or nothing, in the process that writes."""
  if processes.is_first():
    files.write(path, json.dumps(content, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
  """Read a file; raise `types.InputError` where it is damaged."""
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise types.InputError(
      f"{path} is damaged ({error}); mend or delete it, or use another"
      " --workdir"
    ) from error


def _flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(nested, sep=".")
