"""Differentiate through an inner loop of training.

Meta-parameters φ shape an inner training run of parameters θ,

    θ_{k+1} = θ_k + update(∇_θ L_inner(θ_k, φ, batch_k)),    k = 0 .. T-1,

and are evaluated by an outer loss at its end, L_outer(θ_T, φ). The
hypergradient is dL_outer/dφ through all T steps, including the state of the
optimizer.

This module does not depend on a network, a data set or Flax: parameters are
pytrees, losses are functions that the caller passes in (`types.InnerLossFn`),
and the inner optimizer is any differentiable optax transformation. Of a step's
arguments,

  * `params` and `opt_state` are differentiated through;
  * the hypergradient is taken with respect to `meta_params`;
  * `model_state` (batch statistics) and `batch` are constants, with a
    `stop_gradient` in every mode. Arrays that should be learned, such as
    images, belong in `meta_params`.

A loss may close over other values; derivatives with respect to them are right,
too.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
import functools
import itertools
import operator
from typing import Any

import chex
import jax
from jax import custom_derivatives, extend, flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax import errors, types

# How the hypergradient is computed. All modes agree up to rounding.
#   reverse:    reverse over reverse; keeps the graphs of all steps.
#   remat:      like reverse, but recomputes each step in the backward pass
#               (jax.checkpoint).
#   mixed:      forward over reverse: in the backward pass one jvp of the joint
#               gradient gives the Hessian-vector and the mixed product. Between
#               the passes a step keeps only its inputs.
#   linearized: the same products from a linearization that each step keeps:
#               nothing is computed twice, and memory grows with T.
MODES = ("reverse", "remat", "mixed", "linearized")

# (state, meta_params, batch) -> (state, loss []).
StepFn = Callable[
  [types.InnerState, types.PyTree, types.PyTree],
  tuple[types.InnerState, chex.Array],
]
# (state, meta_params, batch) -> the state after several steps.
LookAhead = Callable[
  [types.InnerState, types.PyTree, types.PyTree], types.InnerState
]


def make_inner_step(
  loss_fn: types.InnerLossFn,
  optimizer: optax.GradientTransformation,
  *,
  mode: str = "linearized",
) -> StepFn:
  """Build one differentiable step of inner training.

  Args:
    loss_fn: the inner loss, `types.InnerLossFn`.
    optimizer: a differentiable optax transformation. Adam needs
      `eps_root > 0`, such as 1e-24.
    mode: how a derivative of the step is computed, one of `MODES`. "mixed" and
      "linearized" always trace the loss: none of its arguments can decide what
      Python does.

  Returns:
    `step(state, meta_params, batch) -> (state, loss [])`. The loss is a
    metric, with a `stop_gradient`.

  Raises:
    errors.InputError: the mode is unknown; or, when the step is traced,
      `check_differentiable` refuses the optimizer, the state does not match it,
      or the loss does not return (loss [], model_state).
  """
  if mode not in MODES:
    raise errors.InputError(
      f"unknown hypergradient mode {mode!r}; use one of {', '.join(MODES)}"
    )
  make_gradient = {
    "mixed": _mixed_gradient,
    "linearized": _linearized_gradient,
  }.get(mode, _gradient)
  gradient = make_gradient(_checked(loss_fn, keeps_model_state=True))

  @functools.cache  # A loop traces many steps.
  def check_optimizer(structure, *shapes):
    check_differentiable(optimizer, jax.tree.unflatten(structure, shapes))

  def step(state, meta_params, batch):
    _check_state(optimizer, state)
    leaves, structure = jax.tree.flatten(state.params)
    shapes = (
      jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in leaves
    )
    check_optimizer(structure, *shapes)
    model_state, batch = jax.lax.stop_gradient((state.model_state, batch))
    grads, loss, model_state = gradient(
      state.params, meta_params, model_state, batch
    )
    state = apply_gradients(optimizer, state, grads, model_state)
    return state, jax.lax.stop_gradient(loss)

  return jax.checkpoint(step) if mode == "remat" else step


def _checked(loss_fn, *, keeps_model_state=False):
  """Wrap a loss: raise if it does not return (loss [], model_state)."""
  name = getattr(loss_fn, "__name__", "the loss")

  def checked(params, meta_params, model_state, batch):
    result = loss_fn(params, meta_params, model_state, batch)
    if not (isinstance(result, tuple) and len(result) == 2):
      many = isinstance(result, tuple)
      found = f"{len(result)} values" if many else "1 value"
      raise errors.InputError(
        f"{name} returned {found}; it must return (loss, model_state), the"
        " model_state unchanged if nothing updates it"
      )
    loss, new_state = result
    if getattr(loss, "shape", () if isinstance(loss, float) else None) != ():
      raise errors.InputError(
        f"{name} returned a loss that is not a scalar; it must return (loss [],"
        " model_state)"
      )
    structures = map(jax.tree.structure, (model_state, new_state))
    if keeps_model_state and len(set(structures)) > 1:
      raise errors.InputError(
        f"{name} returned a model_state of another structure than it was given;"
        " return it unchanged if nothing updates it"
      )
    return result

  return checked


def _check_state(optimizer, state):
  """Reject a state that cannot be trained, or that is not the optimizer's."""
  _check_leaves(
    "state.params",
    state.params,
    jnp.inexact,
    "only arrays of floating-point numbers can be trained: split the rest off"
    " (equinox.partition, nnx.split)",
  )
  expected = jax.eval_shape(optimizer.init, state.params)
  structures = map(jax.tree.structure, (expected, state.opt_state))
  shapes = (
    [jnp.shape(x) for x in jax.tree.leaves(tree)]
    for tree in (expected, state.opt_state)
  )
  if len(set(structures)) > 1 or not operator.eq(*shapes):
    raise errors.InputError(
      "state.opt_state is not that of the step's optimizer for state.params;"
      " start with optimizer.init(params)"
    )


