"""Any network as pure functions, with any of its layers as a tap.

A network is one of

  * a Linen module;
  * an NNX module, or a function `make(rngs)` that makes one;
  * `Functions`.

It maps images to logits, or to (logits, features), where features is a dict
tap -> [B, H, W, C]. If it returns no such dict, the output of every submodule
is a tap, named by the submodule's path, such as "stages_1/blocks_0"; outputs of
further calls of the same submodule are "stages_1/blocks_0#1" and so on. Taps
are maps [B, H, W, C] or tokens [B, N, C], which are reshaped to maps. What
stands in front of the patches (class, register and distilled tokens) is cut
off: the patches are as many as one of the network's maps has positions, or
else N or N - 1 is a square number.

A module that behaves differently in training has an argument `train`,
`training`, `is_training`, `deterministic` or `use_running_average`, or, in NNX,
follows `.train()` and `.eval()`. The PRNG key of dropout is part of the model
state.
"""

from __future__ import annotations

from collections.abc import Collection
import functools

import chex
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

from l2t_jax import errors, types
from l2t_jax.models import from_linen, from_nnx, pure_functions, tapping


def as_apply_fn(
  network: pure_functions.Network, taps: Collection[str] | None = None
) -> types.ApplyFn:
  """Convert a network to a pure function.

  Args:
    network: see the module's docstring.
    taps: names of the features to return; None for all.

  Returns:
    `apply_fn(params, model_state, images, *, train)`, jitted, which returns
    (logits [B, K], features, model_state). In eval mode it returns the
    model_state that it was given.
  """
  pure = _to_pure(network)

  def apply_fn(params, model_state, images, *, train):
    output, outputs, model_state = pure.apply(
      params, model_state, images, train, taps
    )
    logits, outputs = tapping.split(output, outputs)
    chosen = {
      name: x for name, x in outputs.items() if taps is None or name in taps
    }
    maps = ()
    if any(getattr(x, "ndim", 0) == 3 for x in chosen.values()):
      maps = _map_sizes(pure, params, model_state, images)
    features = {
      name: x
      for name, output in chosen.items()
      if (x := tapping.as_map(output, maps)) is not None
    }
    return logits, features, model_state

  return jax.jit(apply_fn, static_argnames="train")


def init(
  network: pure_functions.Network, key: chex.PRNGKey, image_shape: tapping.Shape
) -> tuple[types.PyTree, types.PyTree]:
  """Initialise a network; return (params, model_state).

  An NNX module keeps the values that it has, whatever the key.

  Args:
    network: see the module's docstring.
    key: PRNG key; consumed.
    image_shape: (H, W, C) of its images.
  """
  images = jnp.zeros((1, *image_shape))
  return jax.jit(_to_pure(network).init)(key, images)


def trace(
  network: pure_functions.Network, image_shape: tapping.Shape
) -> tapping.Layout:
  """Find the variables, outputs and taps of a network without running it.

  Args:
    network: see the module's docstring.
    image_shape: (H, W, C) of its images.

  Raises:
    errors.InputError: this is not a network, the images are empty, or the
      variables are not nested dicts of plain arrays.
  """
  if min(image_shape) < 1:
    raise errors.InputError(
      f"images are {list(image_shape)}, [H, W, C]; all of these must be at"
      " least 1"
    )
  pure = _to_pure(network)

  def run(key, images):
    params, model_state = pure.init(key, images)
    pure_functions.check_variables("params", params)
    pure_functions.check_variables("model_state", model_state)
    output, outputs, _ = pure.apply(params, model_state, images, False, None)
    logits, features = tapping.split(output, outputs)
    features = {name: x for name, x in features.items() if hasattr(x, "shape")}
    return {"params": params, **model_state}, logits, features

  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  jaxpr, (variables, logits, features) = jax.make_jaxpr(run, return_shape=True)(
    jax.random.key(0), images
  )
  # Variable of the jaxpr -> (equation that computes it, index in its outputs).
  computed = {
    variable: (i, j)
    for i, equation in enumerate(jaxpr.jaxpr.eqns)
    for j, variable in enumerate(equation.outvars)
  }
  # Features are the last outputs, in the order of the sorted names.
  outvars = jaxpr.jaxpr.outvars[-len(features) :] if features else []
  position = {
    name: computed.get(variable, (-1, 0))
    for name, variable in zip(sorted(features), outvars, strict=True)
  }
  # A module that returns its child's output comes after the child.
  order = lambda name: (position[name], -name.count("/"))
  taps, untappable = {}, {}
  to_map = functools.partial(tapping.as_map, maps=tapping.map_sizes(features))
  for name in sorted(features, key=order):
    as_map = jax.eval_shape(to_map, features[name])
    if as_map is None:
      untappable[name] = features[name].shape[1:]
    else:
      taps[name] = as_map.shape[1:]
  default_taps = tuple(getattr(network, "default_taps", None) or ())
  return tapping.Layout(
    image_shape, variables, logits.shape[1:], taps, untappable, default_taps
  )


def training_notes(
  network: pure_functions.Network, layout: tapping.Layout, batch_size: int
) -> tuple[str, ...]:
  """Return warnings about a network that is to be trained, one line each.

  If training does not change the batch statistics, they are either frozen on
  purpose, or nothing tells the network that it trains.

  Args:
    network: see the module's docstring.
    layout: the network's layout, from `trace`.
    batch_size: number of images in a training batch.
  """
  if isinstance(network, pure_functions.Functions):
    return ()  # Which part of their state is batch statistics is unknown.
  pure = _to_pure(network)
  model_state = dict(layout.variables)
  params = model_state.pop("params")

  def statistics(params, model_state, images):
    *_, model_state = pure.apply(params, model_state, images, True, ())
    return pure.statistics(model_state)

  shape = (batch_size, *layout.image_shape)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  jaxpr = jax.make_jaxpr(statistics)(params, model_state, images).jaxpr
  if not jaxpr.outvars or not all(x in jaxpr.invars for x in jaxpr.outvars):
    return ()
  return (
    "training does not update the target's batch statistics; if it should,"
    f" {pure_functions.HOW_TO_TELL}",
  )


def _map_sizes(pure, params, model_state, images):
  """Return (H, W) of all maps of a network, without running it."""

  def run(params, model_state, images):
    output, outputs, _ = pure.apply(params, model_state, images, False, None)
    _, features = tapping.split(output, outputs)
    return {name: x for name, x in features.items() if hasattr(x, "shape")}

  return tapping.map_sizes(jax.eval_shape(run, params, model_state, images))


def _to_pure(network) -> pure_functions.PureNetwork:
  if isinstance(network, nn.Module):
    return from_linen.from_linen(network)
  if isinstance(network, pure_functions.Functions):
    return pure_functions.from_functions(network)
  if isinstance(network, nnx.Module) or callable(network):
    return from_nnx.from_nnx(network)
  raise errors.InputError(
    f"{network!r} is no network; give a Linen module, an NNX module, a function"
    " that makes one from rngs, or l2t_jax.models.Functions"
  )
