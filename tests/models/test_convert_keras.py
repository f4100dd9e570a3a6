"""Networks of keras.applications become programs."""

import os

import numpy as np
import pytest

from l2t_jax import errors, models
from l2t_jax.models import programs, weight_files

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")

from l2t_jax.models import convert_keras  # noqa: E402

READING = programs.Reading(32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A network of three classes, and a file of its weights."""
  keras.utils.set_random_seed(0)
  model = keras.applications.MobileNet(
    weights=None,
    classes=3,
    classifier_activation=None,
    input_shape=(32, 32, 3),
  )
  path = tmp_path_factory.mktemp("keras") / "mine.weights.h5"
  model.save_weights(path)
  return model, path


def test_a_network_with_weights_of_ones_own(model, tmp_path):
  model, path = model
  network = convert_keras.from_keras("MobileNet", path, "", READING)
  pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  prepared = keras.applications.mobilenet.preprocess_input(
    pixels.astype(np.float32)
  )
  tap = "conv_pw_5_relu"
  expected, features = keras.Model(
    model.inputs, [model.output, model.get_layer(tap).output]
  ).predict(prepared, verbose=0)
  file = tmp_path / "mine.safetensors"
  metadata = {"model": "keras:MobileNet", "num_classes": "3"}
  weight_files.save_program(file, network, programs.export(network), metadata)
  loaded = weight_files.load_network(file)
  layout = models.trace(loaded.network, (32, 32, 3))
  # A padding is part of the layer after it.
  assert list(models.select_taps(layout)) == [
    f"conv_pw_{number}_relu" for number in (1, 3, 5, 11)
  ]
  logits, found, _ = loaded.network.apply(
    loaded.params, {}, pixels / np.float32(255), train=False
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found[tap], features, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit(model, tmp_path):
  _, path = model
  with pytest.raises(errors.InputError, match="does not fit the network"):
    convert_keras.from_keras("MobileNetV2", path, "", READING)
  damaged = tmp_path / "x.weights.h5"
  damaged.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(errors.InputError, match="not a whole HDF5 file"):
    convert_keras.from_keras("MobileNet", damaged, "", READING)
  with pytest.raises(errors.InputError, match=r"no checkpoint at .*nope"):
    convert_keras.from_keras(
      "MobileNet", damaged.with_name("nope"), "", READING
    )


def test_an_unknown_name():
  with pytest.raises(errors.InputError, match="did you mean MobileNet"):
    convert_keras.from_keras("MobileNt", None, "", READING)


def test_the_normalisation_is_keras():
  reading = READING._replace(mean=(0.5,))
  with pytest.raises(errors.InputError, match="leave out --mean"):
    convert_keras.from_keras("MobileNet", None, "", reading)


def test_blocks_end_where_branches_meet():
  """Not in the first layers of a block that lowers the resolution."""
  model = keras.applications.MobileNetV2(weights=None, input_shape=(64, 64, 3))
  outputs = [layer.name for layer in model.layers if layer.output.ndim == 4]
  assert convert_keras._default_taps(model, outputs) == (
    "block_2_add", "block_5_add", "block_12_add", "block_15_add",
  )  # fmt: skip
