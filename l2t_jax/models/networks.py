"""Any network as pure functions, with any of its layers as a tap.

A network is one of

  * a Linen module;
  * an NNX module, or a function `make(rngs)` that makes one;
  * `Functions`.

It maps images to logits, or to (logits, features), where features is a dict
tap -> [B, H, W, C]. If it returns no such dict, the output of every submodule
is a tap, named by the submodule's path, such as "stages_1/blocks_0"; outputs of
further calls of the same submodule are "stages_1/blocks_0#1" and so on. The
layers of a `jax.lax.scan` are "stages_1/scan/0" and so on, whichever library
calls it. The keys of nested dicts are joined with "/"; of a tuple, the first
element is used. Taps are maps [B, H, W, C] or tokens [B, N, C], which are
reshaped to maps. Prefix tokens (class, register and distillation tokens) are
dropped: the number of patches is the number of positions of one of the
network's maps, or else N or N - 1 must be a square number.

A module that behaves differently in training must take an argument `train`,
`training`, `is_train`, `is_training`, `inference`, `deterministic` or
`use_running_average`, or, in NNX, follow `.train()` and `.eval()`. The PRNG
key of dropout is part of the model state.
"""

from __future__ import annotations

from collections.abc import Collection
import contextlib
import functools

import chex
from flax import linen as nn
from flax import nnx
import jax
from jax import extend
import jax.numpy as jnp

from l2t_jax import errors, fingerprints, types
from l2t_jax.models import from_linen, from_nnx, pure_functions, scans, tapping

# Batch size for tracing; above 1, to tell the batch axis from others.
_BATCH = 2


def as_apply_fn(
  network: pure_functions.Network,
  taps: Collection[str] | None = None,
  batch_norm_groups: int = 1,
) -> types.ApplyFn:
  """Convert a network to a pure function.

  Args:
    network: see the module's docstring.
    taps: names of the features to return; None for all.
    batch_norm_groups: number of equal parts of a training batch that are
      normalised separately (ghost batch normalisation: Hoffer et al., "Train
      longer, generalize better", NeurIPS 2017). The new model state is the mean
      over the parts, so that running variances leave out the variance between
      the parts. Each part draws its own random numbers.

  Returns:
    `apply_fn(params, model_state, images, *, train)`, jitted, which returns
    (logits [B, K], features, model_state). In eval mode it returns the
    model_state that it was given.
  """
  pure = _to_pure(network)

  def apply_fn(params, model_state, images, *, train):
    run = _with_features(pure, train, taps)
    logits, outputs, after = run(params, model_state, images)
    chosen = {
      name: x for name, x in outputs.items() if taps is None or name in taps
    }
    # The grid of tokens depends on all maps of the network, not just the chosen
    # ones: compute their shapes, without running it.
    maps: tuple[tuple[int, int], ...] = ()
    if any(x.ndim == 3 for x in chosen.values()):
      everything = jax.eval_shape(
        _with_features(pure, False), params, model_state, images
      )
      maps = tapping.map_sizes(everything[1])
    features = {
      name: x
      for name, output in chosen.items()
      if (x := tapping.as_map(output, images.shape[0], maps)) is not None
    }
    return logits, features, after if train else model_state

  def apply_to_groups(params, model_state, images, *, train):
    if not train:
      return apply_fn(params, model_state, images, train=False)

    def apply_to_group(index, images):
      state = pure.fold_in(model_state, index)
      return apply_fn(params, state, images, train=True)

    if len(images) % batch_norm_groups:
      raise errors.InputError(
        f"a batch of {len(images)} images cannot be split into"
        f" {batch_norm_groups} equal groups for batch norm"
      )
    # Neighbouring rows stay in one group, and so on one device.
    groups = images.reshape(batch_norm_groups, -1, *images.shape[1:])
    *outputs, states = jax.vmap(apply_to_group)(
      jnp.arange(batch_norm_groups), groups
    )
    logits, features = jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:]), outputs
    )
    return logits, features, jax.tree.map(_state_of_groups, states)

  return jax.jit(
    apply_fn if batch_norm_groups == 1 else apply_to_groups,
    static_argnames="train",
  )


