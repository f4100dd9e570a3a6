"""Conversion of PyTorch checkpoints to weight files."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from l2t_jax import errors, models
from l2t_jax.models import programs, torch_weights, weight_files
from tests.support import small_runs

SHARED = pathlib.Path(__file__).parents[3] / "shared"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_tensors(stage_sizes, num_convs, num_classes=10, seed=0):
  """Return a random state dict in torchvision's layout."""
  rng = np.random.default_rng(seed)
  tensors = {}

  def conv(name, out, fan_in, size):
    scale = (fan_in * size * size) ** -0.5
    tensors[f"{name}.weight"] = scale * rng.standard_normal(
      (out, fan_in, size, size)
    )

  def norm(name, width):
    tensors[f"{name}.weight"] = 1 + 0.1 * rng.standard_normal(width)
    tensors[f"{name}.bias"] = 0.1 * rng.standard_normal(width)
    tensors[f"{name}.running_mean"] = 0.1 * rng.standard_normal(width)
    tensors[f"{name}.running_var"] = 0.5 + rng.random(width)
    tensors[f"{name}.num_batches_tracked"] = np.array(3)

  conv("conv1", 64, 3, 7)
  norm("bn1", 64)
  width_in, expansion = 64, 1 if num_convs == 2 else 4
  for stage, size in enumerate(stage_sizes, start=1):
    width = 64 * 2 ** (stage - 1)
    for block in range(size):
      name = f"layer{stage}.{block}"
      widths = [width] * (num_convs - 1) + [width * expansion]
      kernels = (3, 3) if num_convs == 2 else (1, 3, 1)
      previous = width_in
      for i, (out, kernel) in enumerate(
        zip(widths, kernels, strict=True), start=1
      ):
        conv(f"{name}.conv{i}", out, previous, kernel)
        norm(f"{name}.bn{i}", out)
        previous = out
      if width_in != widths[-1]:
        conv(f"{name}.downsample.0", widths[-1], width_in, 1)
        norm(f"{name}.downsample.1", widths[-1])
      width_in = widths[-1]
  tensors["fc.weight"] = rng.standard_normal((num_classes, width_in)) * 0.1
  tensors["fc.bias"] = rng.standard_normal(num_classes)
  return tensors


@pytest.mark.parametrize(
  ("name", "stage_sizes", "num_convs"),
  [("resnet18", (2, 2, 2, 2), 2), ("resnet50", (3, 4, 6, 3), 3)],
)
def test_torchvision_layout_computes_the_same(
  name, stage_sizes, num_convs, x64
):
  torch = pytest.importorskip("torch")
  from tests.support import torch_resnet

  tensors = torchvision_tensors(stage_sizes, num_convs)
  module = models.create(name, 10)
  shapes = models.trace(module, (64, 64, 3)).variables
  variables, report = torch_weights.convert(tensors, shapes)
  assert report.left_over == ()
  images = np.random.default_rng(1).standard_normal((2, 64, 64, 3))
  params = variables.pop("params")
  logits, features, _ = jax.jit(
    models.as_apply_fn(module), static_argnames="train"
  )(params, variables, images, train=False)
  expected, stages = torch_resnet.resnet(
    {k: torch.from_numpy(v) for k, v in tensors.items()},
    torch.from_numpy(images.transpose(0, 3, 1, 2)),
    stage_sizes,
    num_convs,
  )
  np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-9)
  for tap, stage in zip(module.default_taps, stages, strict=True):
    stage = stage.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(features[tap], stage, rtol=1e-9, atol=1e-9)


