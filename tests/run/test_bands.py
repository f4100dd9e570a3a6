"""Sources that see some channels of the target's images."""

import functools

from flax import linen as nn
import jax.export
import numpy as np
import pytest

from examples import networks
from l2t_jax import errors, export, models, report
from l2t_jax.data import image_formats
from l2t_jax.run import experiments, fit, saliency_images, sources
from tests.support import data_sets, object_experiment, small_runs

_SHAPE = (8, 8, 3)
_SOURCE_MEAN, _SOURCE_STD = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)


class _Echo(nn.Module):
  """A network whose tap is its images."""

  @nn.compact
  def __call__(self, images, *, train):
    del train
    logits = nn.Dense(3)(images.mean((1, 2)))
    return logits, {"echo": images}


@functools.cache
def _source(network, **fields):
  params, state = models.init(network, jax.random.key(0), _SHAPE)
  return experiments.Source(
    network,
    params,
    state,
    channels=3,
    mean=_SOURCE_MEAN,
    std=_SOURCE_STD,
    **fields,
  )


def _arrays(dtype="uint16", high=10_000):
  rng = np.random.default_rng(0)
  draw = lambda num: rng.uniform(0, high, (num, 8, 8, 5)).astype(dtype)
  return {
    "x_train": draw(60),
    "y_train": np.arange(60) % 3,
    "x_val": draw(12),
    "y_val": np.arange(12) % 3,
    "x_test": draw(15),
    "y_test": np.arange(15) % 3,
  }


def _trace(source, image_format):
  experiment = object_experiment.create()._replace(sources={"": source})
  (traced,) = sources.trace(experiment, image_format)
  return traced


def _fit(arrays, workdir=None, **fields):
  config = fit.default_config()
  config.method, config.epochs, config.batch_size = "l2t_ww", 1, 20
  config.bilevel.num_inner_steps = 1
  config.transfer.pairs = "stage0_0->stage0_0"
  source = _source(networks.ConvNeXt(3), **fields)
  return fit.fit(
    networks.ConvNeXt(3),
    arrays,
    source=source._replace(taps="*"),
    config=config,
    workdir=workdir,
  )


def test_a_source_sees_its_bands_in_its_own_normalisation():
  values = np.random.default_rng(0).uniform(size=(2, 8, 8, 5))
  mean, std = np.linspace(0.3, 0.7, 5), np.linspace(0.1, 0.3, 5)
  image_format = image_formats.ImageFormat(8, 5, tuple(mean), tuple(std))
  traced = _trace(_source(_Echo(), bands=(3, 0, 2)), image_format)
  apply_fn = traced.make_apply_fn(["echo"], image_format)
  _, features, _ = apply_fn(
    *traced.variables, (values - mean) / std, train=False
  )
  np.testing.assert_allclose(
    features["echo"],
    (values[..., [3, 0, 2]] - _SOURCE_MEAN) / _SOURCE_STD,
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ("bands", "message"),
  [
    ((), "sees 3-channel images, but the target's have 5"),
    ((0, 1), "but it sees 3-channel images; list as many"),
    ((0, 1, -1), r"bands of the source .* are \(0, 1, -1\), but the images"),
    ((0, 1, 5), r"bands of the source .* are \(0, 1, 5\), but the images have"),
  ],
)
def test_bands_that_cannot_be(bands, message):
  image_format = image_formats.ImageFormat(8, 5, (0.5,), (0.5,))
  with pytest.raises(errors.InputError, match=message):
    _trace(_source(_Echo(), bands=bands), image_format)


def test_fine_tuning_has_no_bands():
  config = fit.default_config()
  config.method, config.epochs, config.batch_size = "finetune", 1, 20
  arrays = _arrays("uint8", 256)
  arrays |= {key: x[..., :3] for key, x in arrays.items() if key[0] == "x"}
  start = lambda bands: fit.fit(
    networks.ConvNeXt(3),
    arrays,
    source=_source(networks.ConvNeXt(3), bands=bands),
    config=config,
  )
  with pytest.raises(errors.InputError, match=r"weights for the bands \(2, 1"):
    start((2, 1, 0))
  assert start((0, 1, 2)).summary["epochs"] == 1


