"""Networks of torch become programs."""

import numpy as np
import pytest

from l2t_jax import errors, models
from l2t_jax.models import programs

torch = pytest.importorskip("torch")
pytest.importorskip("torchax")

from l2t_jax.models import convert_torch  # noqa: E402
from tests.support import torch_networks  # noqa: E402

MODULE = "tests.support.torch_networks"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def _convert(function, size, checkpoint=None):
  reading = programs.Reading(size, MEAN, STD)
  return convert_torch.from_module(
    f"{MODULE}:{function}", checkpoint, "", reading
  )


def _run(network, images):
  functions = programs.to_functions(
    programs.export(network), network.params, network.taps
  )
  logits, features, _ = functions.apply(network.params, {}, images, train=False)
  return functions, logits, features


def _images(count, size):
  return np.random.default_rng(0).random((count, size, size, 3), np.float32)


def _normalised(images):
  images = (images - np.float32(MEAN)) / np.float32(STD)
  return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))


def test_a_convolutional_network():
  network = _convert("make_convolutional", 16)
  images = _images(3, 16)
  functions, logits, features = _run(network, images)
  module = torch_networks.make_convolutional().eval()
  with torch.no_grad():
    stem = module.stem(_normalised(images))
    blocks = module.blocks(stem)
    last = module.last(blocks)
    expected = module(_normalised(images))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  close(logits, expected)
  close(features["stem"], stem.permute(0, 2, 3, 1))
  # [B, 4, 4, 4]: which axis the channels are shows in a wider image alone.
  close(features["blocks_1"], blocks.permute(0, 2, 3, 1))
  close(features["last/norm"], last.permute(0, 2, 3, 1))
  close(features["last"], last.permute(0, 2, 3, 1))
  layout = models.trace(functions, (16, 16, 3))
  assert list(models.select_taps(layout)) == ["blocks_0", "last"]


def test_a_transformer_with_prefix_tokens():
  network = _convert("make_transformer", 8)
  images = _images(3, 8)
  functions, logits, features = _run(network, images)
  module = torch_networks.make_transformer().eval()
  with torch.no_grad():
    expected = module(_normalised(images))
    x = module.patches(_normalised(images)).flatten(2).transpose(1, 2)
    x = torch.cat([module.prefix.expand(3, -1, -1), x], 1) + module.positions
    tokens = module.layers[0](x)[:, 3:].reshape(3, 2, 2, 12)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(features["layers_0"], tokens, rtol=1e-5, atol=1e-5)
  layout = models.trace(functions, (8, 8, 3))
  assert set(layout.taps.values()) == {(2, 2, 12), (2, 2, 24)}


def test_an_awkward_network(tmp_path):
  module = torch_networks.make_awkward().eval()
  tensors = module.state_dict()
  del tensors["again.weight"]  # As safetensors stores tied weights.
  torch.save(tensors, tmp_path / "mine.pth")
  network = _convert("make_awkward", 6, tmp_path / "mine.pth")
  images = _images(2, 6)
  _, logits, features = _run(network, images)
  with torch.no_grad():
    stem = module.stem((_normalised(images) - module.mean) / module.std)
    halved = module.a(stem + 1)
    expected = module(_normalised(images))
    flat = module.flat(module.again(module.a_1(halved)).flatten(2))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  close(logits, expected)
  close(features["stem"], stem.permute(0, 2, 3, 1))
  close(features["a_1"], halved.permute(0, 2, 3, 1))
  close(features["a_1#1"], module.a_1(halved).detach().permute(0, 2, 3, 1))
  close(features["flat"], flat.transpose(1, 2).reshape(2, 3, 3, 9))
  assert "attention" not in features


def test_the_number_of_classes_is_the_checkpoints(tmp_path):
  module = torch_networks.make_convolutional(7).eval()
  tensors = {**module.state_dict(), "head2.weight": torch.ones(2, 4)}
  torch.save({"state_dict": tensors}, tmp_path / "mine.pth")
  network = _convert("make_convolutional", 8, tmp_path / "mine.pth")
  assert network.notes == ("left over: head2.weight",)
  images = _images(2, 8)
  with torch.no_grad():
    expected = module(_normalised(images))
  np.testing.assert_allclose(network.reference(images), expected, rtol=1e-5)


def test_a_checkpoint_without_classifier(tmp_path):
  tensors = torch_networks.make_convolutional(0).state_dict()
  torch.save({"teacher": tensors}, tmp_path / "mine.pth")
  network = _convert("make_convolutional", 8, tmp_path / "mine.pth")
  assert network.metadata["num_classes"] == "0"
  assert network.reference(_images(2, 8)).shape == (2, 4)


def test_a_network_that_resizes_its_images():
  network = _convert("make_resizing", 8)
  assert network.taps == ("conv",)


def test_a_checkpoint_of_a_deeper_network(tmp_path):
  tensors = torch_networks.make_convolutional().state_dict()
  tensors["blocks.2.conv.weight"] = tensors["blocks.1.conv.weight"]
  torch.save(tensors, tmp_path / "mine.pth")
  with pytest.raises(
    errors.InputError, match=r"has layers that the network lacks: 1 tensors"
  ):
    _convert("make_convolutional", 8, tmp_path / "mine.pth")


def test_a_checkpoint_of_another_architecture(tmp_path):
  path = tmp_path / "mine.pth"
  torch.save(torch_networks.make_transformer().state_dict(), path)
  with pytest.raises(
    errors.InputError, match=r"does not fit the network: stem.weight is missing"
  ):
    _convert("make_convolutional", 8, path)


@pytest.mark.parametrize(
  ("name", "reading", "message"),
  [
    (
      f"{MODULE}:make_transformer",
      (),
      "give --image_size and --mean and --std",
    ),
    (f"{MODULE}:make_nothing", (8, MEAN, STD), "returned a NoneType"),
    (f"{MODULE}:TwoOutputs", (8, MEAN, STD), "returns a dict; it must return"),
    (f"{MODULE}:torch", (8, MEAN, STD), "cannot be called"),
    ("no_such_module:f", (8, MEAN, STD), "cannot import the network"),
    ("no_such_module", (8, MEAN, STD), "names no function"),
    (f"{MODULE}:make_script", (8, MEAN, STD), "returned TorchScript"),
    (
      f"{MODULE}:make_branching",
      (8, MEAN, STD),
      "nor fix the number",
    ),
  ],
)
def test_what_is_no_network(name, reading, message):
  with pytest.raises(errors.InputError, match=message):
    convert_torch.from_module(name, None, "", programs.Reading(*reading))


def test_what_wraps_a_network_is_taken_off():
  wrapped = convert_torch.from_module(
    f"{MODULE}:make_compiled", None, "", programs.Reading(8, MEAN, STD)
  )
  assert "stem" in wrapped.taps


def test_outputs_of_heads_are_no_maps():
  network = _convert("normed_queries", 16)
  assert "project" in network.taps and "q_norm" not in network.taps