def test_the_authors_source_on_real_images(tmp_path):
  pytest.importorskip("torch")
  checkpoint = SHARED / "data" / "tinyimagenet_resnet32.pth.tar"
  if not checkpoint.exists():
    pytest.skip(f"needs the authors' weights and STL-10 in {SHARED}")
  output = tmp_path / "source.safetensors"
  report = torch_weights.convert_file(checkpoint, output, "resnet32")
  assert report.left_over == ()
  variables, metadata = weight_files.load(output)
  assert metadata["model"] == "resnet32"
  assert metadata["num_classes"] == "200"
  images = np.load(SHARED / "data" / "stl10_32.npz")["x_test"][:64]
  images = (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
  params = variables.pop("params")
  apply_fn = models.as_apply_fn(models.create("resnet32", 200))
  logits, features, _ = jax.jit(apply_fn, static_argnames="train")(
    params, variables, images, train=False
  )
  golden = np.load(SHARED / "golden" / "source_resnet32_stl10.npz")
  np.testing.assert_allclose(logits, golden["logits"], atol=1e-3)
  for block, stage in ((4, 1), (9, 2), (14, 3)):
    np.testing.assert_allclose(
      features[f"stage{stage}_block5"].mean(axis=(1, 2)),
      golden[f"pooled_block_{block}"],
      atol=1e-4,
    )


def write_tensors(path, **changes):
  """Write a ResNet-18 checkpoint; None removes a tensor."""
  tensors = torchvision_tensors((2, 2, 2, 2), 2) | changes
  tensors = {k: v for k, v in tensors.items() if v is not None}
  safetensors.numpy.save_file(tensors, path)
  return path


def test_safetensors_round_trip_needs_no_torch(tmp_path):
  checkpoint = write_tensors(
    tmp_path / "in.safetensors",
    **{"module.extra.weight": np.zeros(3), "fc2.weight": np.zeros((2, 4))},
  )
  command = [sys.executable, "-m", "l2t_jax.pretrained", str(checkpoint)]
  command += [str(tmp_path / "out.safetensors"), "--model=resnet18"]
  # A torch that cannot be imported, as on a machine without it.
  (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
  output = subprocess.run(
    command,
    capture_output=True,
    text=True,
    timeout=small_runs.PATIENCE,
    check=True,
    env={"PYTHONPATH": f"{tmp_path}:{small_runs.ROOT}"},
  )
  assert "102 tensors mapped, 2 left over" in output.stdout
  assert "left over: module.extra.weight" in output.stdout
  variables, metadata = weight_files.load(tmp_path / "out.safetensors")
  assert metadata["converted_from"] == "in.safetensors"
  assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
  expected = {
    name: x.astype(np.float32)
    for name, x in torchvision_tensors((2, 2, 2, 2), 2).items()
  }
  np.testing.assert_array_equal(
    variables["params"]["layer2_0"]["conv1"]["kernel"],
    expected["layer2.0.conv1.weight"].transpose(2, 3, 1, 0),
  )
  found = variables["params"]["layer2_0"]["bn1"]
  found = found | variables["batch_stats"]["layer2_0"]["bn1"]
  theirs = {
    "scale": "weight", "bias": "bias", "mean": "running_mean",
    "var": "running_var",
  }  # fmt: skip
  for ours, name in theirs.items():
    np.testing.assert_array_equal(found[ours], expected[f"layer2.0.bn1.{name}"])


def test_a_deeper_network_is_not_cut_short():
  tensors = torchvision_tensors((3, 4, 6, 3), 2)
  shapes = models.trace(models.create("resnet18", 10), (64, 64, 3)).variables
  with pytest.raises(
    errors.InputError, match=r"network lacks: 80 tensors, such as layer1\.2\."
  ):
    torch_weights.convert(tensors, shapes)


def test_a_fifth_stage_is_not_cut_off():
  tensors = torchvision_tensors((2, 2, 2, 2), 2)
  tensors["layer5.0.conv1.weight"] = tensors["layer4.0.conv1.weight"]
  shapes = models.trace(models.create("resnet18", 10), (64, 64, 3)).variables
  with pytest.raises(errors.InputError, match=r"1 tensors, such as layer5\.0"):
    torch_weights.convert(tensors, shapes)


def test_grey_images_are_not_normalised_as_imagenets(tmp_path):
  weight = np.ones((64, 1, 7, 7))
  checkpoint = write_tensors(
    tmp_path / "in.safetensors", **{"conv1.weight": weight}
  )
  output = tmp_path / "out.safetensors"
  torch_weights.convert_file(checkpoint, output, "resnet18")
  metadata = weight_files.read_metadata(output)
  assert metadata["channels"] == "1"
  assert "mean" not in metadata


def test_a_backbone_without_classifier(tmp_path):
  checkpoint = write_tensors(
    tmp_path / "in.safetensors", **{"fc.weight": None, "fc.bias": None}
  )
  output = tmp_path / "out.safetensors"
  reading = programs.Reading(64, (0.1, 0.2, 0.3), (0.4,))
  torch_weights.convert_file(checkpoint, output, "resnet18", reading=reading)
  loaded = weight_files.load_network(output)
  assert loaded.metadata["num_classes"] == "0"
  assert loaded.metadata["image_size"] == "64"
  assert json.loads(loaded.metadata["std"]) == [0.4]
  layout = models.trace(loaded.network, (64, 64, 3))
  weight_files.check_shapes(
    layout, {"params": loaded.params, **loaded.model_state}, "it"
  )
  assert layout.output_shape == (512,)  # The mean over positions.


@pytest.mark.parametrize("model", ["convnext_atto", "vit_tiny"])
def test_networks_that_torch_does_not_have(model, tmp_path):
  file = tmp_path / "checkpoint.safetensors"
  safetensors.numpy.save_file({"weight": np.ones((2, 2), np.float32)}, file)
  with pytest.raises(errors.InputError, match="convert a network of timm"):
    torch_weights.convert_file(file, tmp_path / "out.safetensors", model)
