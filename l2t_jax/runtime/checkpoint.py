"""Save and restore the whole state of a run, with Orbax.

A checkpoint appears under its iteration once it is complete, so that one that a
kill cut short is never read. A checksum reveals later changes on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
import copy
import errno
import json
import os
import pathlib
import re
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from l2t_jax import errors, types
from l2t_jax.runtime import distributed


class DamagedError(Exception):
  """A checkpoint cannot be read, or its checksum is wrong."""


class Checkpoints:
  """Context manager: the checkpoints of one run; it waits for writes."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder.absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(max_to_keep=2),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "progress": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, _, error: BaseException | None, traceback) -> None:
    if error and not distributed.is_found_by_all(error):
      return  # Closing would wait for the other processes.
    try:
      self._manager.close()
    except Exception as error:
      self._check_storage(error)
      raise

  def steps(self) -> list[int]:
    """Return the iterations that have a checkpoint, in order."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: types.TrainState, progress: Mapping[str, Any]
  ) -> None:
    """Save in the background.

    Args:
      step: iterations done.
      state: parameters, optimizer states and batch statistics.
      progress: what the training loop has to remember, as JSON.

    Raises:
      errors.BadNumbersError: the state is not finite; nothing is saved.
      errors.StorageError: this checkpoint, or the one before, cannot be
        written.
    """
    _check_finite(step, state)
    content = {
      # A copy, because it is written in the background.
      "progress": copy.deepcopy(dict(progress)),
      "checksum": _checksum(state, progress),
    }
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          progress=ocp.args.JsonSave(content),
        ),
      )
    except Exception as error:
      self._check_storage(error)
      raise

  def restore(
    self, step: int, like: types.TrainState
  ) -> tuple[types.TrainState, dict[str, Any]]:
    """Restore a checkpoint.

    Args:
      step: one of `steps`.
      like: a state with the shapes of the checkpoint, and with the shardings
        that the restored state gets.

    Returns:
      (state, progress).

    Raises:
      DamagedError: it cannot be read, or its checksum is wrong.
      errors.InputError: it belongs to another network.
      errors.StorageError: the disk fails; the checkpoint may be good.
    """
    self._manager.wait_until_finished()
    reason = ""
    try:
      self._check_shapes(step, like)
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(like),
          progress=ocp.args.JsonRestore(),
        ),
      )
      content = restored["progress"]
      checksum, progress = content["checksum"], content["progress"]
    except Exception as error:
      if isinstance(error, errors.Stop) or distributed.is_of_another(error):
        raise
      if _is_of_storage(error):
        raise errors.StorageError(
          f"cannot read the checkpoint {self._path(step)}: {_reason(error)};"
          " mend that, and the same command goes on from it"
        ) from error
      reason = _reason(error)
    if not distributed.is_true_for_all(not reason):
      raise DamagedError(reason or "another process cannot read it")
    state = restored["state"]
    if _checksum(state, progress) != checksum:
      raise DamagedError("its checksum is wrong")
    return state, progress

  def set_aside(self, step: int) -> pathlib.Path:
    """Move a damaged checkpoint out of the way, and return its new path."""
    place = self._folder.with_name(f"damaged_checkpoint_{step}")
    if distributed.is_first():
      number = 1
      while place.exists():
        number += 1
        place = place.with_name(f"damaged_checkpoint_{step}_{number}")
      self._path(step).rename(place)
    distributed.wait_for_all(f"set aside {step}")
    self._manager.reload()
    return place

  def drop_after(self, step: int) -> None:
    """Delete checkpoints of later iterations, which will be repeated."""
    self._manager.wait_until_finished()
    for later in self.steps():
      if later > step:
        self._manager.delete(later)

  def _check_shapes(self, step, like):
    """Raise an InputError that names the first array that differs."""
    stored = self._manager.item_metadata(step)["state"].tree
    shapes = lambda tree: {
      "/".join(path): leaf.shape
      for path, leaf in ocp.tree.to_flat_dict(tree).items()
      if hasattr(leaf, "shape")
    }
    found, expected = shapes(stored), shapes(like)
    for name in found | expected:
      if found.get(name) != expected.get(name):
        raise errors.InputError(
          f"checkpoint {self._path(step)} is of another network: {name} is"
          f" {_shape(found, name)} in it, {_shape(expected, name)} in this run;"
          " use another --workdir"
        )

  def _path(self, step):
    return self._folder / str(step)

  def _check_storage(self, error):
    """Raise a StorageError if the disk is why a write failed."""
    if _is_of_storage(error):
      kept = self.steps()
      where = f"from iteration {kept[-1]}" if kept else "from the start"
      raise errors.StorageError(
        f"cannot write a checkpoint into {self._folder}: {_reason(error)}; make"
        f" room or mend that, and the same command goes on {where}"
      ) from error


def steps_in(folder: pathlib.Path) -> set[int]:
  """Return the iterations that have a checkpoint in a folder."""
  if not folder.exists():
    return set()
  with Checkpoints(folder) as checkpoints:
    return set(checkpoints.steps())


def _shape(shapes, name):
  return list(shapes[name]) if name in shapes else "missing"


def _check_finite(step, state):
  for path, is_finite in jax.tree.leaves_with_path(
    jax.device_get(_are_finite(state))
  ):
    if not is_finite:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise errors.BadNumbersError(
        f"{name} is not finite after iteration {step}"
      )


@jax.jit
def _are_finite(tree):
  return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)


def _checksum(state, progress):
  """CRC-32 of the state and progress, independent of how arrays are sharded."""
  words = [int(word) for word in jax.device_get(_sums_of_bits(state))]
  text = json.dumps([words, progress], sort_keys=True)
  return zlib.crc32(text.encode())


@jax.jit
def _sums_of_bits(tree):
  """Sum the bits of each array as unsigned integers that wrap around."""
  return [_sum_of_bits(leaf) for leaf in jax.tree.leaves(tree)]


def _sum_of_bits(leaf):
  if jnp.iscomplexobj(leaf):
    leaf = jnp.stack([leaf.real, leaf.imag])
  if leaf.dtype == bool:
    leaf = leaf.astype(jnp.uint8)
  unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
  words = jax.lax.bitcast_convert_type(leaf, unsigned)
  return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def _is_of_storage(error):
  """Return whether an error comes from the disk."""
  if isinstance(error, OSError):
    return not isinstance(error, FileNotFoundError)
  return _error_number(error) not in (None, errno.ENOENT)


def _error_number(error):
  """Return the system's error number, also from tensorstore's text."""
  if isinstance(error, OSError):
    return error.errno
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return int(code[1]) if code else None


def _reason(error):
  """Extract the reason from a library's error, which may be a page long."""
  while error.__cause__:
    error = error.__cause__
  if _is_of_storage(error) and (number := _error_number(error)):
    return os.strerror(number)
  # Tensorstore appends [key='value', ...] to the reason.
  said, *_ = re.split(r" \[\w+=", str(error))
  lines = [line.strip() for line in said.splitlines() if line.strip()]
  return lines[-1][-200:] if lines else type(error).__name__
