"""Converted networks as sources of runs."""

import numpy as np
import pytest

from l2t_jax import errors, report
from l2t_jax.run import saliency_images
from tests.support import bad_input, small_runs


def test_a_run_from_a_converted_network(tmp_path, monkeypatch, capsys):
  """The data are grey; its saliency needs a derivative of the program."""
  monkeypatch.chdir(tmp_path)
  bad_input.set_up(tmp_path)
  bad_input.write_program()(tmp_path)
  config = bad_input.get_config()
  config.method = "l2t_ww"
  config.target.taps = ("conv1",)
  summary = small_runs.train(config, tmp_path / "run")
  assert np.isfinite(summary["test_accuracy"])
  (record,) = small_runs.records(tmp_path / "run", "epoch")
  assert list(record["pair_weights"]) == ["stem->conv1"]
  said = " ".join(capsys.readouterr().out.split())
  assert (
    "source source.safetensors: 8x8 images of 3 channels, which it normalises"
    " itself; 2 classes; 1 pairs"
  ) in said
  (run,) = report.find_runs([tmp_path / "run"])
  seen = saliency_images.compute_saliency(run, 2)
  assert [pair.pair for pair in seen.pairs] == ["stem → conv1"]


def test_a_run_goes_on_with_the_program_that_it_began_with(
  tmp_path, monkeypatch
):
  """Another network with the same weights is another source."""
  monkeypatch.chdir(tmp_path)
  bad_input.set_up(tmp_path)
  config = bad_input.get_config()
  config.epochs = 2

  train = lambda: small_runs.train(config, tmp_path / "run")
  bad_input.write_program()(tmp_path)
  weights = tmp_path / config.source.weights
  original = weights.read_bytes()
  small_runs.kill_in_epoch(2, train, monkeypatch)
  bad_input.write_program(gain=2.0)(tmp_path)
  with pytest.raises(errors.InputError, match="the source changed since"):
    train()
  weights.write_bytes(original)
  train()
