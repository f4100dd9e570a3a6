"""NNX modules as pure functions."""

from __future__ import annotations

from flax import nnx, traverse_util
import jax

from l2t_jax import errors
from l2t_jax.models import pure_functions


def pure(model):
  """A module that exists, or a function that makes one."""
  exists = isinstance(model, nnx.Module)
  blank = nnx.clone(model) if exists else _make_abstract(model)
  mode = lambda train: pure_functions.mode(type(blank).__call__, train)
  graphs = {}
  for train in (False, True):
    blank.train() if train else blank.eval()
    graphs[train] = nnx.graphdef(blank)
  blanks = _params_and_others(blank)
  statistics = [
    tuple(map(str, path))
    for path, leaf in nnx.to_flat_state(blanks[1])
    if isinstance(leaf, nnx.BatchStat)
  ]

  def init(key, images):
    del images
    made = model if exists else _make(model, key)
    params, others = map(_to_dict, _params_and_others(made))
    return params, others

  def apply(params, model_state, images, train, taps):
    del taps
    states = map(_from_dict, blanks, (params, model_state))
    merged = nnx.merge(graphs[train], *states)
    output, outputs = nnx.capture(
      lambda merged: merged(images, **mode(train)),
      nnx.Intermediate,
      method_outputs=nnx.Intermediate,
    )(merged)
    calls = {path: x.get_value() for path, x in nnx.to_flat_state(outputs)}
    if train:
      model_state = _to_dict(_params_and_others(merged)[1])
    return output, pure_functions.by_path(calls), model_state

  def statistics_of(model_state):
    flat = traverse_util.flatten_dict(model_state)
    return [flat[path] for path in statistics]

  return pure_functions.Pure(init, apply, statistics_of)


def _params_and_others(module):
  return nnx.state(module, nnx.Param, ...)


def _make(make, key):
  made = make(nnx.Rngs(key))
  for _, node in nnx.iter_graph(made):
    if isinstance(node, nnx.Pytree):
      for name, value in list(vars(node).items()):
        # NNX takes arrays that are traced for static attributes.
        if isinstance(value, jax.core.Tracer):
          setattr(node, name, nnx.data(value))
  return made


def _make_abstract(make):
  try:
    made = nnx.eval_shape(lambda: _make(make, 0))
  except TypeError as error:
    raise errors.InputError(
      f"{make!r} does not make a network from rngs: {error}"
    ) from error
  if not isinstance(made, nnx.Module):
    raise errors.InputError(
      f"{make!r} made a {type(made).__name__}; it must make an NNX module"
    )
  return made


def _to_dict(state):
  """An NNX state as a nested dict with names as keys, of plain arrays."""
  plain = lambda x: jax.random.key_data(x) if pure_functions.is_key(x) else x
  return traverse_util.unflatten_dict(
    {
      tuple(map(str, path)): plain(_value(leaf))
      for path, leaf in nnx.to_flat_state(state)
    }
  )


def _from_dict(like, tree):
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
  """The array of a variable; a module may also hold arrays as they are."""
  return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
