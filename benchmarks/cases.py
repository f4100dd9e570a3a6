"""Iterations of the paper's setting on random images, ready to be timed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import (
  build,
  compilation,
  models,
  objectives,
  training,
  transfer,
  types,
)

NUM_CLASSES = 10
OPTIMIZER_FN = training.sgd(momentum=0.9, weight_decay=1e-4)
META_OPTIMIZER = training.adam_l2(1e-4, 1e-4)


class Setting(NamedTuple):
  """What an iteration is made of; the paper's values for 32x32 images."""

  method: str = "l2t_ww"
  mode: str = "linearized"
  num_inner_steps: int = 2
  batch_size: int = 128
  precision: str = "f32"
  pairs: str = ""  # "": the method's own.
  source: str = "resnet32"
  num_sources: int = 1
  target: str = "vgg9"
  image_size: int = 32
  num_seeds: int = 1
  rolled: bool = True


class Iteration(NamedTuple):
  """A training step with its arguments."""

  step: object  # (state, sources, batch) -> (state, metrics); not jitted.
  state: types.TrainState
  sources: dict[str, training.Source]
  batch: types.Batch


def create(setting: Setting) -> Iteration:
  """Build a step, its first state, its sources and a batch."""
  method = objectives.get_method(setting.method)
  dtype = build.PRECISIONS[setting.precision][0]
  shape = (setting.image_size, setting.image_size, 3)
  target = models.create(setting.target, NUM_CLASSES, dtype)
  target_taps = models.select_taps(target, shape)
  source = models.create(setting.source, 200, dtype)
  names = [""] if setting.num_sources == 1 else []
  names = names or [f"source{i}" for i in range(setting.num_sources)]
  names = names if method.needs_source else []
  source_taps = {
    transfer.tap_name(name, tap): tap_shape
    for name in names
    for tap, tap_shape in models.select_taps(source, shape).items()
  }
  pairs = ()
  if method.pair_set:
    pairs = transfer.make_pairs(
      setting.pairs or method.pair_set, source_taps, target_taps
    )
  matching = objectives.matching(pairs, beta=0.5)
  step = training.make_train_step(
    objectives.make_losses(
      models.as_apply_fn(target),
      {"matching": matching} if method.losses else {},
    ),
    dict.fromkeys(names, models.as_apply_fn(source)),
    pairs=pairs,
    target_taps=target_taps,
    weights_fn=functools.partial(transfer.transfer_weights, pairs=pairs)
    if pairs
    else None,
    look_ahead_loss="auxiliary",
    num_inner_steps=setting.num_inner_steps,
    learning_rate_fn=lambda _: 0.01,
    optimizer_fn=OPTIMIZER_FN,
    meta_optimizer=META_OPTIMIZER,
    mode=setting.mode,
    rolled=setting.rolled,
  )

  def create_state(key):
    keys = jax.random.split(key, 3)
    params, model_state = models.init(target, keys[0], shape)
    params = {
      "target": params,
      "regressors": transfer.init_regressors(
        keys[1], pairs, source_taps, target_taps
      ),
    }
    meta_params = transfer.init_meta_params(
      keys[2],
      pairs,
      source_taps,
      learn_channels=method.learn_channels,
      learn_pairs=method.learn_pairs,
    )
    return training.create_state(
      params,
      model_state,
      meta_params,
      optimizer_fn=OPTIMIZER_FN,
      meta_optimizer=META_OPTIMIZER,
    )

  sources = {
    name: training.Source(*models.init(source, jax.random.key(i), shape))
    for i, name in enumerate(names, start=1)
  }
  rng = np.random.default_rng(0)
  draw_batch = lambda leading: types.Batch(
    jnp.asarray(
      rng.standard_normal((*leading, setting.batch_size, *shape)), jnp.float32
    ),
    jnp.asarray(
      rng.integers(0, NUM_CLASSES, (*leading, setting.batch_size)), jnp.int32
    ),
  )
  if setting.num_seeds == 1:
    return Iteration(
      step, create_state(jax.random.key(0)), sources, draw_batch(())
    )
  return Iteration(
    jax.vmap(step, in_axes=(0, None, 0)),
    jax.vmap(create_state)(
      jax.random.split(jax.random.key(0), setting.num_seeds)
    ),
    sources,
    draw_batch((setting.num_seeds,)),
  )


def compile_iteration(
  setting: Setting, iteration: Iteration
) -> compilation.Program:
  """Compile a step as `train.py` does; its state is donated."""
  with jax.default_matmul_precision(build.PRECISIONS[setting.precision][1]):
    return compilation.compile_ahead(
      iteration.step,
      iteration.state,
      iteration.sources,
      iteration.batch,
      donate_argnums=0,
    )
