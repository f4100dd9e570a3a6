"""Steps of the small setup over several devices or processes, in float64.

Run as a program by tests/runtime/test_distributed.py.
"""

import sys

import jax
import numpy as np

from l2t_jax.runtime import distributed, sharding
from tests.support import small_setup

BATCH_SIZE = 8
NUM_STEPS = 3


def run(mesh, *, split=False, batch_norm_groups=1):
  """Return every number of the state and the metrics after some steps."""
  state, sources, pairs, target_taps = small_setup.create()
  train_step = small_setup.make_train_step(
    "l2t_ww", pairs, target_taps, batch_norm_groups=batch_norm_groups
  )
  replicated = sharding.replicated(mesh)
  shardings = jax.tree.map(lambda _: replicated, state)
  if split:
    shardings = sharding.split(state, mesh, min_size=1)
    assert not all(s.is_fully_replicated for s in jax.tree.leaves(shardings))
  state = jax.device_put(state, shardings)
  sources = jax.device_put(sources, replicated)
  step = jax.jit(train_step, out_shardings=(shardings, replicated))
  rows = BATCH_SIZE // jax.process_count()
  mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
  for seed in range(NUM_STEPS):
    batch = small_setup.batch(BATCH_SIZE, seed, mixes=True)
    batch = jax.tree.map(lambda x: np.asarray(x)[mine], batch)
    state, metrics = step(state, sources, sharding.shard(batch, mesh))
  return sharding.gather((state, metrics))


def save(path, tree):
  if distributed.is_first():
    leaves = jax.tree.leaves_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    np.savez(path, **dict(zip(names, (x for _, x in leaves), strict=True)))


def main(path, coordinator, num_processes, process_id):
  distributed.start(coordinator, int(num_processes), int(process_id))
  with distributed.exit_together():
    assert distributed.from_first(int(process_id)) == 0
    assert not distributed.is_true_for_all(distributed.is_first())
    save(path, run(sharding.make_mesh()))


if __name__ == "__main__":
  jax.config.update("jax_enable_x64", True)
  main(*sys.argv[1:])
