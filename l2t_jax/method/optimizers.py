"""Optimizers and schedules, as PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax import errors, imports, types
from l2t_jax.method import bilevel

OptimizerFn = Callable[[chex.Numeric], optax.GradientTransformation]

# The built-in optimizers.
NAMES = ("sgd", "adamw")
# Which parameters have weight decay.
DECAYED = ("all", "kernels")
# `_EPS_ROOT` is added to Adam's second moment under the square root, where
# PyTorch adds nothing, so that the root has a finite derivative at 0. It is far
# smaller than the square of eps, which is added to the root, and changes no
# update by more than 0.01 %.
_EPS, _EPS_ROOT = 1e-8, 1e-24


def make(
  name: str,
  *,
  momentum: float,
  b2: float,
  weight_decay: float,
  decayed: str = "all",
  clip_norm: float = 0.0,
) -> OptimizerFn:
  """Make the optimizer of the target.

  Args:
    name: one of `NAMES`, or "package.module:function", which takes a learning
      rate and returns an optax transformation; of the other arguments, only
      `clip_norm` then applies.
    momentum: see `sgd`; AdamW's b1.
    b2: see `adamw`.
    weight_decay: see `sgd` and `adamw`.
    decayed: one of `DECAYED`: weight decay applies to all parameters, or not to
      biases, scales and other vectors.
    clip_norm: largest norm of the gradient; 0 for no clipping. See
      `clip_by_global_norm`.

  Returns:
    Function: learning rate -> optax transformation.

  Raises:
    errors.InputError: there is no such optimizer.
  """
  if not isinstance(name, str):  # `fit` accepts configs with any types.
    raise errors.InputError(
      f"config.optimizer.name is of type {type(name).__name__}; it must be a"
      f" string, one of {', '.join(NAMES)} or 'package.module:function'"
    )
  mask = are_kernels if decayed == "kernels" else None
  if name == "sgd":
    optimizer_fn = sgd(momentum=momentum, weight_decay=weight_decay, mask=mask)
  elif name == "adamw":
    optimizer_fn = adamw(
      b1=momentum, b2=b2, weight_decay=weight_decay, mask=mask
    )
  elif ":" in name:
    optimizer_fn = _imported(name)
  else:
    raise errors.InputError(
      f"unknown optimizer {name!r}; it must be one of {', '.join(NAMES)}, or"
      " 'package.module:function', which takes a learning rate and returns an"
      " optax transformation"
    )
  if not clip_norm:
    return optimizer_fn
  return lambda learning_rate: optax.chain(
    clip_by_global_norm(clip_norm), optimizer_fn(learning_rate)
  )


def _imported(name):
  """Import a user's optimizer, and call it once to find errors early."""
  optimizer_fn = imports.by_name(name, "optimizer")
  try:
    optimizer = optimizer_fn(0.1)
  except Exception as error:  # It may raise anything.
    raise errors.InputError(
      f"the optimizer {name!r} cannot be made of a learning rate of 0.1:"
      f" {errors.first_line(error)}"
    ) from error
  if not isinstance(optimizer, optax.GradientTransformation):
    raise errors.InputError(
      f"the optimizer {name!r} returns a {type(optimizer).__name__}; it must"
      " return an optax transformation"
    )
  return optimizer_fn


def check(optimizer_fn: OptimizerFn, params: types.PyTree) -> None:
  """Reject an optimizer that cannot be used with a changing learning rate.

  Args:
    optimizer_fn: a user's function of the learning rate.
    params: arrays, or their shapes.

  Raises:
    errors.InputError: it fails, its state cannot be saved, or the learning rate
      has no effect after its state is initialised.
  """

  def first_updates(rate, params):
    optimizer = optimizer_fn(rate)
    # As in training, where the state is initialised once, before the rate of an
    # iteration is known.
    state = optimizer_fn(0.0).init(params)
    return optimizer.update(params, state, params)[0], state

  try:
    _, state = jax.eval_shape(first_updates, jnp.ones(()), params)
  except Exception as error:  # It may raise anything.
    raise errors.InputError(
      "the optimizer cannot update this network at a traced learning rate:"
      f" {errors.first_line(error)}"
    ) from error
  if any(
    jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    for leaf in jax.tree.leaves(state)
  ):
    raise errors.InputError(
      "the optimizer keeps a random key in its state, which checkpoints do not"
      " hold; use one without noise"
    )
  small = bilevel.small_like(params)
  try:
    slow, fast = (first_updates(rate, small)[0] for rate in (0.1, 0.2))
  except Exception:  # Some optimizers need larger arrays.
    return
  if all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(slow), jax.tree.leaves(fast), strict=True)
  ):
    raise errors.InputError(
      "the optimizer's updates do not change with the learning rate, which it"
      " ignores or keeps in its state, as optax.inject_hyperparams does; return"
      " a transformation that uses the rate it is given"
    )


