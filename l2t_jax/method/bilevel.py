"""Differentiate through an inner loop of training.

Meta-parameters φ shape an inner training run of parameters θ,

    θ_{k+1} = θ_k + update(∇_θ L_inner(θ_k, φ, batch_k)),    k = 0 .. T-1,

and are evaluated by an outer loss at its end, L_outer(θ_T, φ). The
hypergradient is dL_outer/dφ through all T steps, including the state of the
optimizer.

This module does not depend on a network, a data set or Flax: parameters are
pytrees, losses are functions that the caller passes in (`types.InnerLossFn`),
and the inner optimizer is any differentiable optax transformation. A step reads
only its arguments:

  * `params` and `opt_state` are differentiated through;
  * the hypergradient is taken with respect to `meta_params`;
  * `model_state` (batch statistics) and `batch` are constants, with a
    `stop_gradient` in every mode. Arrays that should be learned, such as
    images, belong in `meta_params`.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
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
    metric, with a `stop_gradient`.

  Raises:
    errors.InputError: the mode is unknown; or, when the step is traced,
      `check_differentiable` refuses the optimizer.
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
) -> tuple[types.InnerState, chex.Array]:
  """Take several inner steps.

  Args:
    step: from `make_inner_step`.
    state: the state before the first step.
    meta_params: the same in every step.
    batches: leaves with a leading axis, one entry per step; or, if `num_steps`
      is given, one batch that every step uses.
    num_steps: T, if every step uses the same batch.
    rolled: whether the steps after the first, if there are several, are a
      `lax.scan`, whose body is compiled once for any T. The first step stays
      outside the loop: its start does not depend on the meta-parameters, so
      that its backward pass needs no Hessian-vector product, but a loop would
      compute one.

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
  """Differentiate the loss after a look-ahead by the meta-parameters.

  Args:
    look_ahead: `(state, meta_params, batch) -> state`, made of inner steps.
    outer_loss_fn: loss of the state after the look-ahead; its new model_state
      is discarded.
    state: start of the look-ahead; a constant.
    meta_params: φ; the gradient is taken with respect to them.
    batch: argument of `look_ahead` and `outer_loss_fn`.

  Returns:
    (outer loss [], gradient); the gradient is a pytree like `meta_params`.
  """

  def outer(meta_params):
    ahead = look_ahead(state, meta_params, batch)
    loss, _ = outer_loss_fn(ahead.params, meta_params, ahead.model_state, batch)
    return loss

  return jax.value_and_grad(outer)(meta_params)


def _gradient(loss_fn):
  """Return (...) -> (gradient in params, loss [], model_state)."""

  def gradient(params, meta_params, model_state, batch):
    (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, meta_params, model_state, batch
    )
    return grads, loss, model_state

  return gradient


def _mixed_gradient(loss_fn):
  """Return `_gradient` with a backward pass that is one forward tangent.

  With g = ∇_θ L and a cotangent v, this pass needs vᵀ ∂g/∂θ and vᵀ ∂g/∂φ.
  The Hessian is symmetric and ∂²L/∂φ∂θ is the transpose of ∂²L/∂θ∂φ, so both
  are the derivative of the joint gradient along v in θ:

      (vᵀ ∂g/∂θ, vᵀ ∂g/∂φ) = d/dε (∇_θ L, ∇_φ L)(θ + ε v, φ) at ε = 0.

  If the derivatives of a loss are not those of its value, as with a
  straight-through estimator, its Hessian is not symmetric: use another mode.
  """
  plain_gradient = _gradient(loss_fn)
  gradient = jax.custom_vjp(plain_gradient)

  def forward(*args):
    return plain_gradient(*args), args

  def backward(args, cotangents):
    # Without this barrier XLA's CSE reuses the forward activations and keeps
    # all of them alive.
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
  """Return `_gradient` with a backward pass prepared in the forward pass.

  The products are those of `_mixed_gradient`. The joint gradient is linearized
  when it is computed, so that nothing is computed twice.
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
  """Refuse an optimizer whose updates have no finite derivative at 0.

  Gradients that are exactly zero are common (a parameter that a loss does not
  depend on), and sqrt has an infinite derivative there: optax's Adam with
  eps_root=0 makes the whole hypergradient NaN.

  The check differentiates one update of parameters of shape [2, ..., 2] whose
  gradient is 0 in one element. It accepts an optimizer whose derivative is
  infinite only if all gradients are 0, such as `optax.clip_by_global_norm`
  (`optimizers.clip_by_global_norm` is finite there too). It also accepts an
  optimizer that cannot be checked, because its hyper-parameters are traced or
  it does not run on small arrays.

  Args:
    optimizer: the inner optimizer.
    params: the parameters that it updates.

  Raises:
    errors.InputError: the optimizer is not differentiable.
  """
  try:
    with jax.ensure_compile_time_eval():
      is_finite = _has_finite_slopes(optimizer, params)
  except Exception:  # Traced hyper-parameters, or arrays are too small.
    return
  if not is_finite:
    raise errors.InputError(
      "the inner optimizer's updates have no finite derivative at a zero"
      " gradient; choose a differentiable one (for optax.adam: eps_root=1e-8)"
    )


def _has_finite_slopes(optimizer, params):
  """Differentiate the sum of one update in the gradients, some of them 0."""
  # Optimizers may depend on the names, ranks and dtypes of parameters.
  ones = jax.tree.map(
    lambda x: np.ones(np.minimum(np.shape(x), 2), jnp.result_type(x)), params
  )
  grads = jax.tree.map(np.ones_like, ones)
  for leaf in jax.tree.leaves(grads):
    leaf.flat[:1] = 0
  state = optimizer.init(ones)
  updates, pullback = jax.vjp(
    lambda grads: optimizer.update(grads, state, ones)[0], grads
  )
  slopes = pullback(jax.tree.map(jnp.ones_like, updates))
  return all(np.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
