"""Linen modules as pure functions."""

from __future__ import annotations

import flax
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

from l2t_jax import errors
from l2t_jax.models import pure_functions


def from_linen(module: nn.Module) -> pure_functions.PureNetwork:
  """Convert a Linen module.

  Its model state holds the collections other than "params". If the module
  draws random numbers in training, the state also holds a PRNG key, as
  {"rng": {"key": its data}}, which every call in train mode replaces.
  """
  mode = lambda train: pure_functions.mode_arguments(module.__call__, train)

  def init(key, images):
    keys = {"params": key, "dropout": key}
    # Unboxed: `nn.with_partitioning` wraps arrays in boxes with axis names.
    variables = dict(nn.unbox(module.init(keys, images, **mode(False))))
    variables.pop("intermediates", None)  # Sown outputs, not state.

    def after_training(rngs):
      return jax.eval_shape(
        lambda: module.apply(
          variables, images, **mode(True), rngs=rngs, mutable=list(variables)
        )
      )[1]

    # A trace without PRNG keys tells whether training draws random numbers.
    try:
      after, draws = after_training({}), False
    except flax.errors.InvalidRngError:
      after, draws = after_training(keys), True
    shape_of = lambda tree: jax.tree.map(jnp.shape, tree)
    # A sown collection grows with every call: it is an output, not state.
    variables = {
      name: values
      for name, values in variables.items()
      if name == "params" or shape_of(after[name]) == shape_of(values)
    }
    if draws:
      # `module.init` has consumed the key itself.
      key = jax.random.fold_in(key, 1)
      variables["rng"] = {"key": jax.random.key_data(key)}
    return variables.pop("params", {}), variables

  def apply(params, model_state, images, train, taps):
    state, rngs = dict(model_state), {}
    rng = state.pop("rng", None)
    if train and rng:
      keys = jax.random.split(jax.random.wrap_key_data(rng["key"]), 3)
      # Flax derives streams of other names from "params".
      rngs = {"dropout": keys[0], "params": keys[1]}
      rng = {"key": jax.random.key_data(keys[2])}
    # Capture only the tapped submodules; "#1" marks one of their calls. Those
    # that a tap is within may return it in a dict.
    is_tap = lambda path: (
      taps is None
      or any(f"{tap.partition('#')[0]}/".startswith(f"{path}/") for tap in taps)
    )
    # In eval mode, state is immutable: a network that changes it raises here.
    try:
      output, changed = module.apply(
        {"params": params, **state},
        images,
        **mode(train),
        rngs=rngs,
        mutable=[*(state if train else ()), "intermediates"],
        capture_intermediates=lambda submodule, method: (
          method == "__call__" and is_tap("/".join(submodule.path))
        ),
      )
    except (
      flax.errors.ModifyScopeVariableError,
      flax.errors.InvalidRngError,
    ) as error:
      if train:
        raise
      raise errors.InputError(pure_functions.CHANGES_IN_EVAL) from error
    changed = dict(changed)
    outputs = pure_functions.name_outputs(
      traverse_util.flatten_dict(changed.pop("intermediates", {}))
    )
    if train:
      model_state = changed | ({"rng": rng} if rng else {})
    return output, outputs, model_state

  def fold_in(model_state, number):
    if "rng" not in model_state:
      return model_state
    key = jax.random.wrap_key_data(model_state["rng"]["key"])
    key = jax.random.fold_in(key, number)
    return {**model_state, "rng": {"key": jax.random.key_data(key)}}

  return pure_functions.PureNetwork(
    init, apply, lambda state: state.get("batch_stats", {}), fold_in
  )