def apply_gradients(
  optimizer: optax.GradientTransformation,
  state: types.InnerState,
  grads: types.PyTree,
  model_state: types.PyTree,
) -> types.InnerState:
  """Update params with the optimizer and replace model_state."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return types.InnerState(params, opt_state, jax.lax.stop_gradient(model_state))


def unroll(
  step: StepFn,
  state: types.InnerState,
  meta_params: types.PyTree,
  batches: types.PyTree,
  *,
  num_steps: int | None = None,
  rolled: bool = True,
  segment_length: int | Sequence[int] = (),
  differentiated_steps: int | None = None,
) -> tuple[types.InnerState, chex.Array]:
  """Take several inner steps.

  Args:
    step: from `make_inner_step`.
    state: the state before the first step.
    meta_params: the same in every step.
    batches: leaves with a leading axis, one entry per step; or, if `num_steps`
      is given, one batch that every step uses.
    num_steps: T, if every step uses the same batch.
    rolled: True to run the steps after the first, if there are several, as a
      `lax.scan`, whose body is compiled once for any T. The first step stays
      outside the loop: if the initial state does not depend on the
      meta-parameters, its backward pass needs no Hessian-vector product, which
      a loop would compute anyway.
    segment_length: gradient checkpointing for long loops. Only the states
      between segments of this many steps are kept, and the backward pass
      recomputes one segment at a time (`jax.checkpoint`). A length of about √T
      needs the memory of 2 √T steps and the time of a second forward pass.
      Several lengths, from long to short, divide segments further:
      (T^⅔, T^⅓) needs the memory of 3 T^⅓ steps and two more forward passes.
      The derivative is exact.
    differentiated_steps: K, for truncated backpropagation (Shaban et al.,
      AISTATS 2019, arXiv 1810.10667). Only the last K steps are differentiated;
      the state before them is treated as a constant. The backward pass takes
      the time and memory of K steps. If K < T, the derivative is biased: it
      ignores the effect of φ on the earlier steps. None for all steps.

  Returns:
    The state after the last step and the losses [T] before each step.

  Raises:
    errors.InputError: `num_steps`, `segment_length` or `differentiated_steps`
      is not a positive integer, the lengths increase, the arrays of
      `batches` have no common leading axis, or `differentiated_steps` is given
      for a step of `only_while`.
  """
  lengths = segment_length
  if not isinstance(lengths, Sequence):
    lengths = (lengths,)
  _check_counts("segment_length", *lengths)
  if any(long < short for long, short in itertools.pairwise(lengths)):
    raise errors.InputError(
      f"segment_length is {segment_length}; give the longest length first"
    )
  if num_steps is not None:
    _check_counts("num_steps", num_steps)
  if differentiated_steps is not None:
    _check_counts("differentiated_steps", differentiated_steps)
    if getattr(step, "is_bounded", False):
      raise errors.InputError(
        "differentiated_steps counts the steps that only_while does not take;"
        " use segment_length to save memory"
      )
  if num_steps is None:
    # NumPy arrays cannot be indexed with the traced step of a `lax.scan`.
    batches = jax.tree.map(jnp.asarray, batches)
    lengths_given = {x.shape[:1] for x in jax.tree.leaves(batches)}
    if len(lengths_given) != 1 or lengths_given & {(), (0,)}:
      shapes = [x.shape for x in jax.tree.leaves(batches)]
      raise errors.InputError(
        f"batches has arrays of the shapes {shapes}, which must share a leading"
        " axis of at least one step; if every step uses the same batch, give"
        " num_steps"
      )
    ((num_steps,),) = lengths_given
    batch_of = lambda batches, k: jax.tree.map(lambda leaf: leaf[k], batches)
  else:
    batch_of = lambda batches, k: batches

  def take(state, meta_params, batches, steps):
    return jax.lax.scan(
      lambda state, k: step(state, meta_params, batch_of(batches, k)),
      state,
      steps,
    )

  steps = np.arange(num_steps)
  losses = []
  if differentiated_steps is not None and differentiated_steps < num_steps:
    early, steps = np.split(steps, [num_steps - differentiated_steps])
    constants = jax.lax.stop_gradient((state, meta_params))
    # A loss may also close over values that are differentiated.
    state, first_losses = jax.lax.stop_gradient(
      take(*constants, batches, early)
    )
    losses.append(first_losses)
  if not lengths:
    num_outside = 1 if rolled and len(steps) > 2 else len(steps)
    for k in steps[:num_outside]:
      state, loss = step(state, meta_params, batch_of(batches, k))
      losses.append(loss[None])
    if len(steps) > num_outside:
      state, more = take(state, meta_params, batches, steps[num_outside:])
      losses.append(more)
    return state, jnp.concatenate(losses)
  state, more = _in_segments(take, *lengths)(state, meta_params, batches, steps)
  return state, jnp.concatenate([*losses, more])


def _check_counts(name, *values):
  for value in values:
    if not isinstance(value, int | np.integer) or value < 1:
      raise errors.InputError(
        f"{name} is {value}; it must be a whole number from 1 on, known before"
        " the loop runs"
      )


def _in_segments(take, length, *shorter):
  """Make `take` keep only the states between segments of `length` steps."""
  take_again = jax.checkpoint(_in_segments(take, *shorter) if shorter else take)

  def run(state, meta_params, batches, steps):
    # All segments but the first have the same length, so that one scan runs
    # them.
    remainder = len(steps) % length
    first, others = steps[:remainder], steps[remainder:]
    losses = []
    if remainder:
      state, some = take_again(state, meta_params, batches, first)
      losses.append(some)
    state, most = jax.lax.scan(
      lambda state, segment: take_again(state, meta_params, batches, segment),
      state,
      others.reshape(-1, length),
    )
    return state, jnp.concatenate([*losses, jnp.ravel(most)])

  return run


def only_while(
  step: StepFn, keep_going: Callable[[types.InnerState], chex.Array]
) -> StepFn:
  """Return a step that does nothing once a condition is false.

  For loops whose number of steps depends on the data: pass such a step to
  `unroll`, with the largest number of steps. The derivative is that of the
  steps that were taken, whose number is treated as a constant.

  Args:
    step: from `make_inner_step`.
    keep_going: state -> bool [], evaluated before each step. It reads only the
      state, which a skipped step leaves unchanged: once it is false, no further
      step is taken.

  Returns:
    A step whose loss is NaN if it is skipped: counting the losses that are not
    NaN gives the number of steps taken.
  """

  def bounded(state, meta_params, batch):
    shapes = jax.eval_shape(step, state, meta_params, batch)[1]
    goes_on = keep_going(jax.lax.stop_gradient(state))
    if jnp.shape(goes_on) or jnp.result_type(goes_on) != jnp.bool_:
      raise errors.InputError(
        f"keep_going returned {jnp.result_type(goes_on)}"
        f" {list(jnp.shape(goes_on))}; it must return one bool"
      )
    return jax.lax.cond(
      goes_on,
      step,
      lambda state, *_: (state, jnp.full(shapes.shape, jnp.nan, shapes.dtype)),
      state,
      meta_params,
      batch,
    )

  # `unroll` cannot truncate such a step: it would count skipped steps too.
  bounded.is_bounded = True  # type: ignore[attr-defined]
  return bounded


def loss_after(
  look_ahead: LookAhead,
  outer_loss_fn: types.InnerLossFn,
  state: types.InnerState,
  batch: types.PyTree,
) -> Callable[[types.PyTree], chex.Array]:
  """Return meta-parameters -> outer loss []; see `hypergradient`."""

  def outer(meta_params):
    ahead = run_look_ahead(look_ahead, state, meta_params, batch)
    loss, _ = _checked(outer_loss_fn)(
      ahead.params, meta_params, ahead.model_state, batch
    )
    return loss

  return outer


def run_look_ahead(
  look_ahead: LookAhead,
  state: types.InnerState,
  meta_params: types.PyTree,
  batch: types.PyTree,
) -> types.InnerState:
  """Run a look-ahead.

  Raises:
    errors.InputError: it does not return a state.
  """
  ahead = look_ahead(state, meta_params, batch)
  if not isinstance(ahead, types.InnerState):
    raise errors.InputError(
      f"the look-ahead returned a {type(ahead).__name__}; it must return an"
      " InnerState, the first of what `unroll` returns"
    )
  return ahead


def hypergradient(
  look_ahead: LookAhead,
  outer_loss_fn: types.InnerLossFn,
  state: types.InnerState,
  meta_params: types.PyTree,
  batch: types.PyTree,
  *,
  forward: bool = False,
) -> tuple[chex.Array, types.PyTree]:
  """Differentiate the loss after a look-ahead w.r.t. the meta-parameters.

  Args:
    look_ahead: `(state, meta_params, batch) -> state`, made of inner steps.
    outer_loss_fn: loss of the state after the look-ahead; its new model_state
      is discarded.
    state: start of the look-ahead; a constant.
    meta_params: φ; the gradient is taken with respect to them.
    batch: argument of `look_ahead` and `outer_loss_fn`.
    forward: True for forward mode, which pushes one tangent per meta-parameter
      through the look-ahead in place of a backward pass. It suits a handful of
      meta-parameters, such as a learning rate: memory does not grow with the
      number of steps, but time grows with the number of meta-parameters. The
      steps need the mode "reverse" or "remat"; an implicit derivative has no
      forward mode. The derivative is exact.

  Returns:
    (outer loss [], gradient); the gradient is a pytree like `meta_params`.

  Raises:
    errors.InputError: `forward` with steps of another mode, or `meta_params`
      are not floating-point numbers.
  """
  _check_meta_params(meta_params)
  outer = loss_after(look_ahead, outer_loss_fn, state, batch)
  if not forward:
    return jax.value_and_grad(outer)(meta_params)
  flat, unravel = flatten_util.ravel_pytree(meta_params)
  push = lambda tangent: jax.jvp(
    lambda flat: outer(unravel(flat)), (flat,), (tangent,)
  )
  try:
    loss, slopes = jax.vmap(push, out_axes=(None, 0))(
      jnp.eye(flat.size, dtype=flat.dtype)
    )
  except TypeError as error:
    if "custom_vjp" not in str(error):
      raise
    raise errors.InputError(
      "forward=True cannot go through this look-ahead; make its steps with"
      " mode='reverse' or 'remat', and do not wrap it in at_stationary_point"
    ) from error
  return loss, unravel(slopes.astype(flat.dtype))


def _check_meta_params(meta_params):
  if not jax.tree.leaves(meta_params):
    raise errors.InputError("meta_params has no arrays to differentiate by")
  _check_leaves(
    "meta_params",
    meta_params,
    jnp.floating,
    "a derivative needs real floating-point numbers",
  )


def _check_leaves(name, tree, kind, reason):
  """Raise an InputError if the dtype of a leaf is not of the given kind."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    dtype = getattr(leaf, "dtype", type(leaf))
    if not jnp.issubdtype(dtype, kind):
      place = jax.tree_util.keystr(path, simple=True, separator="/")
      raise errors.InputError(
        f"{name} has {getattr(dtype, '__name__', dtype)} at"
        f" {place or 'its root'}; {reason}"
      )


