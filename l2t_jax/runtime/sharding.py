"""Shardings over a mesh of devices with one axis.

Batches are split over the devices; other arrays are replicated or split. Under
`jax.jit` losses and batch statistics are those of the global batch, unless the
target normalises groups of it, and XLA inserts the collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from l2t_jax import errors, types

_AXIS = "data"
# Replicate arrays with fewer elements: a collective costs more than it saves.
_MIN_SPLIT_SIZE = 2**12


def make_mesh(
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Make a mesh with one axis of devices, by default those of all processes."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),),
    (_AXIS,),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Return the sharding of a replicated array."""
  return NamedSharding(mesh, PartitionSpec())


def along(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
  """Return the sharding of an array that is split along one axis."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, _AXIS))


def replicate(tree: types.PyTree, mesh: jax.sharding.Mesh) -> types.PyTree:
  """Choose shardings that replicate all arrays; one sharding per array."""
  return jax.tree.map(lambda _: replicated(mesh), tree)


def on_host() -> contextlib.AbstractContextManager[Any]:
  """Context manager: allocate new arrays in host memory.

  Raises:
    errors.InputError: JAX was told not to use the CPU.
  """
  try:
    device, *_ = jax.local_devices(backend="cpu")
  except RuntimeError as error:
    raise errors.InputError(
      "config.shard_params makes parameters on the CPU, which JAX was told not"
      " to use; add cpu to JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu"
    ) from error
  return jax.default_device(device)


def split(
  tree: types.PyTree, mesh: jax.sharding.Mesh, min_size: int = _MIN_SPLIT_SIZE
) -> types.PyTree:
  """Choose shardings that spread arrays over the devices.

  Args:
    tree: arrays, or their shapes.
    mesh: from `make_mesh`.
    min_size: arrays with fewer elements are replicated.

  Returns:
    One sharding per array: along its longest axis that is divisible by the
    number of devices, or replicated if there is none.
  """

  def choose(array):
    divisible = [n if n % mesh.size == 0 else 0 for n in array.shape]
    if array.size < min_size or not any(divisible):
      return replicated(mesh)
    axis = int(np.argmax(divisible))
    return along(mesh, axis)

  return jax.tree.map(choose, tree)


def with_shardings(
  shapes: types.PyTree, shardings: types.PyTree
) -> types.PyTree:
  """Attach one sharding to each `jax.ShapeDtypeStruct`."""
  return jax.tree.map(
    lambda shape, sharding: shape.update(sharding=sharding), shapes, shardings
  )


def stacked(shapes: types.PyTree, count: int) -> types.PyTree:
  """Give shapes a leading axis that is not split over devices.

  Args:
    shapes: `jax.ShapeDtypeStruct`s from `with_shardings`.
    count: length of the axis.
  """

  def stack(shape):
    mesh, spec = shape.sharding.mesh, shape.sharding.spec
    return shape.update(
      shape=(count, *shape.shape),
      sharding=NamedSharding(mesh, PartitionSpec(None, *spec)),
    )

  return jax.tree.map(stack, shapes)


def gather(tree: types.PyTree) -> types.PyTree:
  """Copy global arrays to the host; all processes must call this."""

  def copy(array):
    if array.is_fully_addressable or array.is_fully_replicated:
      return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)

  return jax.tree.map(copy, tree)


def shard(
  tree: types.PyTree, mesh: jax.sharding.Mesh, axis: int = 0
) -> types.PyTree:
  """Split arrays over the devices along one axis.

  Args:
    tree: arrays with the rows of this process.
    mesh: from `make_mesh`.
    axis: the axis of rows.

  Returns:
    Global arrays with the rows of all processes.
  """
  return jax.make_array_from_process_local_data(along(mesh, axis), tree)


def shapes_of(tree: types.PyTree) -> types.PyTree:
  """Return the `jax.ShapeDtypeStruct`s, with shardings, of global arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
