"""Differentiate through an inner loop of training.

Meta-parameters φ shape an inner training run of parameters θ,

    θ_{k+1} = θ_k + update(∇_θ L_inner(θ_k, φ, batch_k)),    k = 0 .. T-1,

and are judged by an outer loss at its end, L_outer(θ_T, φ). The hypergradient
is dL_outer/dφ through all T steps, the state of the optimizer included.

Nothing here knows a network, a data set or Flax: parameters are pytrees, the
losses are functions that the caller hands in (`types.InnerLossFn`), the inner
optimizer is any differentiable optax transformation. What a step reads comes
in as an argument, so that nothing is differentiated behind the caller's back:

  * `params` and `opt_state` are differentiated through;
  * `meta_params` is what the hypergradient is taken of;
  * `model_state` (batch statistics) and `batch` are constants: they carry a
    `stop_gradient` in every mode. An array to be learned, images say, belongs
    into `meta_params`.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax import errors, types

# How the hypergradient is computed. All agree to rounding.
#   reverse:    plain reverse over reverse; the graphs of all steps are kept.
#   remat:      the same, each step recomputed on the way back
#               (jax.checkpoint).
#   mixed:      forward over reverse: on the way back, one jvp of the joint
#               gradient stands for the Hessian-vector and the mixed product.
#               Between the passes a step keeps its inputs alone.
#   linearized: the same products, from a linearization that each step keeps:
#               nothing is computed twice, and memory grows with T.
MODES = ("reverse", "remat", "mixed", "linearized")
# Optimizers may treat their first updates in another way than the later ones.
_NUM_PROBED = 8

StepFn = Callable[
  [types.InnerState, types.PyTree, types.PyTree],
  tuple[types.InnerState, chex.Array],
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
      `eps_root > 0`.
    mode: how a derivative of the step is computed, one of `MODES`.

  Returns:
    `step(state, meta_params, batch) -> (state, loss [])`. The loss is a
    metric: it carries a `stop_gradient`.

  Raises:
    errors.InputError: for an unknown mode, and when the step is traced for an
      optimizer whose update has no finite derivative
      (see `check_differentiable`).
  """
  if mode not in MODES:
    raise errors.InputError(
      f"unknown hypergradient mode {mode!r}; use one of {', '.join(MODES)}"
    )
  make_gradient = {
    "mixed": _mixed_gradient,
    "linearized": _linearized_gradient,
  }.get(mode, _gradient)
  gradient = make_gradient(loss_fn)

  def step(state, meta_params, batch):
    check_differentiable(optimizer, state.params)
    model_state, batch = jax.lax.stop_gradient((state.model_state, batch))
    grads, loss, model_state = gradient(
      state.params, meta_params, model_state, batch
    )
    state = apply_gradients(optimizer, state, grads, model_state)
    return state, jax.lax.stop_gradient(loss)

  return jax.checkpoint(step) if mode == "remat" else step


def apply_gradients(
  optimizer: optax.GradientTransformation,
  state: types.InnerState,
  grads: types.PyTree,
  model_state: types.PyTree,
) -> types.InnerState:
  """Update params by the optimizer and put the new model_state in place."""
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
) -> tuple[types.InnerState, chex.Array]:
  """Take several inner steps.

  Args:
    step: from `make_inner_step`.
    state: where to start.
    meta_params: the same in every step.
    batches: leaves with a leading axis, one entry a step; or, where
      `num_steps` is given, one batch that every step sees.
    num_steps: T, for one batch that every step sees.
    rolled: whether the steps behind the first, where they are several, are a
      `lax.scan`, which compiles once for any T. The first step stands before
      the loop, because nothing that it starts from depends on the
      meta-parameters: its way back needs no Hessian-vector product, which a
      loop would compute all the same.

  Returns:
    The state after the last step and the losses [T] before each step.
  """
  if num_steps is None:
    leaves = jax.tree.leaves(batches)
    chex.assert_equal_shape_prefix(leaves, 1)
    num_steps = len(leaves[0])
    batch_of = lambda k: jax.tree.map(lambda leaf: leaf[k], batches)
  else:
    batch_of = lambda k: batches
  losses = []
  for k in range(1 if rolled and num_steps > 2 else num_steps):
    state, loss = step(state, meta_params, batch_of(k))
    losses.append(loss)
  first_losses = jnp.stack(losses) if losses else jnp.zeros((0,))
  if len(losses) == num_steps:
    return state, first_losses
  state, more = jax.lax.scan(
    lambda state, k: step(state, meta_params, batch_of(k)),
    state,
    jnp.arange(1, num_steps),
  )
  return state, jnp.concatenate([first_losses, more])


def hypergradient(
  look_ahead: Callable[
    [types.InnerState, types.PyTree, types.PyTree], types.InnerState
  ],
  outer_loss_fn: types.InnerLossFn,
  state: types.InnerState,
  meta_params: types.PyTree,
  batch: types.PyTree,
) -> tuple[chex.Array, types.PyTree]:
  """Differentiate the outer loss after a look-ahead by the meta-parameters.

  Args:
    look_ahead: `(state, meta_params, batch) -> state`, made of inner steps.
    outer_loss_fn: judges the state that the look-ahead ends in; its new
      model_state is dropped.
    state: where the look-ahead starts; a constant.
    meta_params: what is differentiated.
    batch: handed to `look_ahead` and to `outer_loss_fn`.

  Returns:
    (outer loss [], its gradient, a pytree like `meta_params`).
  """

  def outer(meta_params):
    ahead = look_ahead(state, meta_params, batch)
    loss, _ = outer_loss_fn(ahead.params, meta_params, ahead.model_state, batch)
    return loss

  return jax.value_and_grad(outer)(meta_params)


