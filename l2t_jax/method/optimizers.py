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
  """SGD as in PyTorch: L2 in the gradient of every parameter, heavy ball.

  Args:
    momentum: share of the buffer that stays.
    weight_decay: factor of L2.
    clip_norm: of `clip_by_global_norm`, before L2 is added; 0 for no clipping.

  Returns:
    learning rate -> optax transformation.
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
  """Adam with L2 in the gradient (not decoupled), as torch.optim.Adam.

  Args:
    learning_rate: of Adam.
    weight_decay: factor of L2.
    clip_norm: of `clip_by_global_norm`, before L2 is added; 0 for no clipping.
  """
  return optax.chain(
    *_clipping(clip_norm),
    optax.add_decayed_weights(weight_decay),
    optax.adam(learning_rate),
  )


def _clipping(norm):
  return (clip_by_global_norm(norm),) if norm else ()


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Scale gradients whose norm over all arrays is larger down to max_norm.

  As optax's, but its own derivative is finite where the gradients are 0: the
  look-ahead is differentiated through it.
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
  """Cosine from the learning rate to 0, constant within an epoch.

  Args:
    learning_rate: in the first epoch.
    epochs: length of the run.
    steps_per_epoch: iterations per epoch.

  Returns:
    iteration (from 0) -> learning rate.
  """
  schedule = optax.cosine_decay_schedule(learning_rate, decay_steps=epochs)
  return lambda step: schedule(step // steps_per_epoch)


def steps_by_epoch(
  learning_rate: float, *, epochs: int, steps_per_epoch: int
) -> Callable[[chex.Numeric], chex.Numeric]:
  """The learning rate, a tenth of it from half of the run, then a hundredth.

  The second step is at three quarters. Arguments and result are those of
  `cosine_by_epoch`.
  """
  boundaries = (math.ceil(epochs / 2), math.ceil(epochs * 3 / 4))
  schedule = optax.piecewise_constant_schedule(
    learning_rate, dict.fromkeys(boundaries, 0.1)
  )
  return lambda step: schedule(step // steps_per_epoch)


# config.optimizer.schedule -> what makes it.
SCHEDULES = {"cosine": cosine_by_epoch, "step": steps_by_epoch}
