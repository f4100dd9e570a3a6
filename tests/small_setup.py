"""A small source and target, for tests of whole iterations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import models, objectives, training, transfer, types
from l2t_jax.models import resnet, vgg

SHAPE = (8, 8, 3)
NUM_CLASSES = 4
SOURCE = resnet.CifarResNet(blocks_per_stage=1, num_classes=5, widths=(4, 6))
TARGET = vgg.VGG(plan=(6, "M"), num_classes=NUM_CLASSES)
DEEPER_TARGET = vgg.VGG(plan=(6, "M", 8, "M"), num_classes=NUM_CLASSES)
OPTIMIZER_FN = training.sgd(momentum=0.9, weight_decay=1e-4)
META_OPTIMIZER = training.adam_l2(1e-3, 1e-4)


def create(method="l2t_ww", seed=0, pair_set=None, target=TARGET):
  """Return (train state, source, pairs, target taps)."""
  method = objectives.get_method(method)
  source_taps = models.select_taps(SOURCE, SHAPE)
  target_taps = models.select_taps(target, SHAPE)
  pairs = ()
  if method.pair_set:
    pairs = transfer.make_pairs(
      pair_set or method.pair_set, source_taps, target_taps
    )
  state = training.create_state(
    jax.random.key(seed),
    _variables(target, seed),
    method=method,
    pairs=pairs,
    source_taps=source_taps,
    target_taps=target_taps,
    optimizer_fn=OPTIMIZER_FN,
    meta_optimizer=META_OPTIMIZER,
  )
  source = training.Source(*_variables(SOURCE, seed + 1))
  return state, source, pairs, target_taps


def _variables(module, seed):
  """Flax initialises in float32 also where float64 is on."""
  dtype = jnp.result_type(float)
  return jax.tree.map(lambda x: x.astype(dtype), _init(module, seed))


@functools.cache
def _init(module, seed):
  return models.init(module, jax.random.key(seed), SHAPE)


def make_train_step(
  pairs,
  target_taps,
  *,
  mode="mixed",
  num_inner_steps=2,
  rolled=False,
  optimizer_fn=OPTIMIZER_FN,
  target=TARGET,
):
  return training.make_train_step(
    models.as_apply_fn(target),
    models.as_apply_fn(SOURCE) if pairs else None,
    pairs=pairs,
    target_taps=target_taps,
    beta=0.5,
    num_inner_steps=num_inner_steps,
    learning_rate_fn=lambda step: 0.05,
    optimizer_fn=optimizer_fn,
    meta_optimizer=META_OPTIMIZER,
    mode=mode,
    rolled=rolled,
  )


def batch(size, seed=0):
  rng = np.random.default_rng(seed)
  return types.Batch(
    jnp.asarray(rng.standard_normal((size, *SHAPE))),
    jnp.asarray(rng.integers(0, NUM_CLASSES, size)),
  )