def _gradient(loss_fn):
  """Return (...) -> (gradient in params, loss [], model_state)."""

  def gradient(params, meta_params, model_state, batch):
    (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, meta_params, model_state, batch
    )
    return grads, loss, model_state

  return gradient


def _mixed_gradient(loss_fn):
  """Return `_gradient` with a backward pass that consists of one jvp.

  With g = ∇_θ L and a cotangent v, this pass needs vᵀ ∂g/∂θ and vᵀ ∂g/∂φ.
  The Hessian is symmetric and ∂²L/∂φ∂θ is the transpose of ∂²L/∂θ∂φ, so both
  are the derivative of the joint gradient along v in θ:

      (vᵀ ∂g/∂θ, vᵀ ∂g/∂φ) = d/dε (∇_θ L, ∇_φ L)(θ + ε v, φ) at ε = 0.

  If the derivatives of a loss are not those of its value, as with a
  straight-through estimator, its Hessian is not symmetric: use another mode.
  """

  def prepare(joint_gradient, params, rest):
    def products(args, along):
      # Without this barrier XLA's CSE reuses the forward activations and keeps
      # all of them alive.
      (params, rest), along = _barrier((args, along))
      _, products = jax.jvp(
        lambda params: joint_gradient(params, rest)[0], (params,), (along,)
      )
      return products

    grads, aux = joint_gradient(params, rest)
    return grads, aux, jax.tree_util.Partial(products, (params, rest))

  return _custom_gradient(loss_fn, prepare)


