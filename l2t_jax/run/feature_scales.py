"""Measure the scale of each source tap, to make β comparable across sources.

Features of different networks and layers differ by orders of magnitude. With
config.transfer.feature_scale="std" the features of each tap are divided by one
number, so that a weight of the matching loss means the same for all sources.
"""

from __future__ import annotations

from collections.abc import Mapping
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import errors
from l2t_jax.method import pair_sets, training
from l2t_jax.run import setup as setups
from l2t_jax.run.sources import FEATURE_SCALE
from l2t_jax.runtime import compilation, phases, sharding

# Images on which scales are measured, rounded up to whole batches; at most an
# epoch.
_NUM_IMAGES = 2048
# Smallest scale, as a share of the root mean square, so that features that are
# almost constant are not blown up.
_FLOOR = 1e-3


@phases.phase("feature scales")
@compilation.garbage_collection_paused()
def measure(setup: setups.Setup) -> dict[str, float]:
  """Measure the standard deviation of each source tap.

  It is taken over all positions and channels of training images, augmented as
  in training but not mixed. All processes must call this.

  Args:
    setup: setup of the experiment.

  Returns:
    Source tap, by its name in pairs -> its scale.

  Raises:
    errors.InputError: a feature is NaN or infinite.
  """
  # Seed 0 for all: seeds that train together share the scales.
  batches = setup.dataset.with_seed(0).train_batches(0)
  batch_size = len(setup.blank_batch.images) * jax.process_count()
  num_batches = -(-_NUM_IMAGES // batch_size)

  @jax.jit
  def moments(sources, images):
    _, features = training.run_sources(
      setup.problem.source_fns, sources, images
    )
    features = {n: x.astype(jnp.float32) for n, x in features.items()}
    return {n: (x.mean(), jnp.square(x).mean()) for n, x in features.items()}

  found = [
    moments(setup.sources, sharding.shard(batch.images, setup.mesh))
    for batch in itertools.islice(batches, num_batches)
  ]
  scales = {}
  for tap in setup.source_taps:
    # In float64, because the variance below is a difference of large numbers.
    mean, mean_square = np.mean(
      [np.float64(jax.device_get(one[tap])) for one in found], axis=0
    )
    if not np.isfinite(mean_square):
      raise errors.InputError(
        f"config.transfer.feature_scale: the features of source tap {tap!r} are"
        " not finite, or overflow; choose other taps, or check the weights"
      )
    floor = _FLOOR * np.sqrt(mean_square)
    std = np.sqrt(max(mean_square - mean**2, 0.0))
    # 1 if all features of the tap are 0.
    scales[tap] = float(max(std, floor)) or 1.0
  return scales


def set_scales(
  sources: Mapping[str, training.Variables], scales: Mapping[str, float]
) -> dict[str, training.Variables]:
  """Replace the scales among the variables of sources.

  Args:
    sources: `Setup.sources`, whose scales are 1.
    scales: from `measure`.
  """

  def replace(name, variables):
    state = dict(variables.model_state)
    state[FEATURE_SCALE] = {
      tap: jax.device_put(
        np.float32(scales[pair_sets.tap_name(name, tap)]), one.sharding
      )
      for tap, one in state.get(FEATURE_SCALE, {}).items()
    }
    return variables._replace(model_state=state)

  return {name: replace(name, one) for name, one in sources.items()}
