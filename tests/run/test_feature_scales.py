"""Source features that are divided by their standard deviation."""

import json

import numpy as np
import pytest

from l2t_jax import errors, report
from l2t_jax.run import feature_scales, from_config, saliency_images
from l2t_jax.run import setup as setups
from tests.support import bad_input, small_runs

pytestmark = pytest.mark.xdist_group("feature scales")


@pytest.fixture
def config(tmp_path, monkeypatch):
  """A run of two epochs from a converted network, whose features are images."""
  monkeypatch.chdir(tmp_path)
  bad_input.set_up(tmp_path)
  config = bad_input.get_config()
  config.method, config.epochs = "l2t_ww", 2
  config.target.taps = ("conv1",)
  config.transfer.feature_scale = "std"
  return config


def _map(workdir):
  return json.loads((workdir / "transfer_map.json").read_text())


def _losses(workdir):
  return [
    record["train_loss"] for record in small_runs.records(workdir, "epoch")
  ]


def test_a_scale_is_the_standard_deviation_over_training_images(
  config, tmp_path
):
  bad_input.write_program(gain=100.0)(tmp_path)
  setup = setups.build(from_config.resolve(config))
  images = np.concatenate(
    [x.images for x in setup.dataset.with_seed(0).train_batches(0)]
  )
  pixels = images * setup.image_format.std + setup.image_format.mean
  scales = feature_scales.measure(setup)
  np.testing.assert_allclose(scales["stem"], 100 * pixels.std(), rtol=1e-3)


@pytest.mark.parametrize(("offset", "expected"), [(0.0, 1.0), (50.0, 0.05)])
def test_what_hardly_varies_is_not_blown_up(config, tmp_path, offset, expected):
  bad_input.write_program(gain=0.0, offset=offset)(tmp_path)
  setup = setups.build(from_config.resolve(config))
  np.testing.assert_allclose(
    feature_scales.measure(setup)["stem"], expected, rtol=1e-6
  )


def test_features_that_are_not_finite(config, tmp_path):
  bad_input.write_program(offset=np.inf)(tmp_path)
  with pytest.raises(errors.InputError, match="'stem' are not finite"):
    small_runs.train(config, tmp_path / "run")


def test_magnitudes_of_the_source_change_nothing(config, tmp_path, capsys):
  losses = {}
  for gain in (1.0, 100.0):
    bad_input.write_program(gain)(tmp_path)
    workdir = tmp_path / f"{gain}"
    small_runs.train(config, workdir)
    (tap,) = _map(workdir)["source_taps"]
    assert f"source features are divided by: stem {tap['scale']:.3g}" in (
      capsys.readouterr().out
    )
    losses[gain] = _losses(workdir)
    (run,) = report.find_runs([workdir])
    assert saliency_images.compute_saliency(run, 2).pairs
  np.testing.assert_allclose(losses[1.0], losses[100.0], rtol=1e-4)
  config.transfer.feature_scale = "none"
  bad_input.write_program(10.0)(tmp_path)
  small_runs.train(config, tmp_path / "none")
  assert "scale" not in _map(tmp_path / "none")["source_taps"][0]
  assert _losses(tmp_path / "none")[0] > 2 * losses[1.0][0]


def test_a_run_goes_on_with_the_scale_that_it_began_with(
  config, tmp_path, monkeypatch
):
  bad_input.write_program()(tmp_path)
  small_runs.train(config, tmp_path / "at once")
  train = lambda: small_runs.train(config, tmp_path / "cut off")
  small_runs.kill_in_epoch(2, train, monkeypatch)
  with monkeypatch.context() as context:
    context.setattr(feature_scales, "measure", None)
    train()
  assert _losses(tmp_path / "cut off") == _losses(tmp_path / "at once")
  assert _map(tmp_path / "cut off") == _map(tmp_path / "at once")


def test_a_map_is_for_features_of_its_scale(config, tmp_path):
  bad_input.write_program()(tmp_path)
  small_runs.train(config, tmp_path / "learned")
  config.transfer.map = str(tmp_path / "learned" / "transfer_map.json")
  small_runs.train(config, tmp_path / "reused")
  config.transfer.feature_scale = "none"
  with pytest.raises(errors.InputError, match="learned with 'std'; set it"):
    from_config.load_map(config)