def _barrier(tree):
  """Apply `optimization_barrier` to each group of arrays that vary alike.

  In `jax.shard_map`, an array varies along some axes of the mesh, and all
  results of a barrier vary along the axes of all of its arguments.
  """
  leaves, structure = jax.tree.flatten(tree)
  groups = collections.defaultdict(list)
  for index, leaf in enumerate(leaves):
    groups[getattr(jax.typeof(leaf), "mat", None)].append(index)
  for indices in groups.values():
    passed = jax.lax.optimization_barrier([leaves[i] for i in indices])
    for index, leaf in zip(indices, passed, strict=True):
      leaves[index] = leaf
  return jax.tree.unflatten(structure, leaves)


def _linearized_gradient(loss_fn):
  """Return `_gradient` with a backward pass prepared in the forward pass.

  The products are those of `_mixed_gradient`. The joint gradient is linearized
  when it is computed, so that nothing is computed twice.
  """

  def prepare(joint_gradient, params, rest):
    grads, products, aux = jax.linearize(
      lambda params: joint_gradient(params, rest), params, has_aux=True
    )
    return grads, aux, products

  return _custom_gradient(loss_fn, prepare)


def _custom_gradient(loss_fn, prepare):
  """Return `_gradient` with a backward pass of its own.

  JAX does not let a function with such a pass close over traced values. Those
  of the loss become arguments; where they are differentiated, they are treated
  like meta-parameters.

  Args:
    loss_fn: the inner loss.
    prepare: (joint_gradient, params, rest) -> (its two results, products). The
      function `products` maps v to (vᵀ ∂g/∂θ, vᵀ ∂g/∂φ, vᵀ ∂g/∂c); see
      `joint_gradient`.
  """

  def gradient(*args):
    loss_of, closed_over = opened(loss_fn, *args)

    @jax.custom_vjp
    def rule(closed_over, *args):
      return _gradient(functools.partial(loss_of, closed_over))(*args)

    def forward(*primals):
      params, rest = arguments_of(primals)
      (grads, *_), aux, products = prepare(
        joint_gradient(loss_of), params, rest
      )
      return (grads, *aux), products

    def backward(products, cotangents):
      along_params, along_meta, along_closed_over = products(
        jax.tree.map(as_array, cotangents[0])
      )
      return along_closed_over, along_params, along_meta, None, None

    rule.defvjp(forward, backward, symbolic_zeros=True)
    return rule(closed_over, *args)

  return gradient


