"""One mesh, data parallel: batches are split, everything else is replicated.

Under one `jax.jit` the losses and the batch statistics are those of the global
batch; XLA puts the collectives where they are needed.
"""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding, PartitionSpec

from l2t_jax import types

_AXIS = "data"


def make_mesh() -> jax.sharding.Mesh:
  """Lay all devices of all processes out along one axis."""
  return jax.make_mesh(
    (jax.device_count(),),
    (_AXIS,),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of an array of which every device has a copy."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: types.PyTree, mesh: jax.sharding.Mesh) -> types.PyTree:
  """Put a copy of every array on every device."""
  return jax.device_put(tree, replicated(mesh))


def shard(
  tree: types.PyTree, mesh: jax.sharding.Mesh, axis: int = 0
) -> types.PyTree:
  """Split one axis over the devices.

  Args:
    tree: arrays of this process's rows.
    mesh: from `make_mesh`.
    axis: the one that counts rows.

  Returns:
    Arrays of the rows of all processes.
  """
  sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, _AXIS))
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, rows), tree
  )
