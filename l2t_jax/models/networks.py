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

from collections.abc import Callable, Collection, Mapping, Sequence
import fnmatch
import inspect
import math
import re
from typing import Any, NamedTuple

import chex
import flax
from flax import linen as nn
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp

from l2t_jax import types

Shape = tuple[int, int, int]
# Arguments of a module that say whether it trains, and what says that it does.
_MODES = {
  "train": True,
  "training": True,
  "is_training": True,
  "deterministic": False,
  "use_running_average": False,
}
_SAY_IT = (
  f"let its __call__ have one of the arguments {', '.join(_MODES)}; a module of"
  " NNX may follow .train() and .eval() instead"
)
# As many taps are proposed where all have the same resolution.
_NUM_PROPOSED = 4


class Functions(NamedTuple):
  """A network by hand.

  Params and model state are nested dicts of plain arrays, their keys strings.
  Without a state it may return None for it, and is handed {}.
  """

  # key -> (params, model_state).
  init: Callable[[chex.PRNGKey], tuple[types.PyTree, types.PyTree]]
  # (params, model_state, images, *, train) -> (logits, features, model_state).
  apply: types.ApplyFn


Network = nn.Module | nnx.Module | Callable[[nnx.Rngs], nnx.Module] | Functions


class Layout(NamedTuple):
  """What a network consists of."""

  image_shape: Shape
  # Shapes: {"params": ..., and the collections of its model state}.
  variables: types.PyTree
  output_shape: tuple[int, ...]  # Of what it makes of one image.
  taps: dict[str, Shape]  # Tap -> (H, W, C), in the order of computation.
  # Outputs of other forms, likewise.
  others: dict[str, tuple[int, ...]]
  default_taps: tuple[str, ...]  # The network's own choice; () for none.


class _Pure(NamedTuple):
  """What the libraries have in common."""

  # (key, images) -> (params, model_state).
  init: Callable[[chex.PRNGKey, jax.Array], tuple[types.PyTree, types.PyTree]]
  # (params, model_state, images, train, taps) -> (output, outputs of
  # submodules by path, model_state); taps None: of all submodules.
  apply: Callable[..., tuple[Any, dict[str, Any], types.PyTree]]
  # model_state -> what of it is moved by training, but for keys.
  statistics: Callable[[types.PyTree], types.PyTree]


def as_apply_fn(
  network: Network, taps: Collection[str] | None = None
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
    logits, features = _split(output, outputs)
    features = {name: _as_map(x) for name, x in features.items()}
    wanted = lambda name: taps is None or name in taps
    features = {
      name: x for name, x in features.items() if x is not None and wanted(name)
    }
    return logits, features, model_state

  return jax.jit(apply_fn, static_argnames="train")


def init(
  network: Network, key: chex.PRNGKey, image_shape: Shape
) -> tuple[types.PyTree, types.PyTree]:
  """Initialise a network; return (params, model_state).

  An NNX module that exists already keeps its values, whatever the key.
  """
  images = jnp.zeros((1, *image_shape))
  return jax.jit(_pure(network).init)(key, images)


def trace(network: Network, image_shape: Shape) -> Layout:
  """Find out what a network consists of, without running it.

  Args:
    network: see above.
    image_shape: (H, W, C) of its images.

  Raises:
    types.InputError: it is no network, the images are empty, or its variables
      are no nested dicts of plain arrays.
  """
  if min(image_shape) < 1:
    raise types.InputError(
      f"images are {list(image_shape)}, [H, W, C]; all of these must be at"
      " least 1"
    )
  pure = _pure(network)

  def run(key, images):
    params, model_state = pure.init(key, images)
    _check_variables("params", params)
    _check_variables("model_state", model_state)
    output, outputs, _ = pure.apply(params, model_state, images, False, None)
    logits, features = _split(output, outputs)
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
    as_map = jax.eval_shape(_as_map, features[name])
    if as_map is None:
      others[name] = features[name].shape[1:]
    else:
      taps[name] = as_map.shape[1:]
  default_taps = tuple(getattr(network, "default_taps", None) or ())
  return Layout(
    image_shape, variables, logits.shape[1:], taps, others, default_taps
  )


def training_notes(
  network: Network, layout: Layout, batch_size: int
) -> tuple[str, ...]:
  """Say what may not be meant where a network trains, a line each.

  Batch statistics that never move belong to a network that is meant to keep
  them, or to one that is not told that it trains.

  Args:
    network: see above.
    layout: of it, from `trace`.
    batch_size: of its images in training.
  """
  if isinstance(network, Functions):
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
    f" {_SAY_IT}",
  )


