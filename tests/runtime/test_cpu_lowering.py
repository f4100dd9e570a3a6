"""The lowering rules for CPU: values, derivatives and forms."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax.models import layers


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


def convolve_by_windows(x, kernel, *, stride=1, pad=1, dilation=1, groups=1):
  """The definition: each output sees a window, and its group of channels."""
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  length = kernel.shape[0]
  size = (x.shape[1] - dilation * (length - 1) - 1) // stride + 1
  positions = stride * np.arange(size)[:, None] + dilation * np.arange(length)
  windows = x[:, positions][:, :, :, positions]
  out = jnp.einsum(
    "bhkwlgi,kligo->bhwgo",
    windows.reshape(*windows.shape[:-1], groups, -1),
    kernel.reshape(*kernel.shape[:-1], groups, -1),
  )
  return out.reshape(*out.shape[:3], -1)


@pytest.mark.parametrize(
  ("size", "channels", "kernel_size", "options"),
  [
    (1, 4, 1, {"pad": 0}),
    (1, 6, 3, {}),
    (2, 6, 3, {}),
    (3, 6, 3, {"pad": 0}),
    (3, 4, 3, {"groups": 2}),
    (2, 4, 9, {"pad": 4, "groups": 2}),
    (3, 6, 3, {"stride": 2}),
    (2, 6, 2, {"pad": 0}),
    (4, 6, 3, {}),
    (5, 3, 3, {}),
    (5, 3, 5, {}),
    (5, 4, 3, {"stride": 2, "groups": 2}),
    (7, 6, 3, {"pad": 2, "dilation": 2}),
  ],
)
def test_two_orders_of_derivatives(size, channels, kernel_size, options, x64):
  rng = np.random.default_rng(0)
  groups = options.get("groups", 1)
  x = rng.standard_normal((3, size, size, channels))
  kernel = rng.standard_normal(
    (kernel_size, kernel_size, channels // groups, 6)
  )

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
    derivatives(convolve_by_windows),
  )


def convolve_along(x, kernel):
  """Convolve [B, *positions, C] by [*window, C, D], any number of axes."""
  letters = "DHW"[-(x.ndim - 2) :]
  maps = f"N{letters}C"
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (1,) * len(letters),
    "SAME",
    dimension_numbers=(maps, f"{letters}IO", maps),
  )


def convolve_along_by_offsets(x, kernel):
  window = kernel.shape[:-2]
  edges = [(length // 2, length // 2) for length in window]
  padded = jnp.pad(x, ((0, 0), *edges, (0, 0)))
  total = 0.0
  for start in itertools.product(*map(range, window)):
    part = jax.lax.dynamic_slice(padded, (0, *start, 0), x.shape)
    total += part @ kernel[start]
  return total


@pytest.mark.parametrize("positions", [(5,), (2, 3, 4)])
def test_one_and_three_axes(positions, x64):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, *positions, 6))
  kernel = rng.standard_normal((*(3,) * len(positions), 6, 5))

  def derivatives(convolution):
    loss = lambda *xs: jnp.sum(jnp.sin(convolution(*xs)))
    slopes = jax.grad(loss, (0, 1))
    squared = lambda *xs: sum(jnp.sum(slope**2) for slope in slopes(*xs))
    return jax.jit(
      lambda *xs: (loss(*xs), slopes(*xs), jax.grad(squared, (0, 1))(*xs))
    )(x, kernel)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10),
    derivatives(convolve_along),
    derivatives(convolve_along_by_offsets),
  )


@pytest.mark.optimized
@pytest.mark.parametrize(
  ("num_axes", "order"),
  [(1, "b0f_0io->b0f"), (2, "b01f_01io->b01f"), (3, "b012f_012io->b012f")],
)
def test_derivatives_in_a_loop_have_the_fast_order(num_axes, order):
  """In a loop XLA:CPU is about 100 times slower with any other order."""
  x = jnp.ones((4, *(8,) * num_axes, 16))
  kernel = jnp.ones((*(3,) * num_axes, 16, 16))

  def loss(x, kernel):
    step = lambda x, _: (jnp.sin(convolve_along(x, kernel)), None)
    return jnp.sum(jax.lax.scan(step, x, length=3)[0])

  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile()
  orders = re.findall(
    r" convolution\(.*dim_labels=([^,\s]+)", compiled.as_text()
  )
  assert len(orders) == 3  # Forward, by the input, by the kernel.
  assert set(orders) == {order}


@pytest.mark.parametrize(
  ("shape", "channels"), [((4, 2, 2), 16), ((4, 8, 8), 3)]
)
def test_patches_need_no_transposed_operands(shape, channels):
  """Transposing a kernel takes longer than multiplying by it."""
  x, kernel = jnp.ones((*shape, channels)), jnp.ones((3, 3, channels, 32))
  everything = jax.jit(
    jax.grad(lambda *xs: jnp.sum(jnp.sin(convolve(*xs))), (0, 1))
  )
  text = everything.lower(x, kernel).as_text()
  assert text.count("dot_general") == 3  # Forward, by the input, the kernel.
  assert "stablehlo.transpose" not in text
  assert "stablehlo.convolution" not in text


@pytest.mark.parametrize(
  ("shape", "axes"),
  [
    ((5, 8, 9, 8), (0, 1, 2)),
    ((5, 8, 9, 8), (1, 2)),
    ((2, 3, 64, 8), (2,)),
    ((2, 5, 8, 9, 8), (1, 2, 3)),
    ((2, 3, 50, 50, 8), (1, 2, 3)),  # Too deep for one product.
  ],
)
def test_sums_over_positions_are_products(shape, axes, x64):
  x = np.random.default_rng(0).standard_normal(shape)
  total = jax.jit(functools.partial(jnp.sum, axis=axes))
  np.testing.assert_allclose(total(x), x.sum(axes), rtol=1e-12, atol=1e-12)
  assert "dot_general" in total.lower(x).as_text()


@pytest.mark.parametrize(
  ("x", "axes"),
  [
    (np.ones((5, 8, 9, 8)), (0, 3)),
    (np.ones((5, 8, 9, 8)), (0, 2)),
    (np.ones((5, 8, 9, 8)), ()),
    (np.ones((5, 0, 9, 8)), (0, 1, 2)),
    (np.ones((500, 2, 8)), (0, 1)),  # Many small sums.
    (np.ones((512, 8)), (0,)),
    (np.ones((5, 64, 8), np.int32), (0, 1)),
    (np.ones((5, 64, 8), np.complex64), (0, 1)),
  ],
)
def test_other_sums_are_left_alone(x, axes):
  lowered = jax.jit(functools.partial(jnp.sum, axis=axes)).lower(x)
  assert "dot_general" not in lowered.as_text()


def test_a_bias_that_is_repeated_is_summed_by_a_product():
  """The derivative of a bias, in any network."""
  loss = lambda bias, x: jnp.sum(jnp.sin(x + bias))
  lowered = jax.jit(jax.grad(loss)).lower(jnp.ones(16), jnp.ones((4, 8, 8, 16)))
  assert "dot_general" in lowered.as_text()


def test_a_pool_of_windows_side_by_side_joins_its_derivative():
  """Padded and added slices would take twice as long."""
  pool = functools.partial(layers.max_pool, window=2, stride=2, padding=0)
  slope = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))
  text = jax.jit(slope).lower(jnp.ones((2, 5, 4, 3))).as_text()
  assert text.count("stablehlo.concatenate") == 2


@pytest.mark.optimized
def test_the_slope_of_a_slope_grows_with_the_map():
  """Linearly, although a convolution with a large window is involved."""

  def flops(size):
    loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel)))
    slope = lambda x, kernel: jnp.sum(jax.grad(loss, 1)(x, kernel) ** 2)
    x, kernel = jnp.ones((2, size, size, 8)), jnp.ones((3, 3, 8, 8))
    compiled = jax.jit(jax.grad(slope)).lower(x, kernel).compile()
    return compiled.cost_analysis()["flops"]

  assert flops(32) < 5 * flops(16)


@pytest.mark.parametrize(
  ("size", "channels", "kernel_size"), [(2, 4, 5), (5, 3, 7), (2, 0, 3)]
)
def test_convolutions_of_nothing(size, channels, kernel_size):
  x = jnp.ones((2, size, size, channels))
  kernel = jnp.ones((kernel_size, kernel_size, channels, 6))
  out = max(size - kernel_size + 1, 0) if channels else size
  pad = 0 if channels else 1
  np.testing.assert_array_equal(
    jax.jit(functools.partial(convolve, pad=pad))(x, kernel),
    np.zeros((2, out, out, 6)),
  )


def test_sums_of_no_images():
  images = jnp.ones((0, 64, 8, 8))
  np.testing.assert_array_equal(jnp.sum(images, (0, 1, 2)), np.zeros(8))
  assert jnp.sum(images, (1, 2)).shape == (0, 8)


@pytest.mark.parametrize(
  "function",
  [
    lambda x: jnp.sum(x, (1, 2)),
    lambda x: convolve(x, jnp.ones((3, 3, 3, 5))),
    lambda x: convolve(jnp.tile(x, (1, 1, 1, 2)), jnp.ones((3, 3, 6, 5))),
  ],
)
def test_unknown_sizes_of_maps_are_exported(function):
  shape = (4, *jax.export.symbolic_shape("h, w"), 3)
  exported = jax.export.export(jax.jit(function))(
    jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  x = np.random.default_rng(0).standard_normal((4, 3, 64, 3), np.float32)
  np.testing.assert_allclose(exported.call(x), function(x), rtol=1e-4)


@pytest.mark.parametrize(("size", "channels"), [(2, 8), (8, 3)])
def test_derivatives_within_shard_map(size, channels):
  mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,))
  split, whole = jax.P("d"), jax.P()
  x = jnp.ones((4, size, size, channels))
  kernel = jnp.ones((3, 3, channels, 6))
  slope = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel))))
  mapped = jax.shard_map(
    slope, mesh=mesh, in_specs=(split, whole), out_specs=split
  )
  np.testing.assert_allclose(
    jax.jit(mapped)(x, kernel), slope(x, kernel), rtol=1e-5
  )


@pytest.mark.parametrize("explicit", [(), ("d",)])
def test_explicit_shardings_stay(explicit):
  mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Explicit,))
  with jax.set_mesh(mesh):
    place = lambda x: jax.device_put(x, jax.P(*explicit))
    x, kernel = place(jnp.ones((4, 8, 8, 3))), jnp.ones((3, 3, 3, 16))
    maps = jax.jit(convolve)(x, kernel)
    sums = jax.jit(lambda x: jnp.sum(x, (1, 2)))(maps)
  # Border and corner positions have fewer neighbours.
  assert float(sums[0, 0]) == 3 * (6 * 6 * 9 + 4 * 6 * 6 + 4 * 4)
