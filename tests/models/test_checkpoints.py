"""Checkpoints as people have them."""

import argparse
import collections

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from l2t_jax import errors
from l2t_jax.models import checkpoints

NAMES = ("conv1.weight", "bn1.running_mean")


def _tensors(value=1.0, prefix="", dtype=np.float32):
  shapes = ((2, 3, 1, 1), (2,))
  return {
    f"{prefix}{name}": np.full(shape, value, dtype)
    for name, shape in zip(NAMES, shapes, strict=True)
  }


def _read(tensors, tmp_path, key=""):
  path = tmp_path / "in.safetensors"
  safetensors.numpy.save_file(tensors, path)
  return checkpoints.without_prefix(checkpoints.read(path, key), NAMES)


def _check(checkpoint, value=1.0):
  for name in NAMES:
    found = checkpoint.tensors[name]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize(
  "prefix",
  [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.",
    "module.encoder_q.",
    "student.backbone.",
  ],
)
def test_what_wrappers_put_in_front(prefix, tmp_path):
  """Also where other tensors are without it."""
  others = {"queue": np.zeros((2, 2), np.float32)}
  checkpoint = _read(_tensors(prefix=prefix) | others, tmp_path)
  _check(checkpoint)
  assert "queue" in checkpoint.tensors
  assert checkpoint.notes == (f"without the prefix {prefix!r} of the names",)


@pytest.mark.parametrize("first", ["backbone.", ""])
def test_a_tensor_with_and_one_without_the_prefix(first, tmp_path):
  inside = _tensors(1, "backbone.")
  outside = {"bn1.running_mean": np.full(3, 2.0, np.float32)}
  both = inside | outside if first else outside | inside
  checkpoint = _read(both, tmp_path)
  _check(checkpoint)
  assert checkpoint.notes[-1] == (
    "left over: bn1.running_mean, since there is backbone.bn1.running_mean"
  )


def test_one_of_two_networks(tmp_path):
  both = _tensors(1, "module.encoder_q.") | _tensors(2, "module.encoder_k.")
  with pytest.raises(errors.InputError, match=r"--key=module\.encoder_k\."):
    _read(both, tmp_path)
  for key in ("module.encoder_k", "module.encoder_k."):
    _check(_read(both, tmp_path, key), 2)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_widths(dtype, tmp_path):
  _check(_read(_tensors(0.5, dtype=dtype), tmp_path), 0.5)


def test_safetensors_under_another_name(tmp_path):
  path = tmp_path / "pytorch_model.bin"
  safetensors.numpy.save_file(_tensors(), path)
  _check(checkpoints.read(path))


def _saved(content, tmp_path):
  torch = pytest.importorskip("torch")
  path = tmp_path / "in.pth"
  torch.save(content(torch), path)
  return path


def _torch(torch, value=1.0):
  tensors = {n: torch.from_numpy(x) for n, x in _tensors(value).items()}
  # Beside tensors with axes, a counter without.
  return tensors | {"bn1.num_batches_tracked": torch.tensor(3)}


@pytest.mark.parametrize(
  "key",
  [
    "state_dict", "model", "net", "network", "params", "model_state_dict",
    "model_state", "teacher", "anything",
  ],
)  # fmt: skip
def test_usual_wrappings(key, tmp_path):
  """With what training scripts keep beside the tensors."""

  def content(torch):
    return {
      key: collections.OrderedDict(_torch(torch)),
      "args": argparse.Namespace(lr=0.1, name="x"),
      "best": np.float64(3),
      "epoch": 3,
      "loss": torch.tensor(0.5),
      "optimizer": {"state": {0: {"momentum": torch.ones(2)}}},
    }

  checkpoint = checkpoints.read(_saved(content, tmp_path))
  _check(checkpoint)
  assert checkpoint.tensors["bn1.num_batches_tracked"] == 3
  assert checkpoint.notes == ()


@pytest.mark.parametrize(
  ("raw", "averaged"),
  [
    ("model", "model_ema"),
    ("state_dict", "state_dict_ema"),
    ("params", "params_ema"),
    ("state_dict", "ema.module"),
  ],
)
def test_averaged_weights_beside_raw_ones(raw, averaged, tmp_path):
  def content(torch):
    outer, _, inner = averaged.partition(".")
    ema = _torch(torch, 2)
    return {raw: _torch(torch, 1), outer: {inner: ema} if inner else ema}

  path = _saved(content, tmp_path)
  checkpoint = checkpoints.read(path)
  _check(checkpoint, 2)
  assert checkpoint.notes == (
    f"took {averaged!r}, not {raw!r} (--key chooses)",
  )
  _check(checkpoints.read(path, raw), 1)


def test_a_tensor_beside_the_state_dict(tmp_path):
  torch = pytest.importorskip("torch")
  as_torch = lambda tensors: {k: torch.tensor(x) for k, x in tensors.items()}
  content = {"state_dict": as_torch(_tensors()), "class_weights": torch.ones(9)}
  file = tmp_path / "checkpoint.pt"
  torch.save(content, file)
  for key in ("", "state_dict"):
    assert checkpoints.read(file, key).tensors.keys() == _tensors().keys()


def test_two_that_nobody_knows(tmp_path):
  content = lambda torch: {"one": _torch(torch), "two": _torch(torch, 2)}
  path = _saved(content, tmp_path)
  with pytest.raises(errors.InputError, match="'one', 'two'; choose one"):
    checkpoints.read(path)
  _check(checkpoints.read(path, "two"), 2)


@pytest.mark.parametrize("content", [{"state_dict": {"a": 3}}, [1, 2], 3])
def test_no_checkpoint(content, tmp_path):
  path = _saved(lambda torch: content, tmp_path)
  with pytest.raises(errors.InputError, match="holds no state dict"):
    checkpoints.read(path)
