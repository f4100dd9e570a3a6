"""Networks of keras.applications become programs."""

import os

import numpy as np
import pytest

from l2t_jax import errors
from l2t_jax.models import programs

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


def test_a_network_with_weights_of_ones_own(model):
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
  functions = programs.to_functions(
    programs.export(network), network.params, network.taps
  )
  logits, found, _ = functions.apply(
    network.params, {}, pixels / np.float32(255), train=False
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found[tap], features, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit(model, tmp_path):
  _, path = model
  with pytest.raises(errors.InputError, match="does not fit the network"):
    convert_keras.from_keras("MobileNetV2", path, "", READING)
  damaged = tmp_path / "x.weights.h5"
  damaged.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(errors.InputError, match="no whole HDF5 file"):
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
