"""Layers that the bundled networks share, with PyTorch's conventions."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2t_jax import errors

# He et al. (2015), fan-out mode: the authors' choice for convolutions.
KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for a linear layer: uniform within ±1/sqrt(fan in).
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_linear_bias(fan_in: int):
  """Return PyTorch's initializer of a linear layer's bias.

  It is uniform within ±1/sqrt(fan in).
  """
  bound = fan_in**-0.5
  return functools.partial(jax.random.uniform, minval=-bound, maxval=bound)


def check_multiples(images: jax.Array, divisor: int) -> None:
  """Check that the sides of images [B, H, W, C] are multiples of `divisor`.

  Raises:
    errors.InputError: they are not.
  """
  height, width = images.shape[1:3]
  if height % divisor or width % divisor or not height * width:
    raise errors.InputError(
      f"images are {height}x{width}; for this network their sides must be"
      f" multiples of {divisor}"
    )


def conv(
  features: int,
  kernel_size: int = 3,
  *,
  strides: int = 1,
  use_bias: bool = False,
  dtype: Any = None,
  name: str,
) -> nn.Conv:
  """Make a convolution padded by kernel_size // 2 on every side.

  With strides, "SAME" would pad the two sides differently than PyTorch does.
  """
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=strides,
    padding=kernel_size // 2,
    use_bias=use_bias,
    kernel_init=KAIMING_FAN_OUT,
    dtype=dtype,
    name=name,
  )


class BatchNorm(nn.Module):
  """Batch normalisation of [B, H, W, C] with PyTorch's conventions.

  Its variables are named as in `flax.linen.BatchNorm`; the running variance is
  unbiased, as in PyTorch. The derivative is written by hand (see `normalize`),
  which halves the number of passes over memory.
  """

  train: bool
  dtype: Any = None

  momentum = 0.9
  epsilon = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    average = lambda name, init: self.variable("batch_stats", name, init, shape)
    mean, var = average("mean", jnp.zeros), average("var", jnp.ones)
    dtype = self.dtype or jnp.result_type(x, scale)
    # Statistics need float32 even if the activations are bfloat16.
    x = x.astype(jnp.promote_types(dtype, jnp.float32))
    if not self.train:
      y = (x - mean.value) * (scale * jax.lax.rsqrt(var.value + self.epsilon))
      return (y + bias).astype(dtype)
    y, batch_mean, batch_var = normalize(x, scale, bias, self.epsilon)
    # Initialisation must not update the running statistics.
    if not self.is_initializing():
      count = x.size // x.shape[-1]
      unbiased = batch_var * count / max(count - 1, 1)
      for kept, new in ((mean, batch_mean), (var, unbiased)):
        new = jax.lax.stop_gradient(new)
        kept.value = self.momentum * kept.value + (1 - self.momentum) * new
    return y.astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def normalize(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalise by the statistics of the batch.

      y = γ (x - μ) ρ + β,  ρ = 1 / sqrt(σ² + ε)

  Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1. With
  x̂ = (x - μ) ρ and means over the batch, its derivative along (ẋ, γ̇, β̇) is

      ẏ = γρ ẋ + (β̇ - γρ mean(ẋ)) + x̂ (γ̇ - γρ mean(x̂ ẋ)).

  The transpose of this form, the backward pass, sums over the batch only twice.

  Args:
    x: [B, H, W, C].
    scale: γ, [C].
    bias: β, [C].
    epsilon: ε.

  Returns:
    (y [B, H, W, C], μ [C], σ² [C]), with σ² the biased variance.
  """
  mean = _mean(x)
  var = _mean(jnp.square(x)) - jnp.square(mean)
  var = jnp.where(var > 0, var, 0)  # Rounding errors can make it negative.
  factor = scale * jax.lax.rsqrt(var + epsilon)
  return (x - mean) * factor + bias, mean, var