def are_kernels(params: types.PyTree) -> types.PyTree:
  """Return True for each parameter except biases, scales and other vectors."""

  def is_kernel(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return leaf.ndim > 1 and name not in ("bias", "scale")

  return jax.tree.map_with_path(is_kernel, params)


def sgd(
  *,
  momentum: float,
  weight_decay: float,
  mask: Callable[[types.PyTree], types.PyTree] | None = None,
) -> OptimizerFn:
  """Return SGD as in PyTorch: L2 in the gradient, heavy-ball momentum.

  Args:
    momentum: decay rate of the momentum buffer.
    weight_decay: factor of the parameters in the gradient.
    mask: parameters -> which of them decay; None for all.

  Returns:
    Function: learning rate -> optax transformation.
  """
  return lambda learning_rate: optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.sgd(learning_rate, momentum=momentum),
  )


def adamw(
  *,
  b1: float,
  b2: float,
  weight_decay: float,
  mask: Callable[[types.PyTree], types.PyTree] | None = None,
) -> OptimizerFn:
  """Return AdamW as in PyTorch, but with a finite derivative at 0.

  Args:
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    weight_decay: decoupled weight decay: an update subtracts this times the
      learning rate times the parameters.
    mask: parameters -> which of them decay; None for all.

  Returns:
    Function: learning rate -> optax transformation.
  """
  return lambda learning_rate: optax.adamw(
    learning_rate,
    b1,
    b2,
    eps=_EPS,
    eps_root=_EPS_ROOT,
    weight_decay=weight_decay,
    mask=mask,
  )


def adam_l2(
  learning_rate: float, weight_decay: float, clip_norm: float = 0.0
) -> optax.GradientTransformation:
  """Return Adam with L2 in the gradient (not decoupled), as torch.optim.Adam.

  Args:
    learning_rate: Adam's learning rate.
    weight_decay: see `sgd`.
    clip_norm: largest norm of the gradient before L2 is added; 0 for no
      clipping.
  """
  clipping = [clip_by_global_norm(clip_norm)] if clip_norm else []
  return optax.chain(
    *clipping,
    optax.add_decayed_weights(weight_decay),
    optax.adam(learning_rate),
  )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Scale gradients down to a global norm of `max_norm` if it is larger.

  Like optax's function, but with a finite derivative if all gradients are 0,
  because the hypergradient differentiates through it.
  """

  def update(updates, state, params=None):
    del params
    squares = (jnp.sum(jnp.square(x)) for x in jax.tree.leaves(updates))
    norm = jnp.sqrt(jnp.maximum(sum(squares), max_norm**2))
    return jax.tree.map(lambda x: x * (max_norm / norm), updates), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def make_schedule(
  name: str,
  learning_rate: float,
  *,
  epochs: int,
  steps_per_epoch: int,
  warmup_steps: int = 0,
) -> Callable[[chex.Numeric], chex.Numeric]:
  """Make the learning rate of each iteration.

  Args:
    name: a key of `SCHEDULES`.
    learning_rate: the peak learning rate.
    epochs: number of epochs of the run.
    steps_per_epoch: iterations per epoch.
    warmup_steps: iterations of a linear warm-up that reaches `learning_rate` in
      the last of them; the schedule covers the rest of the run.

  Returns:
    Function: iteration (from 0) -> learning rate.
  """
  if not warmup_steps:
    by_epoch = SCHEDULES[name](learning_rate, epochs)
    return lambda step: by_epoch(step // steps_per_epoch)
  after = SCHEDULES[name](
    learning_rate, epochs - warmup_steps / steps_per_epoch
  )

  def schedule(step):
    left = step - warmup_steps
    return jnp.where(
      left < 0,
      learning_rate * (step + 1) / warmup_steps,
      after(jnp.maximum(left, 0) // steps_per_epoch),
    )

  return schedule


def _steps(learning_rate, epochs):
  """Divide the rate by 10 at 1/2 and 3/4 of the epochs."""
  # In a run of one epoch both boundaries are the same.
  scales: dict[int, float] = {}
  for boundary in (math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)):
    scales[boundary] = 0.1 * scales.get(boundary, 1.0)
  return optax.piecewise_constant_schedule(learning_rate, scales)


# config.optimizer.schedule -> a function that maps the peak learning rate and
# the number of epochs to a schedule: epoch (from 0) -> learning rate.
SCHEDULES = {
  "cosine": optax.cosine_decay_schedule,  # To 0.
  "step": _steps,
  "constant": lambda learning_rate, _: optax.constant_schedule(learning_rate),
}
