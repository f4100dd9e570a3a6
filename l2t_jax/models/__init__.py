"""Flax Linen networks that return (logits, features), by name."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from l2t_jax import types
from l2t_jax.models import resnet, vgg

MODELS: dict[str, Callable[..., nn.Module]] = {
  "resnet_tiny": functools.partial(resnet.CifarResNet, blocks_per_stage=1),
  "resnet20": functools.partial(resnet.CifarResNet, blocks_per_stage=3),
  "resnet32": functools.partial(resnet.CifarResNet, blocks_per_stage=5),
  "resnet18": functools.partial(
    resnet.ResNet, block=resnet.BasicBlock, stage_sizes=(2, 2, 2, 2)
  ),
  "resnet34": functools.partial(
    resnet.ResNet, block=resnet.BasicBlock, stage_sizes=(3, 4, 6, 3)
  ),
  "resnet50": functools.partial(
    resnet.ResNet, block=resnet.BottleneckBlock, stage_sizes=(3, 4, 6, 3)
  ),
  "vgg9": functools.partial(vgg.VGG, plan=vgg.VGG9),
  "vgg_tiny": functools.partial(vgg.VGG, plan=vgg.VGG_TINY),
}


def create(name: str, num_classes: int, dtype: Any = None) -> nn.Module:
  """Create a network by name.

  Args:
    name: a key of `MODELS`.
    num_classes: K, the number of logits.
    dtype: of the activations; None for that of the parameters.

  Raises:
    types.InputError: for an unknown name.
  """
  if name not in MODELS:
    raise types.InputError(
      f"unknown model {name!r}; the models are {', '.join(MODELS)}"
    )
  return MODELS[name](num_classes=num_classes, dtype=dtype)


def as_apply_fn(module: nn.Module) -> types.ApplyFn:
  """Turn a Linen module into a pure function; in eval mode nothing changes."""

  def apply_fn(params, model_state, images, *, train):
    variables = {"params": params, **model_state}
    if not train:
      return *module.apply(variables, images, train=False), model_state
    (logits, features), model_state = module.apply(
      variables, images, train=True, mutable=list(model_state)
    )
    return logits, features, model_state

  return jax.jit(apply_fn, static_argnames="train")


def init(
  module: nn.Module, key: chex.PRNGKey, image_shape: tuple[int, int, int]
) -> tuple[types.PyTree, types.PyTree]:
  """Initialise a network; return (params, model_state)."""
  images = jnp.zeros((1, *image_shape))
  variables = dict(
    jax.jit(module.init, static_argnames="train")(key, images, train=False)
  )
  return variables.pop("params"), variables


def tap_shapes(
  module: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, tuple[int, int, int]]:
  """List what a network's features are, without running it.

  Returns:
    Tap -> (H, W, C), from shallow to deep.
  """
  shapes = {}

  def run(key, images):
    (_, features), _ = module.init_with_output(key, images, train=False)
    # Recorded here because a dict that leaves a transformation is sorted.
    shapes.update({name: x.shape[1:] for name, x in features.items()})

  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  jax.eval_shape(run, jax.random.key(0), images)
  return shapes


def select_taps(
  module: nn.Module,
  image_shape: tuple[int, int, int],
  taps: tuple[str, ...] = (),
) -> dict[str, tuple[int, int, int]]:
  """Choose taps by name, or the network's `default_taps` where none is named.

  Raises:
    types.InputError: for a tap that the network does not have.
  """
  shapes = tap_shapes(module, image_shape)
  for tap in taps:
    if tap not in shapes:
      raise types.InputError(
        f"unknown tap {tap!r}; the network's taps are {', '.join(shapes)}"
      )
  chosen = taps or module.default_taps
  return {name: shapes[name] for name in shapes if name in chosen}
