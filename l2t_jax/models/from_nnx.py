"""NNX modules as pure functions."""

from __future__ import annotations

import functools
from typing import Any

from flax import nnx, traverse_util
import jax

from l2t_jax import errors, types
from l2t_jax.models import pure_functions


def from_nnx(model: Any) -> pure_functions.PureNetwork:
  """Convert an NNX module, or a function `make(rngs)` that makes one.

  Params are the module's `nnx.Param`s. The model state holds everything else:
  batch statistics, PRNG keys, and plain arrays among the attributes.

  Raises:
    errors.InputError: the function does not make an NNX module.
  """
  is_module = isinstance(model, nnx.Module)
  abstract: Any = nnx.clone(model) if is_module else make_abstract(model)
  for path, module in nnx.iter_modules(abstract):
    if isinstance(module, nnx.bridge.ToNNX):
      raise errors.InputError(
        f"{'.'.join(map(str, path)) or 'the network'} is a Linen module inside"
        " NNX (nnx.bridge.ToNNX), whose layers cannot be tapped; give the Linen"
        " module itself, or write it in NNX"
      )
  mode = functools.partial(pure_functions.mode_arguments, abstract.__call__)
  # The mode is part of the static graph: keep one graph per mode.
  graphs = {}
  for train in (False, True):
    abstract.train() if train else abstract.eval()
    graphs[train] = nnx.graphdef(abstract)
  abstract_states = _split(abstract)

  def init(key, images):
    del images
    params, others = _split(model if is_module else _make(model, key))
    return _to_dict(params), _to_dict(others)

  def apply(params, model_state, images, train, taps):
    del taps
    states = map(_from_dict, abstract_states, (params, model_state))
    merged = nnx.merge(graphs[train], *states)
    output, outputs = nnx.capture(
      lambda merged: merged(images, **mode(train)),
      nnx.Intermediate,
      method_outputs=nnx.Intermediate,
    )(merged)
    calls = {path: x.get_value() for path, x in nnx.to_flat_state(outputs)}
    model_state = _to_dict(_split(merged)[1])
    return output, pure_functions.name_outputs(calls), model_state

  def statistics(model_state):
    return _from_dict(abstract_states[1], model_state).filter(nnx.BatchStat)

  def constant(model_state):
    kinds = (nnx.BatchStat, nnx.RngCount)
    return _from_dict(abstract_states[1], model_state).filter(kinds)

  def fold_in(model_state, number):
    def fold(x):
      if not pure_functions.is_key(x):
        return x
      # `nnx.split_rngs` makes arrays of keys.
      folded = jax.vmap(jax.random.fold_in, (0, None))(x.reshape(-1), number)
      return folded.reshape(x.shape)

    state = _from_dict(abstract_states[1], model_state)
    return _to_dict(jax.tree.map(fold, state))

  return pure_functions.PureNetwork(init, apply, statistics, fold_in, constant)


def _split(module):
  """Return the NNX states (parameters, everything else)."""
  return nnx.state(module, nnx.Param, ...)


def _make(make, key):
  """Make a module from a PRNG key; `make` may be traced."""
  module = make(nnx.Rngs(key))
  for _, node in nnx.iter_graph(module):
    if isinstance(node, nnx.Pytree):
      for name, value in list(vars(node).items()):
        # NNX would treat a traced array as a static attribute.
        if isinstance(value, jax.core.Tracer):
          setattr(node, name, nnx.data(value))
  return module


def make_abstract(model: Any) -> nnx.Module:
  """Return a copy of a module, with shapes and dtypes in place of arrays.

  Args:
    model: an NNX module, or a function `make(rngs)` that makes one.

  Raises:
    errors.InputError: the function does not make an NNX module.
  """
  if isinstance(model, nnx.Module):
    return nnx.eval_shape(lambda: nnx.clone(model))
  return _call_abstractly(model)


def _call_abstractly(make):
  try:
    module = nnx.eval_shape(lambda: _make(make, 0))
  except TypeError as error:
    raise errors.InputError(
      f"{make!r} does not make a network from rngs: {error}"
    ) from error
  if not isinstance(module, nnx.Module):
    raise errors.InputError(
      f"{make!r} made a {type(module).__name__}; it must make an NNX module"
    )
  return module


def _to_dict(state: nnx.State) -> types.PyTree:
  """Convert an NNX state to a nested dict of plain arrays with string keys."""
  # Weight files cannot hold typed PRNG keys, but can hold their data.
  plain = lambda x: jax.random.key_data(x) if pure_functions.is_key(x) else x
  return traverse_util.unflatten_dict(
    {
      tuple(map(str, path)): plain(_value(leaf))
      for path, leaf in nnx.to_flat_state(state)
    }
  )


def _from_dict(like: nnx.State, tree: types.PyTree) -> nnx.State:
  """Undo `_to_dict`; `like` is a state of the same structure."""
  flat = traverse_util.flatten_dict(tree)
  leaves = []
  for path, leaf in nnx.to_flat_state(like):
    x = flat[tuple(map(str, path))]
    if pure_functions.is_key(_value(leaf)):
      x = jax.random.wrap_key_data(x)
    is_variable = isinstance(leaf, nnx.Variable)
    leaves.append((path, leaf.replace(x) if is_variable else x))
  return nnx.from_flat_state(leaves)


def _value(leaf):
  """Return the array of a variable; a module may also hold plain arrays."""
  return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
