"""Save and restore the whole state of a run, with Orbax.

A checkpoint gets its final name, the iteration, once it is complete, so that an
incomplete one is never read. A checksum reveals later damage on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
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
  """The checkpoints of one run; the newest two are kept.

  A context manager, which waits for unfinished writes when it exits.
  """

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
    if error and not distributed.is_raised_by_all(error):
      return  # Closing would wait for the other processes.
    with self._write_errors():
      self._manager.close()

  def steps(self) -> list[int]:
    """Return the iterations that have a checkpoint, in ascending order."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: types.TrainState, progress: Mapping[str, Any]
  ) -> None:
    """Save in the background.

    Args:
      step: iterations done.
      state: parameters, optimizer states and batch statistics.
      progress: state of the training loop, serializable as JSON.

    Raises:
      errors.BadNumbersError: the state is not finite; nothing is saved.
      errors.StorageError: this checkpoint or the previous one cannot be
        written.
    """
    _check_finite(step, state)
    content = {
      # Copied, because the caller changes it during the background write.
      "progress": copy.deepcopy(dict(progress)),
      "checksum": _checksum(state, progress),
    }
    with self._write_errors():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          progress=ocp.args.JsonSave(content),
        ),
      )
    _forget_shards(state)

  def restore(
    self,
    step: int,
    like: types.TrainState,
    *,
    advice: str = "use another --workdir",
  ) -> tuple[types.TrainState, dict[str, Any]]:
    """Restore a checkpoint.

    Args:
      step: one of `steps`.
      like: a state with the checkpoint's shapes and with the shardings for the
        restored state.
      advice: what to do about a checkpoint of another network.

    Returns:
      (state, progress).

    Raises:
      DamagedError: the checkpoint cannot be read, or its checksum is wrong.
      errors.InputError: the checkpoint belongs to another network.
      errors.StorageError: the disk fails; the checkpoint may be intact.
    """
    self._manager.wait_until_finished()
    reason = ""
    try:
      self._check_shapes(step, like, advice)
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
      if isinstance(error, errors.Stop) or distributed.is_process_loss(error):
        raise
      mend = "mend that, and the same command goes on from it"
      if _is_storage_error(error):
        raise errors.StorageError(
          f"cannot read the checkpoint {self._path(step)}: {_reason(error)};"
          f" {mend}"
        ) from error
      if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise errors.Stop(
          f"not enough memory to read the checkpoint {self._path(step)}:"
          f" {_reason(error)}; {mend}"
        ) from error
      reason = _reason(error)
    # All processes must raise, or the others would wait in a collective.
    if not distributed.is_true_for_all(not reason):
      raise DamagedError(reason or "another process cannot read it")
    state = restored["state"]
    if _checksum(state, progress) != checksum:
      raise DamagedError("its checksum is wrong")
    return state, progress

  def shapes(self, step: int, sharding: jax.sharding.Sharding) -> Any:
    """Return the shapes of a checkpoint's arrays, for `like` of `restore`.

    Args:
      step: one of `steps`.
      sharding: the sharding of every restored array.

    Returns:
      Nested dicts and lists, keyed by the field names of `types.TrainState`.

    Raises:
      DamagedError: the checkpoint cannot be read.
    """
    try:
      stored = self._manager.item_metadata(step)["state"].tree
    except Exception as error:  # Orbax raises errors of many types.
      raise DamagedError(_reason(error)) from error
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      stored,
    )

  def set_aside(self, step: int) -> pathlib.Path:
    """Move a damaged checkpoint out of the way and return its new path."""
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
    """Delete the checkpoints of later iterations, which are trained again."""
    self._manager.wait_until_finished()
    for later in self.steps():
      if later > step:
        self._manager.delete(later)

  def _check_shapes(self, step, like, advice):
    """Raise an InputError if a shape differs from the checkpoint's."""
    stored = self._manager.item_metadata(step)["state"].tree
    shapes = lambda tree: {
      "/".join(path): list(leaf.shape)
      for path, leaf in ocp.tree.to_flat_dict(tree).items()
      if hasattr(leaf, "shape")
    }
    found, expected = shapes(stored), shapes(like)
    for name in found | expected:
      if found.get(name) != expected.get(name):
        raise errors.InputError(
          f"checkpoint {self._path(step)} is of another network: {name} is"
          f" {found.get(name, 'missing')} in it,"
          f" {expected.get(name, 'missing')} in this run; {advice}"
        )

  def _path(self, step):
    return self._folder / str(step)

  @contextlib.contextmanager
  def _write_errors(self) -> Iterator[None]:
    """Turn an error of the disk during a write into a StorageError."""
    try:
      yield
    except Exception as error:
      if not _is_storage_error(error):
        raise
      kept = self.steps()
      where = f"from iteration {kept[-1]}" if kept else "from the start"
      raise errors.StorageError(
        f"cannot write a checkpoint into {self._folder}: {_reason(error)}; make"
        f" room or mend that, and the same command resumes {where}"
      ) from error


