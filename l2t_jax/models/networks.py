"""Any network as pure functions, with any of its layers as a tap.

A network is one of

  * a Linen module;
  * an NNX module, or a function `make(rngs)` that makes one;
  * `Functions`.

It turns images into logits, or into (logits, features), where features is a
dict tap -> [B, H, W, C]. Where it returns no such dict, the output of every
submodule is a tap, named by the submodule's path, such as "stages_1/blocks_0";
outputs of further calls of the same submodule are "stages_1/blocks_0#1" and so
on. Taps are maps [B, H, W, C] or tokens [B, N, C] of a square grid, with a
class token before them or without; tokens become maps.

Modules that behave differently in training have an argument `train`,
`training`, `is_training`, `deterministic` or `use_running_average` (or, in NNX,
follow `.train()` and `.eval()`). Dropout draws from a key that is a part of the
model state.
"""

from __future__ import annotations

from collections.abc import Collection

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
  """Turn a network into a pure function; in eval mode its state stays.

  Args:
    network: see above.
    taps: those that the features are wanted of; None for all.
  """
  pure = _pure(network)

  def apply_fn(params, model_state, images, *, train):
    output, outputs, model_state = pure.apply(
      params, model_state, images, train, taps
    )
    logits, features = tapping.split(output, outputs)
    features = {name: tapping.as_map(x) for name, x in features.items()}
    wanted = lambda name: taps is None or name in taps
    features = {
      name: x for name, x in features.items() if x is not None and wanted(name)
    }
    return logits, features, model_state

  return jax.jit(apply_fn, static_argnames="train")


def init(
  network: pure_functions.Network, key: chex.PRNGKey, image_shape: tapping.Shape
) -> tuple[types.PyTree, types.PyTree]:
  """Initialise a network; return (params, model_state).

  An NNX module that exists already keeps its values, whatever the key.
  """
  images = jnp.zeros((1, *image_shape))
  return jax.jit(_pure(network).init)(key, images)


def trace(
  network: pure_functions.Network, image_shape: tapping.Shape
) -> tapping.Layout:
  """Find out what a network consists of, without running it.

  Args:
    network: see above.
    image_shape: (H, W, C) of its images.

  Raises:
    errors.InputError: it is no network, the images are empty, or its variables
      are no nested dicts of plain arrays.
  """
  if min(image_shape) < 1:
    raise errors.InputError(
      f"images are {list(image_shape)}, [H, W, C]; all of these must be at"
      " least 1"
    )
  pure = _pure(network)

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
  computed = {
    variable: (i, j)
    for i, equation in enumerate(jaxpr.jaxpr.eqns)
    for j, variable in enumerate(equation.outvars)
  }
  # They are the last outputs; a dict's leaves are in the order of its keys.
  outvars = jaxpr.jaxpr.outvars[-len(features) :] if features else []
  position = {
    name: computed.get(variable, (-1, 0))
    for name, variable in zip(sorted(features), outvars, strict=True)
  }
  # A module that returns its child's output comes after the child.
  order = lambda name: (position[name], -name.count("/"))
  taps, others = {}, {}
  for name in sorted(features, key=order):
    as_map = jax.eval_shape(tapping.as_map, features[name])
    if as_map is None:
      others[name] = features[name].shape[1:]
    else:
      taps[name] = as_map.shape[1:]
  default_taps = tuple(getattr(network, "default_taps", None) or ())
  return tapping.Layout(
    image_shape, variables, logits.shape[1:], taps, others, default_taps
  )


def training_notes(
  network: pure_functions.Network, layout: tapping.Layout, batch_size: int
) -> tuple[str, ...]:
  """Say what may not be meant where a network trains, a line each.

  Batch statistics that never move belong to a network that is meant to keep
  them, or to one that is not told that it trains.

  Args:
    network: see above.
    layout: of it, from `trace`.
    batch_size: of its images in training.
  """
  if isinstance(network, pure_functions.Functions):
    return ()  # What they keep, and how they know, is theirs.
  pure = _pure(network)
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
    "training does not move the target's batch statistics; if it is meant to,"
    f" {pure_functions.SAY_IT}",
  )


def _pure(network) -> pure_functions.Pure:
  if isinstance(network, nn.Module):
    return from_linen.pure(network)
  if isinstance(network, pure_functions.Functions):
    return pure_functions.pure(network)
  if isinstance(network, nnx.Module) or callable(network):
    return from_nnx.pure(network)
  raise errors.InputError(
    f"{network!r} is no network: a Linen module, an NNX module, a function that"
    " makes one from rngs, or l2t_jax.models.Functions is needed"
  )
