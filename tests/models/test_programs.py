"""Networks of other libraries as programs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import errors, models
from l2t_jax.models import programs, weight_files

# Tap of the program -> of the bundled network; not in the order of their names.
LAYERS = {"stem": "conv1", "block": "conv2"}
SIZE, TAPS = 8, tuple(LAYERS)


@pytest.fixture(scope="module")
def network():
  """A bundled network, as if it came from another library."""
  module = models.create("vgg_tiny", 5)
  params, state = models.init(module, jax.random.key(0), (SIZE, SIZE, 3))
  apply_fn = models.as_apply_fn(module)

  def apply(params, images):
    images = 2 * images[..., ::-1] - 1  # BGR, -1 to 1.
    logits, features, _ = apply_fn(params, state, images, train=False)
    return logits, *(features[name] for name in LAYERS.values())

  params = jax.device_get(params)
  return programs.Exportable(
    apply, params, lambda x: np.asarray(apply(params, x)[0]), SIZE, TAPS
  )


@pytest.fixture(scope="module")
def program(network):
  return programs.export(network)


@pytest.fixture
def functions(network, program):
  return programs.to_functions(program, network.params, TAPS)


def _images(*shape):
  return np.random.default_rng(0).random((*shape, SIZE, SIZE, 3), np.float32)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_program_computes_what_the_network_does(
  network, functions, batch_size
):
  images = _images(batch_size)
  logits, features, state = functions.apply(
    network.params, {}, images, train=True
  )
  assert state == {}
  assert list(features) == list(TAPS)
  expected = network.apply(network.params, images)
  for ours, theirs in zip((logits, *features.values()), expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_taps_are_in_the_order_of_computation(functions):
  layout = models.trace(functions, (SIZE, SIZE, 3))
  assert tuple(layout.taps) == TAPS


def test_seeds_become_one_larger_batch(network, functions):
  images = _images(2, 3)
  apply = lambda x: functions.apply(network.params, {}, x, train=False)[:2]
  jaxpr = jax.make_jaxpr(jax.vmap(apply))(images)
  assert f"f32[6,{SIZE},{SIZE},3]" in str(jaxpr)
  together = jax.vmap(apply)(images)
  alone = jax.tree.map(lambda *x: jnp.stack(x), *map(apply, images))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    together,
    alone,
  )


def test_weights_have_no_axis_of_seeds(network, functions):
  params = jax.tree.map(lambda x: jnp.stack([x, x]), network.params)
  apply = lambda p: functions.apply(p, {}, _images(1), train=False)[0]
  with pytest.raises(errors.InputError, match=r"weights .* only its images"):
    jax.vmap(apply)(params)


@pytest.mark.parametrize("seeds", [(), (2,)])
def test_the_derivative_is_the_networks(network, functions, seeds):
  """By the images and by the weights, also where seeds are stacked."""

  def ours(params, images):
    logits, features, _ = functions.apply(params, {}, images, train=False)
    return jnp.sum(logits**2) + jnp.sum(features[TAPS[0]] ** 2)

  def theirs(params, images):
    logits, first, _ = network.apply(params, images)
    return jnp.sum(logits**2) + jnp.sum(first**2)

  images, results = _images(*seeds, 3), []
  for function in (ours, theirs):
    grad = jax.grad(function, (0, 1))
    if seeds:
      grad = jax.vmap(grad, (None, 0))
    results.append(grad(network.params, images))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()
    ),
    *results,
  )


def test_a_program_of_bfloat16(network):
  program = programs.export(network, dtype=jnp.bfloat16, precision="default")
  functions = programs.to_functions(program, network.params, TAPS)
  logits, *_ = functions.apply(network.params, {}, _images(2), train=False)
  expected, *_ = network.apply(network.params, _images(2))
  assert logits.dtype == jnp.float32
  difference = np.abs(logits - expected).max() / np.abs(expected).max()
  assert 1e-5 < difference < 0.05


def test_code_by_name_is_refused(network):
  calls = network._replace(
    apply=lambda params, images: (jnp.linalg.qr(images[..., 0])[0],)
  )
  program = programs.export(calls)
  with pytest.raises(errors.InputError, match=r"calls .*lapack.* is not run"):
    programs.to_functions(program, network.params, ())


@pytest.mark.parametrize("damage", [lambda x: x[:100], lambda x: b"", bytes])
def test_a_damaged_program_says_how_to_make_it_again(
  network, program, tmp_path, damage
):
  path = tmp_path / "x.safetensors"
  program = damage(program) if damage is not bytes else bytes(len(program))
  metadata = {"model": "timm:x", "num_classes": "5", "command": "python -m y"}
  weight_files.save_program(path, network, program, metadata)
  with pytest.raises(errors.InputError) as caught:
    weight_files.load_network(path)
  message = str(caught.value)
  assert str(path) in message
  assert "cannot read the program" in message
  assert message.endswith("make the file again: python -m y")


def test_a_file_holds_all_that_a_source_needs(network, program, tmp_path):
  path = tmp_path / "x.safetensors"
  metadata = {"model": "timm:x", "num_classes": "5"}
  weight_files.save_program(path, network, program, metadata)
  loaded = weight_files.load_network(path)
  assert json.loads(loaded.metadata["taps"]) == list(TAPS)
  assert loaded.metadata["image_size"] == str(SIZE)
  assert loaded.model_state == {}
  images = _images(2)
  logits, *_ = loaded.network.apply(loaded.params, {}, images, train=False)
  np.testing.assert_allclose(
    logits, network.reference(images), rtol=1e-5, atol=1e-5
  )
