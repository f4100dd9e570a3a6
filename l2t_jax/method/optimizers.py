"""The optimizers and schedules of the paper, as PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable
import math

import chex
import jax
import jax.numpy as jnp
import optax

OptimizerFn = Callable[[chex.Numeric], optax.GradientTransformation]


def sgd(
  *, momentum: float, weight_decay: float, clip_norm: float = 0.0
) -> OptimizerFn:
  """Return SGD as in PyTorch: L2 in the gradient, heavy-ball momentum.

  Args:
    momentum: decay rate of the momentum buffer.
    weight_decay: factor of the parameters in the gradient.
    clip_norm: largest norm of the gradient before L2 is added; 0 for no
      clipping. See `clip_by_global_norm`.

  Returns:
    Function: learning rate -> optax transformation.
  """

  def optimizer_fn(learning_rate):
    return optax.chain(
      *_clipping(clip_norm),
      optax.add_decayed_weights(weight_decay),
      optax.sgd(learning_rate, momentum=momentum),
    )

  return optimizer_fn


def adam_l2(
  learning_rate: float, weight_decay: float, clip_norm: float = 0.0
) -> optax.GradientTransformation:
  """Return Adam with L2 in the gradient (not decoupled), as torch.optim.Adam.

  Args:
    learning_rate: Adam's learning rate.
    weight_decay: see `sgd`.
    clip_norm: see `sgd`.
  """
  return optax.chain(
    *_clipping(clip_norm),
    optax.add_decayed_weights(weight_decay),
    optax.adam(learning_rate),
  )


def _clipping(norm):
  return (clip_by_global_norm(norm),) if norm else ()


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


def cosine_by_epoch(
  learning_rate: float, *, epochs: int, steps_per_epoch: int
) -> Callable[[chex.Numeric], chex.Numeric]:
  """Return a cosine decay to 0 that is constant within an epoch.

  Args:
    learning_rate: the learning rate of the first epoch.
    epochs: number of epochs of the run.
    steps_per_epoch: iterations per epoch.

  Returns:
    Function: iteration (from 0) -> learning rate.
  """
  schedule = optax.cosine_decay_schedule(learning_rate, decay_steps=epochs)
  return lambda step: schedule(step // steps_per_epoch)


def steps_by_epoch(
  learning_rate: float, *, epochs: int, steps_per_epoch: int
) -> Callable[[chex.Numeric], chex.Numeric]:
  """Return a schedule that divides the rate by 10 at 1/2 and 3/4 of the run.

  Arguments and result are those of `cosine_by_epoch`.
  """
  boundaries = (math.ceil(epochs / 2), math.ceil(epochs * 3 / 4))
  schedule = optax.piecewise_constant_schedule(
    learning_rate, dict.fromkeys(boundaries, 0.1)
  )
  return lambda step: schedule(step // steps_per_epoch)


def constant(
  learning_rate: float, *, epochs: int, steps_per_epoch: int
) -> Callable[[chex.Numeric], chex.Numeric]:
  """Return a schedule that never changes, however many epochs there are.

  Arguments and result are those of `cosine_by_epoch`.
  """
  del epochs, steps_per_epoch
  return optax.constant_schedule(learning_rate)


# config.optimizer.schedule -> function that makes the schedule.
SCHEDULES = {
  "cosine": cosine_by_epoch,
  "step": steps_by_epoch,
  "constant": constant,
}