def init(
  network: pure_functions.Network, key: chex.PRNGKey, image_shape: tapping.Shape
) -> tuple[types.PyTree, types.PyTree]:
  """Initialise a network; return (params, model_state).

  An NNX module that exists already keeps its values and ignores the key.

  Args:
    network: see the module's docstring.
    key: PRNG key; consumed.
    image_shape: (H, W, C) of its images.
  """
  images = jnp.zeros((1, *image_shape))
  return jax.jit(_to_pure(network).init)(key, images)


def attributes(network: pure_functions.Network | None) -> str:
  """Return the attributes of a network as text, without values of variables.

  Functions show by their names alone, or not at all.
  """
  if isinstance(network, nn.Module):
    return fingerprints.without_addresses(repr(network))
  if isinstance(network, pure_functions.Functions) or network is None:
    return getattr(network, "digest", "")
  abstract = from_nnx.make_abstract(network)
  abstract.eval()  # Whichever mode it is in.
  return fingerprints.without_addresses(repr(abstract))


def fold_in(
  network: pure_functions.Network,
  model_state: types.PyTree,
  number: chex.Numeric,
) -> types.PyTree:
  """Return a model state with other PRNG keys, which depend on a number."""
  return _to_pure(network).fold_in(model_state, number)


def trace(
  network: pure_functions.Network, image_shape: tapping.Shape
) -> tapping.Layout:
  """Find the variables, outputs and taps of a network without running it.

  Args:
    network: see the module's docstring.
    image_shape: (H, W, C) of its images.

  Raises:
    errors.InputError: this is not a network, the images are empty, the
      variables are not nested dicts of plain arrays, or it changes its state in
      eval mode.
  """
  if min(image_shape) < 1:
    raise errors.InputError(
      f"images are {list(image_shape)}, [H, W, C]; all of these must be at"
      " least 1"
    )
  pure = _to_pure(network)

  def init_and_run(key, images):
    params, model_state = pure.init(key, images)
    pure_functions.check_variables("params", params)
    pure_functions.check_variables("model_state", model_state)
    run = _with_features(pure, train=False)
    logits, features, after = run(params, model_state, images)
    constants = [pure.constant(state) for state in (model_state, after)]
    return *constants, {"params": params, **model_state}, logits, features

  images = jax.ShapeDtypeStruct((_BATCH, *image_shape), jnp.float32)
  with _report_axis_names():
    jaxpr, shapes = jax.make_jaxpr(init_and_run, return_shape=True)(
      jax.random.key(0), images
    )
  before, _, variables, logits, features = shapes
  places = _positions(jaxpr.jaxpr, jaxpr.jaxpr.outvars)
  middle = len(jax.tree.leaves(before))
  if places[:middle] != places[middle : 2 * middle]:
    raise errors.InputError(pure_functions.CHANGES_IN_EVAL)
  # Features are the last outputs, in the order of the sorted names.
  first = len(places) - len(features)
  position = dict(zip(sorted(features), places[first:], strict=True))
  # A module that returns its child's output comes after the child.
  order = lambda name: (position[name], -name.count("/"))
  taps, untappable = {}, {}
  maps = tapping.map_sizes(features)
  to_map = functools.partial(tapping.as_map, batch_size=_BATCH, maps=maps)
  for name in sorted(features, key=order):
    as_map = jax.eval_shape(to_map, features[name])
    if as_map is None:
      shape = features[name].shape
      untappable[name] = tapping.explain_untappable(name, shape, _BATCH)
    else:
      taps[name] = as_map.shape[1:]
  program = fingerprints.without_addresses(str(jaxpr.jaxpr))
  constants = [x for x in jaxpr.consts if not pure_functions.is_key(x)]
  return tapping.Layout(
    image_shape,
    variables,
    logits.shape[1:],
    taps,
    untappable,
    _default_taps(network),
    fingerprints.fingerprint((program, constants)),
  )


