"""Save and restore the whole state of a run, with Orbax.

A checkpoint appears under its iteration when all of it is written; one that a
kill cut short is never seen. A checksum tells what a disk has changed since.
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
  """A checkpoint cannot be read, or is not what was written."""


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for writes."""

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
      return  # The others are elsewhere: closing would wait for them.
    try:
      self._manager.close()
    except Exception as error:
      self._check_storage(error)
      raise

  def steps(self) -> list[int]:
    """Return the iterations that there are checkpoints of, in order."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: types.TrainState, progress: Mapping[str, Any]
  ) -> None:
    """Save in the background.

    Args:
      step: iterations done.
      state: what the iterations work on.
      progress: what the loop around them has to remember, JSON-able.

    Raises:
      errors.BadNumbersError: the state is not finite; nothing is saved.
      errors.StorageError: this checkpoint, or the one before, cannot be
        written.
    """
    _check_finite(step, state)
    content = {
      # A copy: it is written in the background.
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
      like: a state of the same shapes; what is restored has its shardings,
        whatever those of the checkpoint were.

    Returns:
      (state, progress).

    Raises:
      DamagedError: it cannot be read, or its checksum is wrong.
      errors.InputError: it is one of another network.
      errors.StorageError: the disk fails, which says nothing of the checkpoint.
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
    """Move a damaged checkpoint out of the way, and return where it went."""
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
    """Delete later checkpoints: what they hold will be computed again."""
    self._manager.wait_until_finished()
    for later in self.steps():
      if later > step:
        self._manager.delete(later)

  def _check_shapes(self, step, like):
    """Raise an InputError that names an array that differs."""
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
    """Raise a StorageError where that is what a failed write comes from."""
    if _is_of_storage(error):
      kept = self.steps()
      where = f"from iteration {kept[-1]}" if kept else "from the start"
      raise errors.StorageError(
        f"cannot write a checkpoint into {self._folder}: {_reason(error)}; make"
        f" room or mend that, and the same command goes on {where}"
      ) from error


def steps_in(folder: pathlib.Path) -> set[int]:
  """Return the iterations that a run has checkpoints of; it may have none."""
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
  """32 bits of the state's bits, wherever they lie, and of the progress."""
  words = [int(word) for word in jax.device_get(_sums_of_bits(state))]
  text = json.dumps([words, progress], sort_keys=True)
  return zlib.crc32(text.encode())


@jax.jit
def _sums_of_bits(tree):
  """Sum each array's bits, as unsigned integers that wrap around."""
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
  """Return whether it is the disk that failed."""
  if isinstance(error, OSError):
    return not isinstance(error, FileNotFoundError)
  return _error_number(error) not in (None, errno.ENOENT)


def _error_number(error):
  """The operating system's, which tensorstore tells in its text."""
  if isinstance(error, OSError):
    return error.errno
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return int(code[1]) if code else None


def _reason(error):
  """The part that tells, of what a library says, which may be a page."""
  while error.__cause__:
    error = error.__cause__
  if _is_of_storage(error) and (number := _error_number(error)):
    return os.strerror(number)
  # Tensorstore says the reason, and then [everything='that it was told'].
  said, *_ = re.split(r" \[\w+=", str(error))
  lines = [line.strip() for line in said.splitlines() if line.strip()]
  return lines[-1][-200:] if lines else type(error).__name__
