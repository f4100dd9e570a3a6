"""Convolutions as this package lowers them for CPU: values and forms."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import lowering  # noqa: F401  (changes how JAX lowers)

pytestmark = pytest.mark.optimized


def convolve(x, kernel, *, stride=1, pad=1, dilation=1, groups=1):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((pad, pad), (pad, pad)),
    rhs_dilation=(dilation, dilation),
    feature_group_count=groups,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def convolve_by_offsets(x, kernel, *, stride=1, pad=1, dilation=1, groups=1):
  """The definition: a sum over the kernel's positions and the groups."""
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  size = (x.shape[1] - dilation * (kernel.shape[0] - 1) - 1) // stride + 1
  outputs = []
  for part, part_kernel in zip(
    jnp.split(x, groups, axis=-1),
    jnp.split(kernel, groups, axis=-1),
    strict=True,
  ):
    total = 0.0
    for i, j in itertools.product(range(kernel.shape[0]), repeat=2):
      rows, columns = (
        slice(start, start + stride * (size - 1) + 1, stride)
        for start in (i * dilation, j * dilation)
      )
      total += part[:, rows, columns] @ part_kernel[i, j]
    outputs.append(total)
  return jnp.concatenate(outputs, axis=-1)


@pytest.mark.parametrize(
  ("size", "kernel_size", "options"),
  [
    (1, 1, {"pad": 0}),
    (1, 3, {}),
    (2, 3, {}),
    (3, 3, {"groups": 2}),
    (3, 3, {"stride": 2}),
    (2, 2, {"pad": 0}),
    (4, 3, {}),
    (5, 3, {"stride": 2, "groups": 2}),
    (7, 3, {"pad": 2, "dilation": 2}),
  ],
)
def test_two_orders_of_derivatives(size, kernel_size, options, x64):
  rng = np.random.default_rng(0)
  groups = options.get("groups", 1)
  x = rng.standard_normal((3, size, size, 4))
  kernel = rng.standard_normal((kernel_size, kernel_size, 4 // groups, 6))

  def derivatives(convolution):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(convolution(x, kernel, **options)))

    def squared_slope(x, kernel):
      slopes = jax.grad(loss, (0, 1))(x, kernel)
      return sum(jnp.sum(slope**2) for slope in slopes)

    def everything(x, kernel):
      values = jax.value_and_grad(loss, (0, 1))(x, kernel)
      return values, jax.grad(squared_slope, (0, 1))(x, kernel)

    # Under vmap, a convolution has groups.
    two = (np.stack([x, 2 * x]), np.stack([kernel, -kernel]))
    return jax.jit(everything)(x, kernel), jax.jit(jax.vmap(everything))(*two)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10),
    derivatives(convolve),
    derivatives(convolve_by_offsets),
  )


def test_derivatives_in_a_loop_have_the_fast_order():
  """XLA:CPU is about 100 times slower with any other one, within a loop."""
  x, kernel = jnp.ones((4, 8, 8, 16)), jnp.ones((3, 3, 16, 16))

  def loss(x, kernel):
    step = lambda x, _: (jnp.sin(convolve(x, kernel)), None)
    return jnp.sum(jax.lax.scan(step, x, length=3)[0])

  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile()
  orders = re.findall(
    r" convolution\(.*dim_labels=([^,\s]+)", compiled.as_text()
  )
  assert len(orders) == 3  # Forward, by the input, by the kernel.
  assert set(orders) == {"b01f_01io->b01f"}