def _positions(jaxpr, variables):
  """Return where a jaxpr computes variables, as tuples that can be sorted.

  These are the indices of an equation and of its output or, if the equation
  calls a function, such as one under `jax.jit` or `jax.checkpoint`, of the
  equations within. It is (-1, k) for the k-th argument, also if functions pass
  it through, and (-2,) for a constant.
  """

  @functools.cache
  def tables(jaxpr):
    computed = {
      variable: (i, j)
      for i, equation in enumerate(jaxpr.eqns)
      for j, variable in enumerate(equation.outvars)
    }
    return computed, {variable: k for k, variable in enumerate(jaxpr.invars)}

  def position(jaxpr, variable):
    computed, arguments = tables(jaxpr)
    if isinstance(variable, extend.core.Literal) or (
      variable not in computed and variable not in arguments
    ):
      return (-2,)
    if variable in arguments:
      return (-1, arguments[variable])
    i, j = computed[variable]
    equation = jaxpr.eqns[i]
    called = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
    called = getattr(called, "jaxpr", called)  # It may be closed.
    if called is None or len(called.outvars) != len(equation.outvars):
      return (i, j)
    first, *within = position(called, called.outvars[j])
    if first == -1:
      return position(jaxpr, equation.invars[within[0]])
    return (i, first, *within)

  return [position(jaxpr, variable) for variable in variables]


def _default_taps(network):
  """Return the names of the taps that a network proposes itself."""
  kinds = (nn.Module, nnx.Module, pure_functions.Functions)
  if not isinstance(network, kinds):  # A function that makes an NNX module.
    network = from_nnx.make_abstract(network)
  return tuple(getattr(network, "default_taps", None) or ())


def training_notes(
  network: pure_functions.Network, layout: tapping.Layout, batch_size: int
) -> tuple[str, ...]:
  """Return warnings about training a network, one line each.

  If training does not change the batch statistics, they are either frozen on
  purpose, or the network is not told that it is in train mode.

  Args:
    network: see the module's docstring.
    layout: the network's layout, from `trace`.
    batch_size: number of images in a training batch.
  """
  if isinstance(network, pure_functions.Functions):
    return ()  # It is unknown which part of their state is batch statistics.
  pure = _to_pure(network)
  model_state = dict(layout.variables)
  params = model_state.pop("params")

  def statistics(params, model_state, images):
    *_, model_state = pure.apply(params, model_state, images, True, ())
    return pure.statistics(model_state)

  shape = (batch_size, *layout.image_shape)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  jaxpr = jax.make_jaxpr(statistics)(params, model_state, images).jaxpr
  # Statistics that do not change are inputs that the jaxpr returns as outputs.
  if not jaxpr.outvars or not all(x in jaxpr.invars for x in jaxpr.outvars):
    return ()
  return (
    "training does not update the target's batch statistics; if it should,"
    f" {pure_functions.HOW_TO_TELL}",
  )


def _state_of_groups(values):
  """Reduce one array of the model state over its leading axis of groups."""
  if jnp.issubdtype(values.dtype, jnp.floating):
    return jnp.mean(values, axis=0)
  return values[0]  # A counter, or the data of a PRNG key.


def _with_features(pure, train, taps=None):
  """Return a function that runs a pure network and names its outputs.

  It maps (params, model_state, images) to (logits, name -> array, model_state).
  """

  def run(params, model_state, images):
    output, outputs, model_state = pure.apply(
      params, model_state, images, train, taps
    )
    return *tapping.split(output, outputs), model_state

  def run_with_layers(*args):
    (logits, features, model_state), layers = scans.with_layers(run)(*args)
    return logits, layers | features, model_state

  needs_layers = taps is None or any(map(scans.is_layer, taps))
  return run_with_layers if needs_layers else run


@contextlib.contextmanager
def _report_axis_names():
  """Convert JAX's error about a named axis to an `errors.InputError`."""
  try:
    yield
  except NameError as error:
    if "axis name" not in str(error):
      raise
    raise errors.InputError(
      f"the network needs an axis with a name ({errors.in_one_line(error)});"
      " leave out its axis_name: statistics cover all devices anyway"
    ) from error


def _to_pure(network) -> pure_functions.PureNetwork:
  """Convert a network of any library to pure functions."""
  if isinstance(network, nn.Module):
    return from_linen.from_linen(network)
  if isinstance(network, pure_functions.Functions):
    return pure_functions.from_functions(network)
  if isinstance(network, nnx.Module) or callable(network):
    return from_nnx.from_nnx(network)
  raise errors.InputError(
    f"{network!r} is not a network; give a Linen module, an NNX module, a"
    " function that makes one from rngs, or l2t_jax.models.Functions"
  )
