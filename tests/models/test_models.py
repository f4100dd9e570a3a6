"""Networks: taps, initialisation, layers."""

import functools

import chex
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import errors, models
from l2t_jax.models import layers
from tests.support import small_runs


@pytest.mark.parametrize("name", list(models.MODELS))
def test_listed_taps_are_what_the_network_returns(name):
  module = models.create(name, num_classes=7)
  shape = (module.image_size, module.image_size, 3)
  taps = models.trace(module, shape).taps
  assert set(module.default_taps) <= set(taps)
  images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  variables = jax.eval_shape(
    lambda key: models.init(module, key, shape), jax.random.key(0)
  )
  apply_fn = functools.partial(models.as_apply_fn(module), train=False)
  logits, features, _ = jax.eval_shape(apply_fn, *variables, images)
  assert logits.shape == (2, 7)
  assert {n: x.shape[1:] for n, x in features.items()} == taps


def test_taps_of_the_paper():
  shape = (32, 32, 3)
  source, target = (
    models.select_taps(models.trace(models.create(name, 10), shape))
    for name in ("resnet32", "vgg9")
  )
  assert list(source.values()) == [(32, 32, 16), (16, 16, 32), (8, 8, 64)]
  assert list(target.values()) == [
    (32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512), (2, 2, 512)
  ]  # fmt: skip
  for name in ("resnet18", "resnet34"):
    layout = models.trace(models.create(name, 10), (224, 224, 3))
    taps = models.select_taps(layout)
    assert list(taps.values()) == [
      (56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512)
    ]  # fmt: skip


def test_taps_are_in_order_of_depth_however_named():
  module = models.create("resnet32", 10)
  taps = ("stage3_block1", "stage1_block2")
  chosen = models.select_taps(models.trace(module, (32, 32, 3)), taps)
  assert list(chosen) == ["stage1_block2", "stage3_block1"]


def test_unknown_names():
  with pytest.raises(errors.InputError, match="'resnet31'; it must be one of"):
    models.create("resnet31", 10)
  with pytest.raises(errors.InputError, match=r"unknown tap .conv9.*conv1"):
    module = models.create("vgg9", 10)
    models.select_taps(models.trace(module, (32, 32, 3)), ("conv9",))


def test_initialisation_is_the_authors():
  module = models.create("vgg9", 10)
  params, model_state = models.init(module, jax.random.key(0), (32, 32, 3))
  for (*_, leaf), value in traverse_util.flatten_dict(params).items():
    if leaf == "bias":
      assert not value.any()
    if leaf == "scale":
      np.testing.assert_array_equal(value, 1)
    if leaf == "kernel" and value.ndim == 4:
      fan_out = value.shape[0] * value.shape[1] * value.shape[3]
      np.testing.assert_allclose(value.std(), (2 / fan_out) ** 0.5, rtol=0.05)
  classifier = params["classifier"]["kernel"]
  np.testing.assert_allclose(classifier.std(), 0.01, rtol=0.05)
  assert list(model_state) == ["batch_stats"]
  # That of a ResNet is PyTorch's: uniform within 1/8, of 64 features.
  module = models.create("resnet_tiny", 1000)
  params, _ = models.init(module, jax.random.key(0), (8, 8, 1))
  for values in params["fc"].values():
    assert np.abs(values).max() <= 1 / 8
    np.testing.assert_allclose(values.std(), 1 / 8 / 3**0.5, rtol=0.05)


def test_eval_mode_changes_nothing_and_train_mode_the_statistics():
  module = models.create("vgg_tiny", 10)
  params, model_state = models.init(module, jax.random.key(0), (8, 8, 1))
  apply_fn = jax.jit(models.as_apply_fn(module), static_argnames="train")
  images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  _, _, same = apply_fn(params, model_state, images, train=False)
  chex.assert_trees_all_equal(same, model_state)
  _, _, new = apply_fn(params, model_state, images, train=True)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), model_state, new)
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
  ("window", "stride", "padding", "size"), [(2, 2, 0, 8), (3, 2, 1, 9)]
)
def test_max_pool(window, stride, padding, size):
  x = np.random.default_rng(0).standard_normal((2, size, size, 3))
  padded = np.pad(
    x,
    ((0, 0), (padding, padding), (padding, padding), (0, 0)),
    constant_values=-np.inf,
  )
  out = (size + 2 * padding - window) // stride + 1
  expected = np.array(
    [
      [
        padded[
          :,
          i * stride : i * stride + window,
          j * stride : j * stride + window,
        ].max(axis=(1, 2))
        for j in range(out)
      ]
      for i in range(out)
    ]
  ).transpose(2, 0, 1, 3)
  actual = layers.max_pool(jnp.asarray(x), window, stride, padding)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("values", "expected"),
  [([[1, 1], [1, 1]], [[1, 0], [0, 0]]), ([[0, 1], [1, 0]], [[0, 1], [0, 0]])],
)
def test_max_pool_gives_the_gradient_to_the_first_of_equals(values, expected):
  """Row by row."""
  values = jnp.array(values, jnp.float32)[None, :, :, None]
  grad = jax.grad(lambda x: layers.max_pool(x, 2, 2, 0).sum())(values)
  np.testing.assert_array_equal(grad[0, :, :, 0], expected)


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_max_pool_keeps_nan(place):
  x = jnp.ones((2, 2)).at[place].set(jnp.nan)
  assert jnp.isnan(layers.max_pool(x[None, :, :, None], 2, 2, 0)).all()