def opened(
  function: Callable[..., Any], *args: types.PyTree
) -> tuple[Callable[..., Any], list[jax.Array]]:
  """Return ((closed_over, *args) -> function(*args), closed_over).

  `closed_over` lists the traced values that the function closes over.
  """
  traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
  is_tracer = [isinstance(x, jax.core.Tracer) for x in traced.consts]

  def function_of(closed_over, *args):
    tracers = iter(closed_over)
    constants = [
      next(tracers) if is_traced else x
      for x, is_traced in zip(traced.consts, is_tracer, strict=True)
    ]
    opened = extend.core.ClosedJaxpr(traced.jaxpr, constants)
    results = extend.core.jaxpr_as_fun(opened)(*jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)

  return function_of, list(itertools.compress(traced.consts, is_tracer))


def arguments_of(
  primals: tuple[types.PyTree, ...],
) -> tuple[types.PyTree, tuple[types.PyTree, ...]]:
  """Return (params, rest) for `joint_gradient`.

  Args:
    primals: what `jax.custom_vjp` with symbolic zeros passes to the forward
      rule of a function of (closed_over, params, meta_params, model_state,
      batch).
  """
  closed_over, params, meta_params, *constants = (
    custom_derivatives.custom_vjp_primal_tree_values(primals)
  )
  differentiated = [
    x if primal.perturbed and jnp.issubdtype(x.dtype, jnp.inexact) else None
    for x, primal in zip(closed_over, primals[0], strict=True)
  ]
  return params, (meta_params, differentiated, closed_over, *constants)