def select_taps(
  layout: Layout, patterns: Sequence[str] = ()
) -> dict[str, Shape]:
  """Choose taps by name.

  Args:
    layout: of the network, from `trace`.
    patterns: names, or globs such as "stages_*/blocks_2", where * stands for
      any part of one name and ** for several. None: the network's
      `default_taps`, or else `propose_taps`.

  Returns:
    Tap -> (H, W, C), in the order of computation.

  Raises:
    types.InputError: for a pattern that no tap fits.
  """
  chosen = set()
  for pattern in patterns or layout.default_taps or propose_taps(layout.taps):
    found = [name for name in layout.taps if _fits(name, pattern)]
    if not found:
      raise types.InputError(_no_tap(pattern, layout))
    chosen.update(found)
  return {name: x for name, x in layout.taps.items() if name in chosen}


def no_taps(layout: Layout) -> dict[str, str]:
  """Say of the layers that cannot be tapped why; name -> reason."""
  return {
    name: (
      f"tap {name!r} has the shape {['B', *shape]}; taps are maps [B, H, W, C],"
      " or tokens [B, N, C] where N is a square number, or one more with a"
      " class token; none of these is 0"
    )
    for name, shape in layout.others.items()
  }


def last_tap(shapes: Mapping[str, Shape]) -> str:
  """Return the tap that is computed last; raise `types.InputError` for none."""
  if not shapes:
    raise types.InputError(
      "the network has no layer that could be tapped: none of its submodules"
      " returns a map [B, H, W, C] or tokens [B, N, C]; let it return (logits,"
      " features), a dict of such arrays"
    )
  return list(shapes)[-1]


