"""Formulations that XLA compiles well where the plain ones are slow.

On CPU alone: elsewhere everything is the plain operation. The values are the
same to rounding, and so are derivatives of every order.

Importing this module changes how JAX lowers convolutions for CPU, those of any
network (see `_convolution`).
"""

from __future__ import annotations

import itertools
import math

import chex
import jax
from jax.interpreters import mlir
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


def _convolution(lhs, rhs, *, dimension_numbers, **params):
  """A two-dimensional convolution with channels last.

  Derivatives of convolutions come with their dimensions in other orders. At
  the top of a program XLA:CPU transposes them to this one; within a loop it
  does not, and runs them about 100 times slower.

  Maps of up to 3x3 become a matrix product of their patches: XLA:CPU runs a
  3x3 convolution on 2x2 maps about 60 times slower (1.5 against 110
  GFLOP/s); from 4x4 maps on its convolution is as fast.
  """
  orders = dimension_numbers
  lhs, rhs = (
    jax.lax.transpose(x, x_order)
    for x, x_order in (
      (lhs, _channels_last(orders.lhs_spec)),
      (rhs, (*orders.rhs_spec[2:], orders.rhs_spec[1], orders.rhs_spec[0])),
    )
  )
  if _has_tiny_maps(lhs.shape[1:3], params):
    out = _product_of_patches(lhs, rhs, **params)
  else:
    out = jax.lax.conv_general_dilated_p.bind(
      lhs,
      rhs,
      dimension_numbers=_channels_last_numbers(lhs.shape, rhs.shape),
      **params,
    )
  out_order = _channels_last(orders.out_spec)
  return jax.lax.transpose(out, [out_order.index(i) for i in range(4)])


def _product_of_patches(
  lhs,
  rhs,
  *,
  padding,
  feature_group_count,
  batch_group_count,
  precision,
  preferred_element_type,
  **_,
):
  """Convolve [B, H, W, C] by [h, w, C, D] as one matrix product."""
  edges = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
  lhs = jax.lax.pad(lhs, jnp.zeros((), lhs.dtype), edges)
  window, (inputs, outputs) = rhs.shape[:2], rhs.shape[2:]
  height, width = (
    full - size + 1 for full, size in zip(lhs.shape[1:3], window, strict=True)
  )
  patches = jnp.stack(
    [
      lhs[:, i : i + height, j : j + width]
      for i, j in itertools.product(*map(range, window))
    ],
    axis=3,
  )
  groups = (batch_group_count, feature_group_count)
  out = jnp.einsum(
    "pbhwkqi,kipqo->bhwpqo",
    patches.reshape(
      groups[0], -1, height, width, math.prod(window), groups[1], inputs
    ),
    rhs.reshape(math.prod(window), inputs, *groups, -1),
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  return out.reshape(*out.shape[:3], outputs)


def _has_tiny_maps(sizes, params):
  steps = ("window_strides", "lhs_dilation", "rhs_dilation")
  moves_by_one = all(step == 1 for name in steps for step in params[name])
  return moves_by_one and max(sizes) <= 3


def _channels_last(order):
  """(batch, channels, height, width) -> (batch, height, width, channels)."""
  return (order[0], *order[2:], order[1])


def _channels_last_numbers(lhs_shape, rhs_shape):
  return jax.lax.conv_dimension_numbers(
    lhs_shape, rhs_shape, ("NHWC", "HWIO", "NHWC")
  )


def _column_of_ones(shape, dtype):
  return jnp.ones((shape[0], math.prod(shape[1:-1]), 1), dtype)


def _lower_convolutions_for_cpu():
  """Put `_convolution` in front of JAX's own rule."""
  primitive = jax.lax.conv_general_dilated_p
  rules = getattr(mlir, "_platform_specific_lowerings", {}).get("cpu", {})
  if primitive not in rules:
    return  # A JAX that keeps its rules elsewhere: right, and slow in loops.
  own_rule = rules[primitive].rule
  new_rule = mlir.lower_fun(_convolution, multiple_results=False)

  def lower(ctx, lhs, rhs, *, dimension_numbers, **params):
    shapes = [aval.shape for aval in ctx.avals_in]
    is_2d = len(shapes[0]) == 4
    suits = is_2d and dimension_numbers == _channels_last_numbers(*shapes)
    sizes = [shapes[0][i] for i in dimension_numbers.lhs_spec[2:]]
    if not is_2d or (suits and not _has_tiny_maps(sizes, params)):
      rule = own_rule
    else:
      rule = new_rule
    return rule(ctx, lhs, rhs, dimension_numbers=dimension_numbers, **params)

  mlir.register_lowering(primitive, lower, platform="cpu")


_lower_convolutions_for_cpu()