def joint_gradient(loss_of: Callable[..., Any]) -> Callable[..., Any]:
  """Return (params, rest) -> ((∇_θ L, ∇_φ L, ∇_c L), (loss [], model_state)).

  `rest` is (meta_params, c, closed_over, model_state, batch), where c has those
  of the closed-over values that are differentiated, and None for the others.
  `loss_of` is a loss from `opened`.
  """

  def gradient(params, rest):
    meta_params, differentiated, closed_over, *constants = rest
    _check_leaves(
      "meta_params", meta_params, jnp.inexact, "put it into the batch"
    )

    def loss_fn(params, meta_params, differentiated):
      values = [
        constant if learned is None else learned
        for constant, learned in zip(closed_over, differentiated, strict=True)
      ]
      return loss_of(values, params, meta_params, *constants)

    aux, grads = jax.value_and_grad(loss_fn, argnums=(0, 1, 2), has_aux=True)(
      params, meta_params, differentiated
    )
    return grads, aux

  return gradient


def as_array(
  cotangent: jax.Array | custom_derivatives.SymbolicZero,
) -> jax.Array:
  """Return a cotangent as an array."""
  if isinstance(cotangent, custom_derivatives.SymbolicZero):
    return jnp.zeros(cotangent.shape, cotangent.dtype)
  return cotangent


