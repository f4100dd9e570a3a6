"""The trained target in other formats: the same outputs."""

import argparse

import chex
from flax import linen as nn
import jax.export
import numpy as np
import pytest
import safetensors.numpy

from examples import networks
from l2t_jax import errors, export, models
from l2t_jax.data import image_formats
from l2t_jax.models import torch_weights, weight_files
from l2t_jax.run import predictor as predictors
from tests.support import small_runs

CLASSES = tuple("abcdef")


def make_predictor(network, shape):
  params, model_state = models.init(network, jax.random.key(0), shape)
  image_format = image_formats.ImageFormat(shape[0], shape[-1], (0.4,), (0.3,))
  return predictors.Predictor(
    network,
    params,
    model_state,
    image_format,
    np.dtype(np.uint8),
    16,
    CLASSES,
    "classification",
    lambda image: image,
  )


def images_of(predictor, count):
  rng = np.random.default_rng(0)
  shape = (count, *predictor.image_format.shape)
  return rng.integers(0, 256, shape, np.uint8)


def test_pytorch_computes_the_same(tmp_path):
  torch = pytest.importorskip("torch")
  from tests.support import torch_resnet

  predictor = make_predictor(models.create("resnet18", 6), (32, 32, 3))
  export.write(predictor, tmp_path / "target.pt")
  export.write(predictor, tmp_path / "target.safetensors")
  state = torch.load(tmp_path / "target.pt", weights_only=True)
  same = safetensors.numpy.load_file(tmp_path / "target.safetensors")
  assert state.keys() == same.keys()
  for name, tensor in state.items():
    np.testing.assert_array_equal(tensor.numpy(), same[name])
  images = images_of(predictor, 3)
  normalised = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.4) / 0.3
  expected, _ = torch_resnet.resnet(state, normalised, (2, 2, 2, 2), 2)
  actual = predictor.apply(images)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_vgg_in_pytorch(tmp_path):
  torch = pytest.importorskip("torch")
  from benchmarks import peer_torch

  predictor = make_predictor(models.create("vgg9", 6), (32, 32, 3))
  export.write(predictor, tmp_path / "target.pt")
  state = torch.load(tmp_path / "target.pt", weights_only=True)
  images = np.float32(images_of(predictor, 4) / 255)
  # In train mode, which is what the peer computes.
  actual, *_ = models.as_apply_fn(predictor.network, ())(
    predictor.params, predictor.model_state, images, train=True
  )
  expected, _ = peer_torch.vgg9(
    {f"target.{name}": tensor for name, tensor in state.items()},
    torch.from_numpy(images).permute(0, 3, 1, 2),
    None,
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  "network", [models.create("vgg_tiny", 6), networks.ViT(6)]
)
def test_stablehlo_computes_the_same(network, tmp_path):
  predictor = make_predictor(network, (16, 16, 1))
  export.write(predictor, str(tmp_path / "target.stablehlo"))
  program = jax.export.deserialize((tmp_path / "target.stablehlo").read_bytes())
  assert set(program.platforms) == {"cpu", "cuda", "tpu"}
  for count in (1, 5):
    images = images_of(predictor, count)
    np.testing.assert_allclose(
      program.call(images),
      predictor.apply(images),
      rtol=1e-4,
      atol=1e-5,
    )


class _Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x.reshape(len(x), -1, 4)
    return nn.Dense(2)(nn.MultiHeadDotProductAttention(2)(x, x).mean(axis=1))


def test_kernels_that_torch_arranges_differently(tmp_path):
  predictor = make_predictor(_Attention(), (8, 8, 1))
  with pytest.raises(errors.InputError, match="key/kernel has no name in PyT"):
    export.write(predictor, tmp_path / "a.safetensors")


def test_a_target_is_not_overwritten(finished):
  target = finished / "target.safetensors"
  for run in (finished, target):
    with pytest.raises(errors.InputError, match="is the run's own target"):
      export.main(argparse.Namespace(run=run, output=target))


def test_what_cannot_be_exported(tmp_path):
  predictor = make_predictor(networks.ViT(6), (16, 16, 1))
  (tmp_path / "a.onnx").touch()
  for name, message in (
    ("a.onnx", "must end in .pt, .pth, .safetensors or .stablehlo"),
    ("a.safetensors", "params/.* has no name in PyTorch"),
    ("a.onnx/b.stablehlo", "cannot write"),
  ):
    with pytest.raises(errors.InputError, match=message):
      export.write(predictor, tmp_path / name)


@pytest.mark.parametrize("name", ["a.onnx", "file/a.pt"])
def test_the_output_is_checked_before_the_run(tmp_path, name):
  (tmp_path / "file").touch()
  arguments = argparse.Namespace(run=tmp_path / "none", output=tmp_path / name)
  with pytest.raises(errors.InputError, match=r"must end in|cannot write"):
    export.main(arguments)


@pytest.mark.xdist_group("experiment")
def test_from_the_command_line(source, tmp_path):
  out = tmp_path / "target.safetensors"
  result = small_runs.run_python("-m", "l2t_jax.export", source.parent, out)
  assert result.returncode == 0, result.stderr
  assert "fc.weight" in safetensors.numpy.load_file(out)
  # A grey network, and back again.
  torch_weights.convert_file(out, tmp_path / "back.safetensors", "resnet_tiny")
  (before, _), (after, metadata) = map(
    weight_files.load, (source, tmp_path / "back.safetensors")
  )
  chex.assert_trees_all_equal(before, after)
  assert metadata["channels"] == "1"