def test_bands_of_a_file_in_fit(source):
  config = fit.default_config()
  config.method, config.epochs, config.batch_size = "at", 1, 20
  run = lambda given: fit.fit(
    networks.ConvNeXt(3), _arrays(), source=given, config=config
  )
  with pytest.raises(errors.InputError, match="sees 1-channel images, but"):
    run(source)
  config.source.bands = (4,)
  assert run(source).summary["epochs"] == 1
  with pytest.raises(errors.InputError, match="bands of the config's source"):
    run(_source(networks.ConvNeXt(3), bands=(0, 1, 2)))


def test_sources_of_another_scale():
  """Values of 0 to 10,000 taught them, but these images have 0 to 1."""
  source = _source(_Echo())._replace(mean=(5000.0,), std=(2900.0,))
  experiment = object_experiment.create()._replace(sources={"": source})
  with pytest.raises(errors.InputError, match="go from 0 to 1; scale the"):
    sources.check_values(experiment, (0.0, 1.0))
  sources.check_values(experiment, (0.0, 10_000.0))


def test_one_band_is_grey():
  image_format = image_formats.ImageFormat(8, 5, (0.5,), (0.5,))
  traced = _trace(_source(_Echo(), bands=(4,)), image_format)
  apply_fn = traced.make_apply_fn(["echo"], image_format)
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 5))
  _, features, _ = apply_fn(*traced.variables, images, train=False)
  rgb = features["echo"] * np.array(_SOURCE_STD) + np.array(_SOURCE_MEAN)
  np.testing.assert_allclose(
    rgb, np.repeat(images[..., 4:] * 0.5 + 0.5, 3, axis=-1), rtol=1e-4
  )


def test_images_of_five_channels_from_training_to_prediction(tmp_path):
  arrays = _arrays()
  result = _fit(arrays, tmp_path, bands=(2, 1, 0))
  assert result.predictor.image_format.channels == 5
  assert result.predictor.dtype == np.uint16
  accuracy = np.mean(
    result.predict(arrays["x_test"]).argmax(axis=-1) == arrays["y_test"]
  )
  assert accuracy == pytest.approx(result.summary["test_accuracy"], abs=1e-6)
  with pytest.raises(errors.InputError, match=r"must be uint16 \[N, 8, 8, 5\]"):
    result.predict(arrays["x_test"].astype(np.float32))
  with pytest.raises(errors.InputError, match="uint16 arrays of 5 channels"):
    result.predictor.read(tmp_path / "0.png")
  program = jax.export.deserialize(export.to_stablehlo(result.predictor))
  np.testing.assert_allclose(
    program.call(arrays["x_test"]), result.predict(arrays["x_test"]), atol=1e-5
  )
  # The same folder with other bands is another run.
  with pytest.raises(errors.InputError, match=r"source.bands was \[2, 1, 0\]"):
    _fit(arrays, tmp_path, bands=(0, 1, 2))


def test_bands_from_a_config(source, tmp_path):
  config = small_runs.small_config(source, 1)
  config.data.source = "npz"
  config.data.path = data_sets.save_npz(
    tmp_path / "five.npz", _arrays("float32", 1)
  )
  config.data.channels, config.batch_size = 5, 8
  config.data.mean = config.data.std = ()
  with pytest.raises(errors.InputError, match=r"sees 1-channel images, but"):
    small_runs.train(config, tmp_path / "run")
  config.source.bands = (4,)
  small_runs.train(config, tmp_path / "run")
  (run,) = report.find_runs([tmp_path / "run"])
  seen = saliency_images.compute_saliency(run, 2)
  assert len(seen.images) == 2


@pytest.mark.parametrize(("dtype", "high"), [("float32", 255), ("uint8", 255)])
def test_values_that_the_source_was_not_trained_on(dtype, high):
  arrays = _arrays(dtype, high)
  if dtype == "float32":
    with pytest.raises(
      errors.InputError, match="values of the images go from 0"
    ):
      _fit(arrays, bands=(2, 1, 0))
    arrays |= {key: x / 255 for key, x in arrays.items() if "x" in key}
    arrays |= {k: x.astype(np.float32) for k, x in arrays.items() if "x_" in k}
  assert _fit(arrays, bands=(2, 1, 0)).summary["epochs"] == 1