def check_differentiable(
  optimizer: optax.GradientTransformation, params: types.PyTree
) -> None:
  """Reject an optimizer whose updates have an infinite or a zero derivative.

  Gradients that are exactly zero are common (a parameter that a loss does not
  depend on), and sqrt has an infinite derivative there: optax's Adam with
  eps_root=0 makes the whole hypergradient NaN. Updates that are signs (Lion)
  have the derivative 0, so that nothing could be learned through them.

  The check differentiates the second update of parameters of shape [2, ..., 2]
  whose gradient is 0 in one element. It accepts an optimizer whose derivative
  is infinite only where all gradients are 0, such as
  `optax.clip_by_global_norm` (`optimizers.clip_by_global_norm` is finite there
  too), or those of a whole array, such as `optax.adaptive_grad_clip`. It also
  accepts an optimizer that cannot be tried on small arrays.

  Args:
    optimizer: the inner optimizer.
    params: the parameters that it updates.

  Raises:
    errors.InputError: the optimizer is not differentiable.
  """
  try:
    with jax.ensure_compile_time_eval():
      updates, slopes = _with_numbers(_try(optimizer, params))
  except Exception as error:  # Not an optimizer of small arrays.
    if "required keyword-only argument" in str(error):
      raise errors.InputError(
        "the inner optimizer's update needs more than gradients, as those of"
        " lbfgs and polyak_sgd do; use one that does not"
      ) from error
    return
  if not all(np.isfinite(slope).all() for slope in slopes):
    raise errors.InputError(
      "the inner optimizer's updates have no finite derivative at a zero"
      " gradient; choose a differentiable one (for optax.adam: eps_root=1e-24)"
    )
  if any(map(np.any, updates)) and not any(map(np.any, slopes)):
    raise errors.InputError(
      "the inner optimizer's updates do not change with the gradient's size, as"
      " those of sign_sgd and lion: the hypergradient would be 0; choose"
      " another optimizer, such as sgd or adam"
    )


def small_like(params: types.PyTree) -> types.PyTree:
  """Return ones of shape [2, ..., 2], to try an optimizer on.

  Optimizers may depend on the names, ranks and dtypes of parameters.
  """
  return jax.tree.map(
    lambda x: np.ones(np.full(np.ndim(x), 2), jnp.result_type(x)), params
  )


def _try(optimizer, params):
  """Return a function of the second update, and of its derivatives.

  Its gradients are 1 and 0. The first update is not used: for some optimizers,
  such as SM3, it is a sign.
  """
  ones = small_like(params)
  grads = jax.tree.map(np.ones_like, ones)
  leaves = jax.tree.leaves(grads)
  for leaf in leaves:
    leaf.flat[:1] = 0
  if not any(map(np.any, leaves)):  # Scalars: not all of them may be 0.
    leaves[-1].flat[:1] = 1e-3

  def second_update():
    _, state = optimizer.update(grads, optimizer.init(ones), ones)
    updates, pullback = jax.vjp(
      lambda grads: optimizer.update(grads, state, ones)[0], grads
    )
    slopes = pullback(jax.tree.map(jnp.ones_like, updates))
    return jax.tree.leaves(updates), jax.tree.leaves(slopes)

  return second_update


def _with_numbers(function):
  """Run a function of `_try`, with numbers for what is traced in it."""
  function_of, closed_over = opened(function)
  updates, slopes = jax.tree.map(
    np.asarray, function_of([_number_like(x) for x in closed_over])
  )
  if closed_over and not all(np.isfinite(x).all() for x in updates):
    raise FloatingPointError("these numbers make no sense")
  return updates, slopes


def _number_like(traced):
  """Return 0.1 like a traced floating-point array, and 1 like any other."""
  is_float = jnp.issubdtype(traced.dtype, jnp.floating)
  return np.full(traced.shape, 0.1 if is_float else 1, traced.dtype)
