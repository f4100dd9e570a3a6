"""How JAX lowers for CPU what XLA:CPU compiles badly, in any network.

`install` replaces JAX's lowering rules of convolutions and of sums over
positions in this process, for the CPU platform alone. Values and derivatives of
every order stay the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools
import math
from typing import Any

import jax
from jax.interpreters import mlir
import jax.numpy as jnp

# Orders of dimensions, of the operands and the result: of a convolution of
# [B, H, W, C] by [h, w, C, D], and of its derivatives by these two.
_FORWARD = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_BY_INPUT = ((0, 3, 1, 2), (2, 3, 0, 1), (0, 3, 1, 2))
_BY_KERNEL = ((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
# Where a sum is faster as a product than as a loop: the fewest entries and
# channels, and the most positions.
_WORTH_A_PRODUCT, _SEVERAL_CHANNELS, _DEEPEST = 512, 8, 4096
# Where a product of patches is faster than XLA:CPU's convolution.
_TINY_MAP = 3
_FEW_CHANNELS, _SMALL_KERNEL, _FEW_PATCHES = 4, 7, 2**24


def _sum(x, *, axes, **_):
  """A sum over axes that lie together, right before the last one.

  XLA:CPU reduces such arrays at a tenth of the memory's speed, and multiplies
  by a row of ones at all of it.
  """
  start = _first_in_product(x.shape, axes)
  rows = x.reshape(math.prod(x.shape[:start]), -1, x.shape[-1])
  sums = jax.lax.dot_general(
    jnp.ones((rows.shape[0], 1, rows.shape[1]), x.dtype),
    rows,
    (((2,), (1,)), ((0,), (0,))),
    precision=jax.lax.Precision.HIGHEST,
  ).reshape(*x.shape[:start], x.shape[-1])
  return jnp.sum(sums, axis=axes[0]) if start > axes[0] else sums


def _is_over_positions(x, *, axes, out_sharding=None):
  """Whether `_sum` is right, and its products are more than handfuls."""
  if x.ndim < 3 or axes != tuple(range(min(axes, default=0), x.ndim - 1)):
    return False
  entries = math.prod(x.shape[_first_in_product(x.shape, axes) :])
  return (
    entries >= _WORTH_A_PRODUCT
    and x.shape[-1] >= _SEVERAL_CHANNELS
    and x.dtype in (jnp.float32, jnp.float64)
    and out_sharding is None
  )


def _first_in_product(shape, axes):
  """The first axis that a product sums over; one before it goes thereafter.

  A product of great depth is slow, and so is a single one.
  """
  depth = math.prod(shape[axis] for axis in axes)
  splits = len(axes) > 1 and (axes[0] == 0 or depth > _DEEPEST)
  return axes[0] + splits


def _convolution(lhs, rhs, *, dimension_numbers, **params):
  """A convolution with channels last.

  Derivatives of convolutions come with their dimensions in other orders. At
  the top of a program XLA:CPU transposes them to this one; within a loop it
  does not, and runs them about 100 times slower.

  Maps of up to 3x3 become a matrix product of their patches: XLA:CPU runs a
  3x3 convolution on 2x2 maps about 60 times slower (1.5 against 110
  GFLOP/s); from 4x4 maps on its convolution is as fast, but for the few
  channels of an image.
  """
  orders = dimension_numbers
  if _is_plain_product(lhs.shape, rhs.shape, orders, params):
    return _plain_product(lhs, rhs, orders=tuple(orders), **params)
  lhs, rhs = (
    jax.lax.transpose(x, x_order)
    for x, x_order in (
      (lhs, _channels_last(orders.lhs_spec)),
      (rhs, (*orders.rhs_spec[2:], orders.rhs_spec[1], orders.rhs_spec[0])),
    )
  )
  if _is_product_in_groups(lhs.shape, rhs.shape, params):
    out = _product_in_groups(lhs, rhs, **params)
  else:
    out = jax.lax.conv_general_dilated_p.bind(
      lhs,
      rhs,
      dimension_numbers=_channels_last_numbers(lhs.ndim),
      **params,
    )
  out_order = _channels_last(orders.out_spec)
  return jax.lax.transpose(out, [out_order.index(i) for i in range(out.ndim)])


def _is_worth_a_change(lhs, rhs, *, dimension_numbers, **params):
  orders = dimension_numbers
  return lhs.ndim > 2 and (
    orders != _channels_last_numbers(lhs.ndim)
    or _is_plain_product(lhs.shape, rhs.shape, orders, params)
    or _is_product_in_groups(lhs.shape, rhs.shape, params)
  )


def _is_product_in_groups(lhs_shape, rhs_shape, params):
  """Whether this convolution, with channels last, is such a product."""
  is_small = len(rhs_shape) == 4 and max(rhs_shape[:2]) <= _SMALL_KERNEL
  return is_small and _has_tiny_maps(lhs_shape[1:3], params)


def _is_plain_product(lhs_shape, rhs_shape, orders, params):
  orders = tuple(orders)
  groups = params["feature_group_count"] * params["batch_group_count"]
  if orders not in (_FORWARD, _BY_INPUT, _BY_KERNEL) or groups > 1:
    return False
  maps, window = _maps_and_window(lhs_shape, rhs_shape, orders)
  if _has_tiny_maps(maps, params) and max(window) <= _SMALL_KERNEL:
    return True
  sizes = _output_sizes(maps, window, params["padding"])
  channels, kernel, positions = {
    _FORWARD: (rhs_shape[2], window, sizes),
    _BY_INPUT: (rhs_shape[2], window, maps),
    _BY_KERNEL: (lhs_shape[3], sizes, window),
  }[orders]
  return (
    _moves_by_one(params)
    and channels <= _FEW_CHANNELS
    and max(kernel) <= _SMALL_KERNEL
    and math.prod((lhs_shape[0], *positions, *kernel, channels)) <= _FEW_PATCHES
  )


def _has_tiny_maps(maps, params):
  # A size may be a symbol, which no number bounds.
  is_tiny = all(isinstance(size, int) and size <= _TINY_MAP for size in maps)
  return is_tiny and _moves_by_one(params)


def _moves_by_one(params):
  steps = ("window_strides", "lhs_dilation", "rhs_dilation")
  return all(step == 1 for name in steps for step in params[name])


def _plain_product(
  lhs, rhs, *, orders, padding, precision, preferred_element_type, **_
):
  """A convolution, or a derivative of one, whose operands stay in their order.

  A kernel takes longer to transpose than to multiply by.
  """

  def multiply(a, b, contract):
    return jax.lax.dot_general(
      a,
      b,
      (contract, ((), ())),
      precision=precision,
      preferred_element_type=preferred_element_type,
    )

  maps, window = _maps_and_window(lhs.shape, rhs.shape, orders)
  sizes = _output_sizes(maps, window, padding)
  num_images, positions = lhs.shape[0], math.prod(window)
  if orders == _FORWARD:
    patches = _patches(lhs, padding, offsets=window, sizes=sizes)
    depth = positions * lhs.shape[-1]
    out = multiply(
      patches.reshape(-1, depth), rhs.reshape(depth, -1), ((1,), (0,))
    )
    return out.reshape(num_images, *sizes, rhs.shape[-1])
  if orders == _BY_KERNEL:
    # What is the window here was the map of outputs, and the other way round.
    patches = _patches(lhs, padding, offsets=sizes, sizes=window)
    depth = num_images * positions
    out = multiply(
      patches.reshape(depth, -1), rhs.reshape(depth, -1), ((0,), (0,))
    )
    return out.reshape(*sizes, lhs.shape[-1], rhs.shape[-1])
  # By the input: the transposed of the first case, where patches are added.
  dtype = preferred_element_type or lhs.dtype
  if jnp.issubdtype(dtype, jnp.floating):
    preferred_element_type = jnp.promote_types(dtype, jnp.float32)
  kernel = jax.lax.rev(rhs, (0, 1))
  depth = lhs.shape[-1]
  products = multiply(
    lhs.reshape(-1, depth), kernel.reshape(-1, depth), ((1,), (1,))
  ).reshape(num_images, *maps, positions, rhs.shape[2])
  zero = jax.lax.full_like(products, 0, shape=())
  out = 0
  for n, offset in enumerate(itertools.product(*map(range, window))):
    starts = [
      start - (length - 1 - low)
      for start, length, (low, _) in zip(offset, window, padding, strict=True)
    ]
    edges = [
      (start, size - length - start, 0)
      for start, size, length in zip(starts, sizes, maps, strict=True)
    ]
    part = products[:, :, :, n]
    out += jax.lax.pad(part, zero, ((0, 0, 0), *edges, (0, 0, 0)))
  return out.astype(dtype)


def _product_in_groups(
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
  window, (inputs, outputs) = rhs.shape[:2], rhs.shape[2:]
  sizes = _output_sizes(lhs.shape[1:3], window, padding)
  patches = _patches(lhs, padding, offsets=window, sizes=sizes)
  groups = (batch_group_count, feature_group_count)
  out = jnp.einsum(
    "pbhwkqi,kipqo->bhwpqo",
    patches.reshape(
      groups[0], -1, *sizes, math.prod(window), groups[1], inputs
    ),
    rhs.reshape(math.prod(window), inputs, *groups, -1),
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  return out.reshape(*out.shape[:3], outputs)


def _patches(x, padding, *, offsets, sizes):
  """[B, H, W, C] -> [B, h, w, N, C]: maps of (h, w) = sizes, at N offsets."""
  edges = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
  x = jax.lax.pad(x, jax.lax.full_like(x, 0, shape=()), edges)
  height, width = sizes
  return jnp.stack(
    [
      x[:, i : i + height, j : j + width]
      for i, j in itertools.product(*map(range, offsets))
    ],
    axis=3,
  )


def _maps_and_window(lhs_shape, rhs_shape, orders):
  lhs_order, rhs_order, _ = orders
  return (
    tuple(lhs_shape[i] for i in lhs_order[2:]),
    tuple(rhs_shape[i] for i in rhs_order[2:]),
  )


def _output_sizes(maps, window, padding):
  return tuple(
    size + low + high - length + 1
    for size, length, (low, high) in zip(maps, window, padding, strict=True)
  )


def _channels_last(order):
  """(batch, channels, *positions) -> (batch, *positions, channels)."""
  return (order[0], *order[2:], order[1])


def _channels_last_numbers(ndim):
  maps = (0, ndim - 1, *range(1, ndim - 1))
  kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
  return jax.lax.ConvDimensionNumbers(maps, kernel, maps)


def _lower_for_cpu(
  primitive: Any, function: Callable[..., Any], suits: Callable[..., Any]
) -> None:
  """Lower a primitive as `function` where that suits operands and parameters.

  `suits` takes their abstract values. What is empty, has an explicit sharding,
  or sizes on which the answer depends and that are unknown, stays JAX's.
  """
  for_all = getattr(mlir, "_lowerings", {})
  for_cpu = getattr(mlir, "_platform_specific_lowerings", {}).get("cpu", {})
  entry = for_cpu.get(primitive) or for_all.get(primitive)
  if entry is None:
    return  # A JAX that keeps its rules elsewhere: right, and slow.
  new_rule = mlir.lower_fun(function, multiple_results=False)

  def lower(ctx, *operands, **params):
    avals = (*ctx.avals_in, *ctx.avals_out)
    try:
      changes = all(map(_is_common, avals)) and suits(*ctx.avals_in, **params)
    except jax.errors.InconclusiveDimensionOperation:
      changes = False
    rule = new_rule if changes else entry.rule
    return rule(ctx, *operands, **params)

  mlir.register_lowering(primitive, lower, platform="cpu")


def _is_common(aval):
  return 0 not in aval.shape and not any(aval.sharding.spec)


@functools.cache
def install() -> None:
  """Install the rules in this process; further calls do nothing.

  Programs that were compiled before keep the rules that they were lowered by.
  """
  _lower_for_cpu(
    jax.lax.conv_general_dilated_p, _convolution, _is_worth_a_change
  )
  _lower_for_cpu(jax.lax.reduce_sum_p, _sum, _is_over_positions)