@pytest.mark.parametrize("size", [3, 5, 6, 8])
def test_max_pool_loses_no_gradient_in_fused_code(size):
  """With `jnp.maximum` this computation loses gradients on CPU."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  images, kernels = draw(size, 8, 8, 3), (draw(3, 3, 3, 6), draw(3, 3, 6, 8))

  def stage(x, kernel, bias):
    variables = {"params": {"kernel": kernel}}
    x = layers.conv(kernel.shape[-1], name="conv").apply(variables, x)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    x = (x - mean) * jax.lax.rsqrt(var + 1e-5) + bias
    return layers.max_pool(jax.nn.relu(x), 2, 2, 0)

  def rest(pooled):
    logits = stage(pooled, kernels[1], jnp.zeros(8)).mean((1, 2))
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

  @jax.jit
  def run(bias, kernel):
    pooled, pullback = jax.vjp(
      lambda bias, kernel: stage(images, kernel, bias), bias, kernel
    )
    cotangent = jax.grad(rest)(pooled)
    return pooled, cotangent, pullback(cotangent)

  pooled, cotangent, (actual, _) = run(jnp.zeros(6), kernels[0])
  # A bias before ReLU and pool adds the same to each positive maximum.
  expected = jnp.sum(cotangent * (pooled > 0), axis=(0, 1, 2))
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)


def test_bfloat16_keeps_parameters_and_logits_in_float32():
  module = models.create("resnet_tiny", 10, dtype=jnp.bfloat16)
  params, model_state = models.init(module, jax.random.key(0), (8, 8, 1))
  logits, features, _ = jax.eval_shape(
    functools.partial(models.as_apply_fn(module), train=True),
    params,
    model_state,
    jnp.zeros((2, 8, 8, 1)),
  )
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
  assert {x.dtype.name for x in features.values()} == {"bfloat16"}
  assert logits.dtype == jnp.float32


def test_command_lists_taps_and_proposes_pairs():
  command = ["-m", "l2t_jax.models", "resnet32"]
  command.append("--target=examples.networks:convnext")
  output = small_runs.run_python(*command)
  assert output.returncode == 0, output.stderr
  for text in ("stage3_block5", "8x8", "64", "yes"):
    assert text in output.stdout
  # 16x16, 8x8 and 4x4 against 32x32, 16x16 and 8x8.
  assert output.stdout.splitlines()[-3:] == [
    "stage2_block5->stage0_0",
    "stage3_block5->stage1_0",
    "stage3_block5->stage2_0",
  ]


@pytest.mark.parametrize("name", ["resnet_tiny", "vgg_tiny"])
def test_the_last_tap_is_what_enters_the_classifier(name):
  module = models.create(name, num_classes=7)
  params, model_state = models.init(module, jax.random.key(0), (16, 16, 3))
  assert list(models.trace(module, (16, 16, 3)).taps)[-1] == "penultimate"
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  logits, features, _ = models.as_apply_fn(module)(
    params, model_state, images, train=False
  )
  classifier = params["fc" if "fc" in params else "classifier"]
  by_hand = features["penultimate"][:, 0, 0] @ classifier["kernel"]
  np.testing.assert_allclose(logits, by_hand + classifier["bias"], rtol=1e-5)


def test_batch_norm_is_that_of_flax_in_every_derivative(x64):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  x, weight = 3 + draw(4, 3, 2, 5), draw(4, 3, 2, 5)
  params = {"scale": 1 + 0.1 * draw(5), "bias": draw(5)}
  norms = (
    layers.BatchNorm(train=True),
    nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5),
  )

  def loss(norm, params, x):
    stats = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    y, state = norm.apply(
      {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
    )
    return jnp.sum(weight * jnp.tanh(y)), state["batch_stats"]

  results = []
  for norm in norms:
    gradient = jax.grad(
      lambda *args, norm=norm: loss(norm, *args), argnums=(0, 1), has_aux=True
    )
    first = lambda *args, gradient=gradient: gradient(*args)[0]
    along = (jax.tree.map(jnp.sin, params), jnp.cos(x))
    forward = jax.jvp(first, (params, x), along)
    squares = lambda *args, first=first: sum(
      jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(first(*args))
    )
    reverse = jax.grad(squares, argnums=(0, 1))(params, x)
    results.append((forward, reverse, gradient(params, x)[1]))
  (*ours, stats), (*flax, flax_stats) = results
  chex.assert_trees_all_close(ours, flax, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(stats["mean"], flax_stats["mean"], rtol=1e-12)
  # PyTorch keeps the unbiased variance of the 24 values of a channel.
  flax_var = 10 * (flax_stats["var"] - 0.9)
  np.testing.assert_allclose(
    10 * (stats["var"] - 0.9), flax_var * 24 / 23, rtol=1e-9
  )
