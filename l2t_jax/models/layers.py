"""Layers that the networks share, with PyTorch's conventions."""

from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2t_jax import types

# He et al. (2015), fan-out mode: the authors' choice for convolutions.
KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for a linear layer: uniform within ±1/sqrt(fan in).
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_linear_bias(fan_in: int):
  """PyTorch's default for a linear layer's bias: within ±1/sqrt(fan in)."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

  return init


def conv(
  features: int,
  kernel_size: int = 3,
  *,
  strides: int = 1,
  use_bias: bool = False,
  dtype: Any = None,
  name: str,
) -> nn.Conv:
  """A convolution padded as in PyTorch: kernel_size // 2 on every side."""
  padding = kernel_size // 2
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=(strides, strides),
    padding=((padding, padding), (padding, padding)),
    use_bias=use_bias,
    kernel_init=KAIMING_FAN_OUT,
    dtype=dtype,
    conv_general_dilated=_conv_general_dilated,
    name=name,
  )


def batch_norm(train: bool, *, dtype: Any = None, name: str) -> nn.BatchNorm:
  """Batch normalisation with PyTorch's epsilon and momentum."""
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
    name=name,
  )


def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
  """Max-pool [B, H, W, C] by pairwise choices between shifted slices.

  Unlike `nn.max_pool`, its second derivative does not go through XLA's
  select-and-scatter, which is slow on CPU. Where entries are equal, the first
  one takes the gradient, as in PyTorch.

  The choice is a comparison of the operands. The derivative of `jnp.maximum`
  (and of `jnp.max`) compares an operand with the *result* for equality
  instead; when XLA recomputes one of the two in another fusion with another
  rounding, neither is equal and the gradient is silently lost (seen on CPU
  with jaxlib 0.10.1, at batch sizes that are no multiple of 4).
  """
  if padding:
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = jnp.pad(x, edges, constant_values=-jnp.inf)
  height, width = ((n - window) // stride + 1 for n in x.shape[1:3])
  if height < 1 or width < 1:
    raise types.InputError(
      f"maps of {x.shape[1]}x{x.shape[2]} are too small for a max-pool of"
      f" {window}x{window}; use larger images or a network with fewer pools"
    )
  slices = [
    x[
      :,
      i : i + (height - 1) * stride + 1 : stride,
      j : j + (width - 1) * stride + 1 : stride,
    ]
    for i in range(window)
    for j in range(window)
  ]
  return functools.reduce(lambda a, b: jnp.where(a >= b, a, b), slices)


def _conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs):
  """`lax.conv_general_dilated`, but a matrix product where XLA:CPU is slow.

  XLA:CPU runs a 3x3 convolution on 2x2 maps about 60 times slower than the
  matrix product of its patches (1.5 against 110 GFLOP/s); from 4x4 maps on
  its convolution is as fast.
  """
  height, width = lhs.shape[1:3]
  tiny = max(height, width) <= 3 and tuple(window_strides) == (1, 1)
  if not tiny or jax.default_backend() != "cpu":
    return jax.lax.conv_general_dilated(
      lhs, rhs, window_strides, padding, **kwargs
    )
  kernel_height, kernel_width, _, features = rhs.shape
  lhs = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
  height, width = (
    lhs.shape[1] - kernel_height + 1,
    lhs.shape[2] - kernel_width + 1,
  )
  patches = [
    lhs[:, i : i + height, j : j + width]
    for i in range(kernel_height)
    for j in range(kernel_width)
  ]
  return jnp.einsum(
    "bhwi,io->bhwo",
    jnp.concatenate(patches, axis=-1),
    rhs.reshape(-1, features),
    precision=kwargs.get("precision"),
  )
