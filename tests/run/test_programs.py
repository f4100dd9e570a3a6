"""Converted networks as sources of runs."""

import numpy as np
import pytest

from l2t_jax import errors, pretrained, report
from l2t_jax.run import from_config, saliency_images
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
  with pytest.raises(
    errors.InputError, match=r"source\.weights .* other files"
  ):
    train()
  contents = tmp_path / "run" / "contents.json"
  contents.unlink()
  with pytest.raises(errors.InputError, match="the source changed since"):
    train()
  weights.write_bytes(original)
  train()


_WITHOUT_LIBRARIES = """
import os, sys
for library in ("torch", "torchax", "timm", "keras"):
  sys.modules[library] = None  # An import of it fails.
import jax
jax.config.update("jax_num_cpu_devices", 2)
from l2t_jax.run import from_config
from tests.run import test_programs
sys.path.insert(0, os.getcwd())
os.chdir(sys.argv[1])
config = test_programs.from_transformer_to_convnext()
from_config.train_and_evaluate(config, {0: "devices"})
"""


def from_transformer_to_convnext():
  config = bad_input.get_config()
  config.method = "l2t_ww"
  config.target.model = "examples.networks:convnext"
  config.transfer.pairs = "layers_1->stage0_0, layers_4->stage1_0"
  config.bilevel.num_inner_steps = 1
  config.transfer.feature_scale = "std"
  config.optimizer.learning_rate = 0.05
  return config


@pytest.mark.long
def test_devices_and_seeds_agree_without_the_library(tmp_path, monkeypatch):
  """l2t_ww from a vision transformer of torch to a ConvNeXt."""
  pytest.importorskip("torchax")
  monkeypatch.chdir(tmp_path)
  bad_input.set_up(tmp_path)
  function = "tests.support.torch_networks:make_transformer"
  pretrained.main(
    pretrained.make_parser().parse_args(
      [
        f"torch:{function}",
        "source.safetensors",
        *("--image_size=8", "--mean=0.5,0.4,0.3", "--std=0.2"),
      ]
    )
  )
  config = from_transformer_to_convnext()
  from_config.train_and_evaluate(config, {0: "alone"})
  from_config.train_and_evaluate(config, {0: "zero", 1: "one"})
  result = small_runs.run_python("-c", _WITHOUT_LIBRARIES, tmp_path)
  assert result.returncode == 0, result.stderr
  (alone,) = small_runs.records(tmp_path / "alone", "epoch")
  assert len(alone["pair_weights"]) == 2
  for name in ("zero", "devices"):
    (record,) = small_runs.records(tmp_path / name, "epoch")
    for field in ("train_loss", "val_loss"):
      np.testing.assert_allclose(record[field], alone[field], rtol=1e-4)
    for pair, weight in record["pair_weights"].items():
      np.testing.assert_allclose(weight, alone["pair_weights"][pair], rtol=1e-4)
