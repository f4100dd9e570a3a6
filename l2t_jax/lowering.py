"""Formulations that XLA compiles well where the plain ones are slow.

On CPU alone: elsewhere each function is the plain operation. The values are
the same to rounding, and so are derivatives of every order.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp


def sum_by_image(x: chex.Array) -> chex.Array:
  """Sum over positions, [B, ..., C] -> [B, C].

  XLA:CPU reduces such arrays at a tenth of the memory's speed, and multiplies
  by a row of ones at all of it.
  """
  if jax.default_backend() != "cpu":
    return jnp.sum(x, axis=tuple(range(1, x.ndim - 1)))
  ones = _column_of_ones(x.shape, x.dtype)
  flat = x.reshape(x.shape[0], -1, x.shape[-1])
  return jnp.einsum("bpu,bpc->buc", ones, flat)[:, 0]


def sum_over_positions(x: chex.Array) -> chex.Array:
  """Sum over images and positions, [B, ..., C] -> [C]."""
  return jnp.sum(sum_by_image(x), axis=0)


def spread(values: chex.Array, shape: tuple[int, ...]) -> chex.Array:
  """Repeat values [C] at every position: `shape` is [B, ..., C].

  Its derivative is `sum_over_positions`, in the fast formulation too.
  """
  if jax.default_backend() != "cpu":
    return jnp.broadcast_to(values, shape)
  by_image = jnp.broadcast_to(values, (shape[0], 1, shape[-1]))
  ones = _column_of_ones(shape, values.dtype)
  return jnp.einsum("bpu,buc->bpc", ones, by_image).reshape(shape)


def conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs):
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


def _column_of_ones(shape, dtype):
  return jnp.ones((shape[0], math.prod(shape[1:-1]), 1), dtype)