def steps_in(folder: pathlib.Path) -> set[int]:
  """Return the iterations that have a checkpoint in a folder, if any."""
  return set(ocp.utils.checkpoint_steps(folder)) if folder.exists() else set()


def _forget_shards(tree):
  """Break the cycles that Orbax leaves in the arrays that it saves.

  It reads `addressable_shards`, which JAX (0.10.1) caches in the array; the
  shard of an array on one device is the array itself. On CPU, a state that is
  donated during the background write is copied, and would stay allocated until
  Python's garbage collector finds the cycle.
  """
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, jax.Array):
      leaf.__dict__.pop("addressable_shards", None)


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
  def is_finite(path, leaf):
    # Constants of the model state may be -inf, as those of attention masks are.
    is_state = jax.tree_util.GetAttrKey("model_state") in path
    return jnp.all(jnp.isfinite(leaf) | (is_state & (leaf == -jnp.inf)))

  return jax.tree.map_with_path(is_finite, tree)


def _checksum(state, progress):
  """CRC-32 of the state and progress, independent of how arrays are sharded."""
  words = [int(word) for word in jax.device_get(_sums_of_bits(state))]
  text = json.dumps([words, progress], sort_keys=True)
  return zlib.crc32(text.encode())


@jax.jit
def _sums_of_bits(tree):
  # Ordered by name, because `restore` may return dicts for named tuples.
  leaves = ocp.tree.to_flat_dict(tree)
  return [_sum_of_bits(leaves[path]) for path in sorted(leaves)]


def _sum_of_bits(leaf):
  """Sum the bits of an array as unsigned 32-bit integers that wrap around."""
  if jnp.iscomplexobj(leaf):
    leaf = jnp.stack([leaf.real, leaf.imag])
  if leaf.dtype == bool:
    leaf = leaf.astype(jnp.uint8)
  # An element of 64 bits becomes two words of 32 bits.
  unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
  words = jax.lax.bitcast_convert_type(leaf, unsigned)
  return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def _is_storage_error(error):
  """Return whether the disk is the cause of an error."""
  if isinstance(error, OSError):
    return not isinstance(error, FileNotFoundError)
  return _error_number(error) not in (None, errno.ENOENT)


def _error_number(error):
  """Return the system's error number; TensorStore has it in its message."""
  if isinstance(error, OSError):
    return error.errno
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return int(code[1]) if code else None


def _reason(error):
  """Extract the cause from a library's error, which may be a page long."""
  while error.__cause__:
    error = error.__cause__
  if _is_storage_error(error) and (number := _error_number(error)):
    return os.strerror(number)
  # TensorStore appends [key='value', ...] to the cause.
  text, *_ = re.split(r" \[\w+=", str(error))
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return lines[-1][-200:] if lines else type(error).__name__
