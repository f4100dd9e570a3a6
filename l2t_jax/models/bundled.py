"""Create networks by name: bundled ones, and a user's own."""

from __future__ import annotations

from collections.abc import Callable
import functools
import inspect
from typing import Any

from flax import linen as nn

from l2t_jax import errors, imports
from l2t_jax.models import convnext, resnet, vgg, vit
from l2t_jax.models.pure_functions import Network

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
  "vit_tiny": vit.ViT,
  "convnext_atto": convnext.ConvNeXt,
}


def find(name: str) -> Callable[..., Any]:
  """Return the function that makes a network.

  Args:
    name: a key of `MODELS`, or "package.module:function", which is imported.

  Raises:
    errors.InputError: there is no such function.
  """
  if name in MODELS:
    return MODELS[name]
  if ":" not in name:
    raise errors.InputError(
      f"unknown model {name!r}; it must be one of {', '.join(MODELS)}, or a"
      " function of your own as 'package.module:function'"
    )
  return imports.by_name(name, "model")


def image_size(network: Network) -> int:
  """Return the side in pixels of the images that a network is designed for."""
  return getattr(network, "image_size", 32)


def create(name: str, num_classes: int, dtype: Any = None) -> Network:
  """Create a network by name.

  Args:
    name: see `find`. A user's function is called with `num_classes`, and with
      `dtype` if it takes that argument, and must return a Linen module. If it
      takes `rngs`, it must return an NNX module and is called at
      initialisation.
    num_classes: K, the number of logits.
    dtype: dtype of the activations; None for that of the parameters.

  Returns:
    A network; see `models.networks`.

  Raises:
    errors.InputError: the name is unknown, or the function does not take
      `num_classes` or the dtype.
  """
  make = find(name)
  signature = inspect.signature(make)
  options: dict[str, Any] = {"num_classes": num_classes}
  if "dtype" in signature.parameters:
    options["dtype"] = dtype
  elif dtype is not None:
    raise errors.InputError(
      f"the model {name!r} has no argument dtype; it runs with precision f32 or"
      " tf32"
    )
  # Checked beforehand, to tell this from a TypeError that `make` itself raises.
  try:
    signature.bind_partial(**options)
  except TypeError as error:
    raise errors.InputError(
      f"the model {name!r} cannot be called with num_classes: {error}"
    ) from error
  if "rngs" in signature.parameters:
    return lambda rngs: make(rngs=rngs, **options)
  return make(**options)
