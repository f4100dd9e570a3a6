"""A small source and target, for tests of whole iterations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import models, types
from l2t_jax.method import (
  attention_distillation,
  mixing,
  objectives,
  optimizers,
  pair_sets,
  training,
  transfer,
)
from l2t_jax.models import resnet, vgg

SHAPE = (8, 8, 3)
NUM_CLASSES = 4
SOURCE = resnet.CifarResNet(blocks_per_stage=1, num_classes=5, widths=(4, 6))
TARGET = vgg.VGG(plan=(6, "M"), num_classes=NUM_CLASSES)
DEEPER_TARGET = vgg.VGG(plan=(6, "M", 8, "M"), num_classes=NUM_CLASSES)
HEAD_TAP = "penultimate"
OPTIMIZER_FN = optimizers.sgd(momentum=0.9, weight_decay=1e-4)
META_OPTIMIZER = optimizers.adam_l2(1e-3, 1e-4)
RECIPE = training.Recipe(OPTIMIZER_FN, lambda step: 0.05, META_OPTIMIZER)


def create(method="l2t_ww", seed=0, pair_set=None, target=TARGET):
  """Return (train state, sources, pairs, target taps)."""
  method = objectives.get_method(method)
  layout = models.trace(target, SHAPE)
  source_taps = models.select_taps(models.trace(SOURCE, SHAPE))
  target_taps = models.select_taps(layout)
  pairs = ()
  if method.pair_set is not None:
    pairs = pair_sets.make_pairs(
      pair_set or method.pair_set, source_taps, target_taps
    )
  keys = jax.random.split(jax.random.key(seed), 3)
  target_params, model_state = _variables(target, seed)
  *_, (*_, num_features) = layout.taps.values()
  params = {
    "target": target_params,
    "regressors": transfer.init_regressors(
      keys[0], pairs, source_taps, target_taps
    ),
    "heads": objectives.init_heads(
      keys[1], num_features, {"": SOURCE.num_classes}
    ),
  }
  if "aft" in method.losses:
    params["aft"] = objectives.init_channel_scales(pairs, source_taps)
  if "afd" in method.losses:
    params["afd"] = attention_distillation.init(
      keys[1], pairs, source_taps, target_taps, dim=8
    )
  meta_params = transfer.init_meta_params(
    keys[2],
    pairs,
    source_taps,
    learn_channels=method.learn_channels,
    learn_pairs=method.learn_pairs,
  )
  state = training.create_state(
    params,
    model_state,
    meta_params,
    RECIPE,
  )
  sources = {"": training.Variables(*_variables(SOURCE, seed + 1))}
  return state, sources if method.needs_source else {}, pairs, target_taps


def _variables(module, seed):
  """Flax initialises in float32 also where float64 is on."""
  dtype = jnp.result_type(float)
  return jax.tree.map(lambda x: x.astype(dtype), _init(module, seed))


@functools.cache
def _init(module, seed):
  return models.init(module, jax.random.key(seed), SHAPE)


def make_problem(
  method,
  pairs,
  target_taps,
  *,
  target=TARGET,
  task=objectives.CLASSIFICATION,
  batch_norm_groups=1,
):
  method = objectives.get_method(method)
  auxiliary = {
    "matching": objectives.matching(pairs, beta=0.5),
    "attention": objectives.attention(pairs, beta=1000.0),
    "lwf": objectives.lwf(HEAD_TAP, temperature=2.0, weight=1.0),
    "kd": objectives.kd(temperature=4.0, weight=1.0),
    "aft": objectives.aft(pairs, weight=10.0),
    "afd": objectives.afd(pairs, weight=200.0),
  }
  weights_fn = functools.partial(
    transfer.transfer_weights,
    pairs=pairs,
    activation="relu6" if method.looks_ahead else "softmax",
  )
  return training.Problem(
    objectives.make_losses(
      models.as_apply_fn(target, batch_norm_groups=batch_norm_groups),
      {name: auxiliary[name] for name in method.losses},
      task,
      added=method.added,
    ),
    {"": models.as_apply_fn(SOURCE)} if method.needs_source else {},
    pairs,
    target_taps,
    weights_fn if "matching" in method.losses else None,
  )


def make_train_step(
  method,
  pairs,
  target_taps,
  *,
  mode="mixed",
  num_inner_steps=2,
  rolled=True,
  optimizer_fn=OPTIMIZER_FN,
  target=TARGET,
  look_ahead_loss="auxiliary",
  update_meta=True,
  skip_bad_numbers=False,
  batch_norm_groups=1,
):
  problem = make_problem(
    method,
    pairs,
    target_taps,
    target=target,
    batch_norm_groups=batch_norm_groups,
  )
  recipe = RECIPE._replace(
    optimizer_fn=optimizer_fn,
    num_inner_steps=num_inner_steps,
    look_ahead_loss=(
      look_ahead_loss if objectives.get_method(method).looks_ahead else "none"
    ),
    mode=mode,
    rolled=rolled,
    skip_bad_numbers=skip_bad_numbers,
  )
  return training.make_train_step(problem, recipe, update_meta=update_meta)


def batch(size, seed=0, num_unlabeled=0, *, mixes=False):
  rng = np.random.default_rng(seed)
  images = lambda count: jnp.asarray(rng.standard_normal((count, *SHAPE)))
  return types.Batch(
    images(size),
    jnp.asarray(rng.integers(0, NUM_CLASSES, size)),
    images(num_unlabeled) if num_unlabeled else None,
    mixing.draw(rng, size, SHAPE[:2], mixup=1.0, cutmix=1.0) if mixes else None,
  )