@normalize.defjvp
def _normalize_jvp(epsilon, primals, tangents):
  x, scale, bias = primals
  x_dot, scale_dot, bias_dot = tangents
  y, mean, var = normalize(x, scale, bias, epsilon)
  inverse = jax.lax.rsqrt(var + epsilon)
  factor = scale * inverse
  normal = (x - mean) * inverse
  mean_dot, product_dot = _mean(x_dot), _mean(normal * x_dot)
  y_dot = (
    factor * x_dot
    + (bias_dot - factor * mean_dot)
    + normal * (scale_dot - factor * product_dot)
  )
  # The derivative of σ² is 2 mean((x - μ) ẋ), where x - μ = x̂ / ρ.
  var_dot = 2 * product_dot / inverse
  return (y, mean, var), (y_dot, mean_dot, var_dot)


def _mean(x):
  return jnp.mean(x, axis=(0, 1, 2))


def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
  """Max-pool [B, H, W, C] by pairwise comparisons, along W and then along H.

  The second derivative of `nn.max_pool` goes through XLA's select-and-scatter,
  which is slow on CPU; this one does not. Among equal entries the first one
  receives the gradient, as in PyTorch.

  The operands are compared with each other. The derivative of `jnp.maximum`
  (and of `jnp.max`) compares an operand with the *result* for equality instead.
  If XLA recomputes one of the two in another fusion, with other rounding,
  neither operand equals the result and the gradient is silently lost (seen on
  CPU with jaxlib 0.10.1, at batch sizes that are not a multiple of 4).

  Raises:
    errors.InputError: the maps are smaller than the window.
  """
  if padding:
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = jnp.pad(x, edges, constant_values=-jnp.inf)
  if min(x.shape[1:3]) < window:
    raise errors.InputError(
      f"maps of {x.shape[1]}x{x.shape[2]} are too small for a max-pool of"
      f" {window}x{window}; use larger images or a network with fewer pools"
    )
  for axis in (2, 1):
    entries = _window_entries(x, axis, window, stride)
    x = functools.reduce(_first_maximum, entries)
  return x


def _first_maximum(a, b):
  return jnp.where((a >= b) | jnp.isnan(a), a, b)  # Keeps NaN, as PyTorch does.


def _window_entries(x, axis, window, stride):
  """Return a list: the i-th entry of every window along an axis, for each i."""
  count = (x.shape[axis] - window) // stride + 1
  if stride != window:
    return [
      jax.lax.slice_in_dim(
        x, start, start + (count - 1) * stride + 1, stride, axis
      )
      for start in range(window)
    ]
  # Adjacent windows are split with `jax.lax.split`: its backward pass is a
  # concatenation, while that of slices pads and adds.
  x = jax.lax.slice_in_dim(x, 0, count * window, axis=axis)
  x = x.reshape(*x.shape[:axis], count, window, *x.shape[axis + 1 :])
  parts = jax.lax.split(x, (1,) * window, axis + 1)
  return [jnp.squeeze(part, axis + 1) for part in parts]


def conv_and_norm(
  train: bool, dtype: Any
) -> tuple[Callable[..., nn.Conv], Callable[..., BatchNorm]]:
  """Return `conv` and `BatchNorm` for one mode and one dtype."""
  return (
    functools.partial(conv, dtype=dtype),
    functools.partial(BatchNorm, train, dtype=dtype),
  )


def classify(
  x: jax.Array,
  features: dict[str, jax.Array],
  num_classes: int,
  **dense_options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Classify the mean over positions with a linear layer.

  Args:
    x: [B, H, W, C].
    features: the network's taps so far.
    num_classes: K; with 0 the result is the mean itself.
    **dense_options: dtype, initializers and name of the linear layer.

  Returns:
    (logits [B, K], at least float32; the features with the tap "penultimate"
    [B, 1, 1, C], the input of the linear layer).
  """
  x = jnp.mean(x, axis=(1, 2), keepdims=True)
  logits = x[:, 0, 0]
  if num_classes:
    logits = nn.Dense(num_classes, **dense_options)(logits)
  # Losses are computed in float32 even if the activations are bfloat16.
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return logits, features | {"penultimate": x}