def _gradient(loss_fn):
  """Return the gradient by params: (...) -> (grads, loss [], model_state)."""

  def gradient(params, meta_params, model_state, batch):
    (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, meta_params, model_state, batch
    )
    return grads, loss, model_state

  return gradient


def _mixed_gradient(loss_fn):
  """Return `_gradient` with a backward pass that is one forward tangent.

  With g = ∇_θ L and a cotangent v, the way back needs vᵀ ∂g/∂θ and vᵀ ∂g/∂φ.
  The Hessian is symmetric and ∂²L/∂φ∂θ is the transpose of ∂²L/∂θ∂φ, so both
  are the derivative of the joint gradient along v in θ:

      (vᵀ ∂g/∂θ, vᵀ ∂g/∂φ) = d/dε (∇_θ L, ∇_φ L)(θ + ε v, φ) at ε = 0.

  A loss whose derivatives are not those of its value (a straight-through
  estimator, say) has no symmetric Hessian: use another mode for it.
  """
  plain_gradient = _gradient(loss_fn)
  gradient = jax.custom_vjp(plain_gradient)

  def forward(*args):
    return plain_gradient(*args), args

  def backward(args, cotangents):
    # XLA would find what the way there has computed, and keep all of it.
    args, along = jax.lax.optimization_barrier((args, cotangents[0]))
    params, *rest = args
    _, products = jax.jvp(
      lambda params: _joint_gradient(loss_fn)(params, *rest)[0],
      (params,),
      (along,),
    )
    return *products, None, None

  gradient.defvjp(forward, backward)
  return gradient


def _linearized_gradient(loss_fn):
  """Return `_gradient` with a backward pass prepared on the way there.

  The products are those of `_mixed_gradient`; the joint gradient is
  linearized when it is computed, so that nothing is computed twice.
  """
  gradient = jax.custom_vjp(_gradient(loss_fn))

  def forward(params, *rest):
    (grads, _), tangent_fn, aux = jax.linearize(
      lambda params: _joint_gradient(loss_fn)(params, *rest),
      params,
      has_aux=True,
    )
    return (grads, *aux), tangent_fn

  def backward(tangent_fn, cotangents):
    return *tangent_fn(cotangents[0]), None, None

  gradient.defvjp(forward, backward)
  return gradient


def _joint_gradient(loss_fn):
  """Return (...) -> ((∇_θ L, ∇_φ L), (loss [], model_state))."""

  def joint_gradient(*args):
    aux, grads = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(
      *args
    )
    return grads, aux

  return joint_gradient


def check_differentiable(
  optimizer: optax.GradientTransformation, params: types.PyTree
) -> None:
  """Refuse an optimizer whose updates have no finite slope at zero gradients.

  Exactly zero gradients are common (a parameter that a loss does not reach),
  and there sqrt has an infinite slope: optax's Adam with eps_root=0 turns the
  whole hypergradient into NaN. Some updates of small arrays are probed, each
  with one gradient that is 0; an optimizer with traced hyper-parameters, or one
  that does not run on small arrays, cannot be probed and passes.

  So does one that has no slope only where all gradients of an array, or of all
  arrays, are 0, such as `optax.clip_by_global_norm`;
  `optimizers.clip_by_global_norm` has one there, too.

  Args:
    optimizer: the inner optimizer.
    params: what it updates.

  Raises:
    errors.InputError: for an optimizer that is not differentiable.
  """
  try:
    with jax.ensure_compile_time_eval():
      slopes = _slopes_at_zero(optimizer, params)
  except Exception:  # Whatever it is that small arrays are not enough for.
    return
  if any(isinstance(slope, jax.core.Tracer) for slope in slopes):
    return  # A traced hyper-parameter: nothing to look at before the run.
  if not all(np.isfinite(slope).all() for slope in slopes):
    raise errors.InputError(
      "the inner optimizer's updates have no finite derivative at a zero"
      " gradient; choose a differentiable one (for optax.adam: eps_root=1e-8)"
    )


def _slopes_at_zero(optimizer, params):
  """Differentiate some updates by their gradients, one in each array being 0.

  Params are arrays of their ranks; of those that the optimizer keeps the same
  for, one is enough.
  """
  params = jax.tree.map(
    lambda x: np.ones(np.minimum(np.shape(x), 2), jnp.result_type(x)), params
  )
  kept = _paths(jax.eval_shape(optimizer.init, params))
  alike = {}
  for path, leaf in zip(_paths(params), jax.tree.leaves(params), strict=True):
    what = (name.removesuffix(path) for name in kept if name.endswith(path))
    alike[leaf.ndim, leaf.dtype, *what] = path
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x if jax.tree_util.keystr(path) in alike.values() else optax.MaskedNode()
    ),
    params,
  )

  grads = jax.tree.map(np.ones_like, params)
  for leaf in jax.tree.leaves(grads):
    leaf.flat[:1] = 0

  @jax.jit
  def update(grads, params, state):
    updates, pullback, state = jax.vjp(
      lambda grads: optimizer.update(grads, state, params), grads, has_aux=True
    )
    ones = jax.tree.map(jnp.ones_like, updates)
    return pullback(ones), optax.apply_updates(params, updates), state

  state, slopes = optimizer.init(params), []
  for _ in range(_NUM_PROBED):
    slope, params, state = update(grads, params, state)
    slopes += jax.tree.leaves(slope)
  return slopes


def _paths(tree):
  return [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]
