"""The problem of benchmarks/inner_loops.py, and its derivatives in JAX.

Weights of training images are learned: the inner loss is their weighted cross
entropy, which SGD with momentum descends from fixed parameters; the outer loss
is the cross entropy of as many held-out images.
"""

from __future__ import annotations

from collections.abc import Callable
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import l2t_jax as l2t

RATE, MOMENTUM = 0.1, 0.9
_BATCH_SIZES = {"mlp": 128, "convnet": 64}
# Kernels; a convolution's is [height, width, in, out], and the last one of the
# ConvNet reads maps of 4x4.
KERNELS = {
  "mlp": ((64, 128), (128, 128), (128, 10)),
  "convnet": ((3, 3, 1, 16), (3, 3, 16, 32), (4, 4, 32, 10)),
}

# (weights [B], params, batch) -> loss [].
LossFn = Callable[
  [jax.Array, list[jax.Array], tuple[jax.Array, ...]], jax.Array
]


class Problem(NamedTuple):
  """Arrays that all ways start from."""

  weights: jax.Array  # [B]; the meta-parameters, before the sigmoid.
  params: list[jax.Array]  # Kernels and biases in turn.
  # (x [B, 64], y [B], held-out x [B, 64], held-out y [B]).
  batch: tuple[jax.Array, ...]


def write_problem(network: str, path: pathlib.Path) -> None:
  """Draw images, weights and first parameters."""
  rng = np.random.default_rng(0)
  images, labels = datasets.load_digits(return_X_y=True)
  order = rng.permutation(len(labels))[: 2 * _BATCH_SIZES[network]]
  x, held_out_x = np.split(images[order].astype(np.float32) / 16, 2)
  y, held_out_y = np.split(labels[order].astype(np.int32), 2)
  arrays: dict[str, Any] = {
    "x": x,
    "y": y,
    "held_out_x": held_out_x,
    "held_out_y": held_out_y,
    "weights": rng.standard_normal(len(y), np.float32),
  }
  for layer, shape in enumerate(KERNELS[network]):
    scale = np.float32(1 / math.sqrt(math.prod(shape[:-1])))
    kernel = scale * rng.standard_normal(shape, np.float32)
    arrays[f"param{2 * layer}"] = kernel
    arrays[f"param{2 * layer + 1}"] = np.zeros(shape[-1], np.float32)
  np.savez(path, **arrays)


def read_problem(path: str | pathlib.Path) -> Problem:
  """Read a problem, in float64 if JAX has it enabled."""
  arrays = {
    name: jnp.asarray(x, int if x.dtype == np.int32 else float)
    for name, x in np.load(path).items()
  }
  names = ("x", "y", "held_out_x", "held_out_y")
  params = [arrays[name] for name in arrays if name.startswith("param")]
  return Problem(arrays["weights"], params, tuple(arrays[n] for n in names))


def logits(params: list[jax.Array], x: jax.Array) -> jax.Array:
  """Compute the logits [B, 10] of the MLP, or of the ConvNet."""
  *kernels, last_kernel = params[::2]
  *biases, last_bias = params[1::2]
  if last_kernel.ndim == 4:
    x = x.reshape(-1, 8, 8, 1)
  for kernel, bias, stride in zip(kernels, biases, (1, 2), strict=True):
    x = _convolve(x, kernel, stride) if kernel.ndim == 4 else x @ kernel
    x = jnp.tanh(x + bias)
  return x.reshape(len(x), -1) @ last_kernel.reshape(-1, 10) + last_bias


def _convolve(x, kernel, stride):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=((1, 1), (1, 1)),  # As in torch: "SAME" pads one side at stride 2.
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def inner_loss(params, weights, model_state, batch):
  """Return the weighted loss of the training images."""
  x, y, *_ = batch
  losses = cross_entropies(logits(params, x), y)
  return jnp.mean(jax.nn.sigmoid(weights) * losses), model_state


def outer_loss(params, batch):
  """Return the loss of the held-out images."""
  *_, x, y = batch
  return jnp.mean(cross_entropies(logits(params, x), y))


cross_entropies = optax.softmax_cross_entropy_with_integer_labels


def loss_after(way: str, num_steps: int, **options: Any) -> LossFn:
  """Return (weights, params, batch) -> the outer loss after T inner steps.

  Args:
    way: one of those that are in JAX.
    num_steps: T.
    **options: of `unroll`, if the way is ours.
  """
  optimizer = optax.sgd(RATE, momentum=MOMENTUM)
  if way.startswith("by_hand"):
    look_ahead = _by_hand(num_steps, optimizer)
  else:
    look_ahead = _unrolled(way, num_steps, optimizer, options)
  return lambda weights, params, batch: outer_loss(
    look_ahead(weights, params, batch), batch
  )


def _unrolled(way, num_steps, optimizer, options):
  lengths: dict[str, int | tuple[int, int]] = {
    "segments": math.isqrt(num_steps),
    "nested": (max(1, num_steps // 4), max(1, num_steps // 32)),
  }
  mode = way if way in l2t.MODES else "linearized"
  step = l2t.make_inner_step(inner_loss, optimizer, mode=mode)

  def look_ahead(weights, params, batch):
    state = l2t.InnerState(params, optimizer.init(params), None)
    end, _ = l2t.unroll(
      step,
      state,
      weights,
      batch,
      num_steps=num_steps,
      segment_length=lengths.get(way, ()),
      **options,
    )
    return end.params

  return look_ahead


def _by_hand(num_steps, optimizer):
  def look_ahead(weights, params, batch):
    def step(carry, _):
      params, opt_state = carry
      grads, _ = gradient(weights, params, batch)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    start = (params, optimizer.init(params))
    return jax.lax.scan(step, start, length=num_steps)[0][0]

  return look_ahead


def gradient(weights, params, batch):
  return jax.grad(inner_loss, has_aux=True)(params, weights, None, batch)


def gradient_in_double(problem: Problem, num_steps: int, **options):
  """Return the hypergradient in float64, which JAX has enabled."""
  loss = loss_after("reverse", num_steps, **options)
  return np.asarray(jax.jit(jax.grad(loss))(*problem))


def relative_error(computed, exact) -> float:
  """Return the norm of the difference over the norm of the exact one."""
  return float(np.linalg.norm(computed - exact) / np.linalg.norm(exact))
