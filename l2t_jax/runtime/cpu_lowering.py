"""Faster lowering rules for operations that XLA:CPU compiles badly.

`install` replaces JAX's lowering rules for convolutions and for sums over
positions, in this process and for the CPU platform only. Values and derivatives
of every order stay the same up to rounding.

What XLA:CPU does badly, and what these rules do instead:

  * Sums over positions run at a tenth of the memory bandwidth. A matrix product
    with a row of ones reaches all of it.
  * Convolutions inside a loop (`lax.scan`) run about 100 times slower unless
    channels are last. The derivatives that JAX generates for convolutions have
    other dimension orders, which XLA normalises outside of loops only. Here
    they are transposed.
  * A 3x3 convolution on 2x2 maps runs about 60 times slower (1.5 against 110
    GFLOP/s) than the matrix product of its patches and the kernel. From 4x4
    maps on the convolution is as fast, except with few channels.
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

# Orders of dimensions (of the operands and the result), as in
# `jax.lax.ConvDimensionNumbers`: of a convolution of [B, H, W, C] with
# [h, w, C, D], and of its derivatives with respect to input and kernel.
_FORWARD = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_BY_INPUT = ((0, 3, 1, 2), (2, 3, 0, 1), (0, 3, 1, 2))
_BY_KERNEL = ((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
# A sum becomes a product if it has at least _MIN_ENTRIES entries and
# _MIN_CHANNELS channels. A product over more than _MAX_DEPTH positions is
# split.
_MIN_ENTRIES, _MIN_CHANNELS, _MAX_DEPTH = 512, 8, 4096
# A convolution with a kernel of at most _SMALL_KERNEL becomes a product of
# patches in two cases: its maps are at most _TINY_MAP wide and high; or it has
# at most _FEW_CHANNELS channels, and patches of at most _MAX_ENTRIES entries.
_SMALL_KERNEL, _TINY_MAP = 7, 3
_FEW_CHANNELS, _MAX_ENTRIES = 4, 2**24


@functools.cache
def install() -> None:
  """Install the rules in this process; further calls do nothing.

  Programs that were lowered before are not affected.
  """
  _lower_for_cpu(jax.lax.conv_general_dilated_p, _faster_convolution)
  _lower_for_cpu(jax.lax.reduce_sum_p, _faster_sum)


def _lower_for_cpu(
  primitive: Any, find_faster: Callable[..., Callable[..., Any] | None]
) -> None:
  """Lower a primitive by a faster function where there is one.

  Args:
    primitive: a JAX primitive.
    find_faster: maps the abstract values of the operands, and the parameters,
      to a function of the operands, or to None to keep JAX's rule. JAX's rule
      is also kept for empty arrays and explicit shardings, and where the choice
      depends on a symbolic size.
  """
  for_all = getattr(mlir, "_lowerings", {})
  for_cpu = getattr(mlir, "_platform_specific_lowerings", {}).get("cpu", {})
  entry = for_cpu.get(primitive) or for_all.get(primitive)
  if entry is None:
    # This version of JAX stores its rules elsewhere. Without the faster ones,
    # programs are slow, but correct.
    return

  def lower(ctx, *operands, **params):
    avals = (*ctx.avals_in, *ctx.avals_out)
    is_common = lambda x: 0 not in x.shape and not any(x.sharding.spec)
    faster = None
    try:
      if all(map(is_common, avals)):
        faster = find_faster(*ctx.avals_in, **params)
    except jax.errors.InconclusiveDimensionOperation:
      pass
    if faster is None:
      return entry.rule(ctx, *operands, **params)
    return mlir.lower_fun(faster, multiple_results=False)(ctx, *operands)

  mlir.register_lowering(primitive, lower, platform="cpu")


def _faster_sum(x, *, axes, out_sharding=None):
  """Return a function that sums over the axes before the last by a product."""
  if x.ndim < 3 or axes != tuple(range(min(axes, default=0), x.ndim - 1)):
    return None
  # A product without batch dimensions is slow, and so is one over many
  # positions: in both cases the first axis is summed after the product.
  depth = math.prod(x.shape[axis] for axis in axes)
  is_split = len(axes) > 1 and (axes[0] == 0 or depth > _MAX_DEPTH)
  start = axes[0] + is_split
  if (
    math.prod(x.shape[start:]) < _MIN_ENTRIES
    or x.shape[-1] < _MIN_CHANNELS
    or x.dtype not in (jnp.float32, jnp.float64)
    or out_sharding is not None
  ):
    return None

  def sum_by_product(x):
    rows = x.reshape(math.prod(x.shape[:start]), -1, x.shape[-1])
    sums = jax.lax.dot_general(
      jnp.ones((rows.shape[0], 1, rows.shape[1]), x.dtype),
      rows,
      (((2,), (1,)), ((0,), (0,))),
      # A sum must not depend on `jax.default_matmul_precision`.
      precision=jax.lax.Precision.HIGHEST,
    ).reshape(*x.shape[:start], x.shape[-1])
    return jnp.sum(sums, axis=axes[0]) if is_split else sums

  return sum_by_product


def _faster_convolution(lhs, rhs, *, dimension_numbers, **params):
  """Return a product of patches, or a convolution with channels last."""
  if lhs.ndim <= 2:
    return None
  orders = tuple(dimension_numbers)
  if _suits_plain_product(lhs.shape, rhs.shape, orders, params):
    return functools.partial(_plain_product, orders=orders, **params)
  convolve: Callable[..., Any]
  maps, window = _maps_and_window(lhs.shape, rhs.shape, orders)
  if len(window) == 2 and _is_tiny(maps, window, params):
    convolve = functools.partial(_product_in_groups, **params)
  else:
    channels_last = _channels_last_numbers(lhs.ndim)
    if dimension_numbers == channels_last:
      return None
    convolve = functools.partial(
      jax.lax.conv_general_dilated_p.bind,
      dimension_numbers=channels_last,
      **params,
    )
  lhs_order = _channels_last(orders[0])
  rhs_order = (*orders[1][2:], orders[1][1], orders[1][0])
  out_order = _channels_last(orders[2])

  def transposed_convolution(lhs, rhs):
    out = convolve(
      jax.lax.transpose(lhs, lhs_order), jax.lax.transpose(rhs, rhs_order)
    )
    return jax.lax.transpose(out, [out_order.index(i) for i in range(out.ndim)])

  return transposed_convolution


def _suits_plain_product(lhs_shape, rhs_shape, orders, params):
  """Return whether `_plain_product` is possible and faster."""
  groups = params["feature_group_count"] * params["batch_group_count"]
  if orders not in (_FORWARD, _BY_INPUT, _BY_KERNEL) or groups > 1:
    return False
  maps, window = _maps_and_window(lhs_shape, rhs_shape, orders)
  if _is_tiny(maps, window, params):
    return True
  sizes = _output_sizes(maps, window, params["padding"])
  # In the derivatives, operands and result swap roles.
  channels, kernel, positions = {
    _FORWARD: (rhs_shape[2], window, sizes),
    _BY_INPUT: (rhs_shape[2], window, maps),
    _BY_KERNEL: (lhs_shape[3], sizes, window),
  }[orders]
  return (
    _has_unit_steps(params)
    and channels <= _FEW_CHANNELS
    and max(kernel) <= _SMALL_KERNEL
    and math.prod((lhs_shape[0], *positions, *kernel, channels)) <= _MAX_ENTRIES
  )


def _is_tiny(maps, window, params):
  """Return whether a product of patches is faster because maps are tiny."""
  # A symbolic size has no upper bound.
  are_tiny = all(isinstance(size, int) and size <= _TINY_MAP for size in maps)
  return are_tiny and _has_unit_steps(params) and max(window) <= _SMALL_KERNEL


def _has_unit_steps(params):
  steps = ("window_strides", "lhs_dilation", "rhs_dilation")
  return all(step == 1 for name in steps for step in params[name])


def _plain_product(
  lhs, rhs, *, orders, padding, precision, preferred_element_type, **_
):
  """Compute a convolution, or a derivative of one, as a product of patches.

  Operands are not transposed: transposing a kernel takes longer than
  multiplying by it.
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
    # The window is the map of outputs, and the result has the kernel's size.
    patches = _patches(lhs, padding, offsets=sizes, sizes=window)
    depth = num_images * positions
    out = multiply(
      patches.reshape(depth, -1), rhs.reshape(depth, -1), ((0,), (0,))
    )
    return out.reshape(*sizes, lhs.shape[-1], rhs.shape[-1])
  # Derivative by the input: the transpose of the forward pass, a sum of
  # patches. It is accumulated in float32 or more.
  dtype = preferred_element_type or lhs.dtype
  if jnp.issubdtype(dtype, jnp.floating):
    preferred_element_type = jnp.promote_types(dtype, jnp.float32)
  # JAX reverses the kernel to state this derivative as a convolution: undo it.
  kernel = jax.lax.rev(rhs, (0, 1))
  depth = lhs.shape[-1]
  products = multiply(
    lhs.reshape(-1, depth), kernel.reshape(-1, depth), ((1,), (1,))
  ).reshape(num_images, *maps, positions, rhs.shape[2])
  zero = jax.lax.full_like(products, 0, shape=())
  out = 0
  for n, offset in enumerate(itertools.product(*map(range, window))):
    edges = []
    for axis, (low, _) in enumerate(padding):
      before = offset[axis] - (window[axis] - 1 - low)
      edges.append((before, sizes[axis] - maps[axis] - before, 0))
    part = products[:, :, :, n]
    out += jax.lax.pad(part, zero, ((0, 0, 0), *edges, (0, 0, 0)))
  return out.astype(dtype)


def _product_in_groups(
  lhs, rhs, *, padding, precision, preferred_element_type, **params
):
  """Convolve [B, H, W, C] with [h, w, C, D], in groups, as one product."""
  groups = (params["batch_group_count"], params["feature_group_count"])
  window, (inputs, outputs) = rhs.shape[:2], rhs.shape[2:]
  sizes = _output_sizes(lhs.shape[1:3], window, padding)
  patches = _patches(lhs, padding, offsets=window, sizes=sizes)
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
  """Gather patches, [B, H, W, C] -> [B, h, w, N, C].

  Args:
    x: [B, H, W, C].
    padding: (low, high) of each spatial axis.
    offsets: number of offsets along each spatial axis; N is their product.
    sizes: (h, w).
  """
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
  """Return the spatial sizes of both operands."""
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
  """Reorder (batch, channels, *positions) to (batch, *positions, channels)."""
  return (order[0], *order[2:], order[1])


def _channels_last_numbers(ndim):
  maps = (0, ndim - 1, *range(1, ndim - 1))
  kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
  return jax.lax.ConvDimensionNumbers(maps, kernel, maps)