def propose_taps(shapes: Mapping[str, Shape]) -> tuple[str, ...]:
  """Propose taps where none are named: the last one of each resolution.

  Where all have the same, as in a transformer, four of the blocks that repeat,
  evenly spaced.

  Args:
    shapes: tap -> (H, W, C), in the order of computation.

  Raises:
    types.InputError: there are none.
  """
  last = last_tap(shapes)
  # Small maps say little, and deep paths lead into the parts of a block.
  maps = {n: s[:2] for n, s in shapes.items() if s[0] * s[1] > 1}
  if len(maps) < 2:
    return (*maps,) or (last,)
  depths = sorted(name.count("/") for name in maps)
  maps = {n: size for n, size in maps.items() if n.count("/") <= depths[1]}
  by_size = {size: name for name, size in maps.items()}
  if len(by_size) > 1:
    return tuple(by_size.values())
  groups: dict[str, list[str]] = {}
  for name in maps:
    groups.setdefault(re.sub(r"\d+", "", name), []).append(name)
  blocks = max(groups.values(), key=len)
  if len(blocks) == 1:
    return tuple(by_size.values())
  count = min(_NUM_PROPOSED, len(blocks))
  return tuple(blocks[(i + 1) * len(blocks) // count - 1] for i in range(count))


def _split(output, outputs):
  """Return (logits, features) of what a network and its submodules return."""
  if isinstance(output, tuple) and len(output) == 2:
    logits, features = output
    if isinstance(features, Mapping):
      return logits, dict(features)
  if not hasattr(output, "shape"):
    raise types.InputError(
      f"the network returns a {type(output).__name__}; it must return logits or"
      " (logits, features), a dict of arrays"
    )
  return output, outputs


def _as_map(x):
  """[B, H, W, C] as it is, tokens [B, N, C] as a square map, else None."""
  if not hasattr(x, "ndim") or not x.size:
    return None
  if x.ndim == 4:
    return x
  if x.ndim != 3:
    return None
  size, num_tokens, channels = x.shape
  for first in (0, 1):  # Without a class token, and with one.
    side = math.isqrt(max(num_tokens - first, 0))
    if side and side**2 == num_tokens - first:
      return x[:, first:].reshape(size, side, side, channels)
  return None


def _fits(name, pattern):
  if "**" in pattern:
    return fnmatch.fnmatchcase(name, pattern)
  parts, patterns = name.split("/"), pattern.split("/")
  return len(parts) == len(patterns) and all(
    map(fnmatch.fnmatchcase, parts, patterns)
  )


def _no_tap(pattern, layout):
  for name, reason in no_taps(layout).items():
    if _fits(name, pattern):
      return reason
  return (
    f"unknown tap {pattern!r}; the network's taps are {', '.join(layout.taps)}"
  )


def _pure(network) -> _Pure:
  if isinstance(network, nn.Module):
    return _linen(network)
  if isinstance(network, Functions):
    return _functions(network)
  if isinstance(network, nnx.Module) or callable(network):
    return _nnx(network)
  raise types.InputError(
    f"{network!r} is no network: a Linen module, an NNX module, a function that"
    " makes one from rngs, or l2t_jax.models.Functions is needed"
  )


def _check_variables(name, tree):
  """Make sure that files can name every array, and hold it."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    keys = [getattr(entry, "key", None) for entry in path]  # None in a tuple.
    is_named = keys and all(isinstance(k, str) and "/" not in k for k in keys)
    is_number = isinstance(leaf, int | float)
    is_array = hasattr(leaf, "dtype") and not _is_key(leaf)
    if not (is_named and (is_number or is_array)):
      raise types.InputError(
        f"the network's {name}{jax.tree_util.keystr(path)} cannot be saved:"
        " params and model state must be nested dicts of plain arrays, with"
        " strings without '/' as keys; of a random key, keep"
        " jax.random.key_data(key)"
      )


def _mode(call, train):
  """Keyword arguments that tell a module whether it trains."""
  names = inspect.signature(call).parameters
  return {
    name: train == when_training
    for name, when_training in _MODES.items()
    if name in names
  }


def _functions(functions):
  or_empty = lambda tree: tree if jax.tree.leaves(tree) else {}

  def init(key, images):
    del images
    params, model_state = functions.init(key)
    return or_empty(params), or_empty(model_state)

  def apply(params, model_state, images, train, taps):
    del taps
    logits, features, model_state = functions.apply(
      params, model_state, images, train=train
    )
    return (logits, features), {}, or_empty(model_state)

  return _Pure(init, apply, lambda model_state: {})


def _linen(module):
  mode = lambda train: _mode(module.__call__, train)

  def init(key, images):
    keys = {"params": key, "dropout": key}
    # Without the names of axes that `nn.with_partitioning` puts around arrays.
    variables = dict(nn.unbox(module.init(keys, images, **mode(False))))
    variables.pop("intermediates", None)

    def after_training(rngs):
      return jax.eval_shape(
        lambda: module.apply(
          variables, images, **mode(True), rngs=rngs, mutable=list(variables)
        )
      )[1]

    try:
      after, draws = after_training({}), False
    except flax.errors.InvalidRngError:
      after, draws = after_training(keys), True
    shape_of = lambda tree: jax.tree.map(jnp.shape, tree)
    # What a module sows grows with every call: it is an output and no state.
    variables = {
      name: values
      for name, values in variables.items()
      if name == "params" or shape_of(after[name]) == shape_of(values)
    }
    if draws:
      key = jax.random.fold_in(key, 1)
      variables["rng"] = {"key": jax.random.key_data(key)}
    return variables.pop("params", {}), variables

  def apply(params, model_state, images, train, taps):
    state, rngs = dict(model_state), {}
    rng = state.pop("rng", None)
    if train and rng:
      keys = jax.random.split(jax.random.wrap_key_data(rng["key"]), 3)
      # Flax takes streams of other names from "params".
      rngs = {"dropout": keys[0], "params": keys[1]}
      rng = {"key": jax.random.key_data(keys[2])}
    is_tap = lambda path: (
      taps is None or any(tap.partition("#")[0] == path for tap in taps)
    )
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
    except flax.errors.ModifyScopeVariableError as error:
      raise types.InputError(
        f"the network changes its state in eval mode, too; {_SAY_IT}"
      ) from error
    changed = dict(changed)
    outputs = _by_path(
      traverse_util.flatten_dict(changed.pop("intermediates", {}))
    )
    if train:
      model_state = changed | ({"rng": rng} if rng else {})
    return output, outputs, model_state

  return _Pure(init, apply, lambda state: state.get("batch_stats", {}))


def _nnx(model):
  """A module that exists, or a function that makes one."""
  exists = isinstance(model, nnx.Module)
  blank = nnx.clone(model) if exists else _make_abstract(model)
  mode = lambda train: _mode(type(blank).__call__, train)
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
    return output, _by_path(calls), model_state

  def statistics_of(model_state):
    flat = traverse_util.flatten_dict(model_state)
    return [flat[path] for path in statistics]

  return _Pure(init, apply, statistics_of)


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
    raise types.InputError(
      f"{make!r} does not make a network from rngs: {error}"
    ) from error
  if not isinstance(made, nnx.Module):
    raise types.InputError(
      f"{make!r} made a {type(made).__name__}; it must make an NNX module"
    )
  return made


def _to_dict(state):
  """An NNX state as a nested dict with names as keys, of plain arrays."""
  plain = lambda x: jax.random.key_data(x) if _is_key(x) else x
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
    if _is_key(_value(leaf)):
      x = jax.random.wrap_key_data(x)
    is_variable = isinstance(leaf, nnx.Variable)
    leaves.append((path, leaf.replace(x) if is_variable else x))
  return nnx.from_flat_state(leaves)


def _value(leaf):
  """The array of a variable; a module may also hold arrays as they are."""
  return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _is_key(x):
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _by_path(outputs):
  """{(module, ..., "__call__"): outputs of its calls} -> {name: output}."""
  return {
    "/".join(map(str, path)) + (f"#{i}" if i else ""): output
    for (*path, method), calls in outputs.items()
    if method == "__call__" and path
    for i, output in enumerate(calls)
  }
