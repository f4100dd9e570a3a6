"""Convert PyTorch weights of bundled networks: names and layouts."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
import pathlib
import re
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import numpy as np

from l2t_jax import errors, files, models, types
from l2t_jax.models import (
  bundled,
  checkpoints,
  programs,
  resnet,
  vgg,
  weight_files,
)

# Name of a leaf in Flax -> its name in PyTorch.
_TORCH_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


class Conversion(NamedTuple):
  """The result of a conversion."""

  mapped: dict[str, str]  # PyTorch name -> name in the weight file.
  left_over: tuple[str, ...]  # PyTorch tensors that the network does not have.
  notes: tuple[str, ...] = ()  # Choices that were made, one line each.


def torch_name(path: tuple[str, ...]) -> str:
  """Return the PyTorch name of a leaf of the variables.

  Args:
    path: path of the leaf, such as ("params", "blocks2_0", "conv1", "kernel").

  Returns:
    The name, such as "blocks2.0.conv1.weight".
  """
  _, *modules, leaf = path
  modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
  return ".".join([*modules, _TORCH_LEAVES[leaf]])


def has_torch_name(path: tuple[str, ...]) -> bool:
  """Return whether PyTorch has a name for a leaf; see `torch_name`."""
  return path[0] in ("params", "batch_stats") and path[-1] in _TORCH_LEAVES


def to_torch_layout(kernel: Any) -> Any:
  """Transpose [H, W, I, O] to [O, I, H, W], and [I, O] to [O, I].

  Arrays of other ranks are returned unchanged.
  """
  if kernel.ndim == 4:
    return kernel.transpose(3, 2, 0, 1)
  return kernel.T if kernel.ndim == 2 else kernel


def from_torch_layout(weight: Any) -> Any:
  """Undo `to_torch_layout`."""
  if weight.ndim == 4:
    return weight.transpose(2, 3, 1, 0)
  return weight.T if weight.ndim == 2 else weight


def convert(
  tensors: Mapping[str, np.ndarray], variables: types.PyTree
) -> tuple[types.PyTree, Conversion]:
  """Map PyTorch tensors to a network's variables by name.

  Args:
    tensors: a state dict of NumPy arrays.
    variables: {"params": ..., "batch_stats": ...} of the network, arrays or
      shapes.

  Returns:
    (variables as NumPy arrays, how tensors were mapped).

  Raises:
    errors.InputError: a tensor is missing or has another shape, or the tensors
      are those of a deeper network.
  """
  converted, mapped, linear = {}, {}, set()
  for path, leaf in traverse_util.flatten_dict(variables).items():
    name = torch_name(path)
    if leaf.ndim == 2:
      linear.add(name.rpartition(".")[0])
    expected = list(jax.eval_shape(to_torch_layout, leaf).shape)
    found = list(tensors[name].shape) if name in tensors else "missing"
    if found != expected:
      raise errors.InputError(
        f"the checkpoint does not fit the network: {name} is {found}, expected"
        f" {expected}; choose the network that it was trained with"
      )
    converted[path] = from_torch_layout(np.asarray(tensors[name]))
    mapped[name] = "/".join(path)
  left_over = checkpoints.left_over(tensors, mapped, linear)
  return traverse_util.unflatten_dict(converted), Conversion(mapped, left_over)


def convert_file(
  path: pathlib.Path,
  output: pathlib.Path,
  model: str,
  *,
  key: str = "",
  reading: programs.Reading = programs.Reading(),  # noqa: B008
) -> Conversion:
  """Convert a checkpoint of a bundled network to a weight file.

  The number of classes is that of the checkpoint's classifier, or 0 without it.

  Args:
    path: the checkpoint.
    output: the weight file to write.
    model: a key of `models.MODELS`.
    key: see `checkpoints.read`.
    reading: size and normalisation of the images that the network was trained
      on; for torchvision's networks, ImageNet's normalisation by default.

  Raises:
    errors.InputError: the checkpoint cannot be read or does not fit the
      network, or the output cannot be written.
  """
  checkpoint = checkpoints.read(path, key)
  # Created to learn the names of the tensors; the checkpoint then tells the
  # numbers of classes and channels.
  module = bundled.create(model, num_classes=1)
  if not isinstance(module, resnet.ResNet | resnet.CifarResNet | vgg.VGG):
    raise errors.InputError(
      f"{model} has no names in PyTorch; convert a network of timm, as with"
      " timm:convnext_atto or timm:vit_tiny_patch16_224"
    )
  size = bundled.image_size(module)
  variables_of = lambda module, channels: (
    models.trace(module, (size, size, channels)).variables
  )
  names = {
    torch_name(leaf_path): leaf
    for leaf_path, leaf in traverse_util.flatten_dict(
      variables_of(module, 3)
    ).items()
  }
  checkpoint = checkpoints.without_prefix(checkpoint, names)
  tensors = checkpoint.tensors
  # All bundled networks have a single linear layer, the classifier.
  (classifier,) = (name for name, leaf in names.items() if leaf.ndim == 2)
  num_classes = len(tensors.get(classifier, ()))
  # The first convolution has the fewest input channels.
  inputs = [x.shape[1] for x in tensors.values() if x.ndim == 4]
  channels = min(inputs, default=3)
  module = bundled.create(model, num_classes=num_classes)
  converted, report = convert(tensors, variables_of(module, channels))
  weight_files.check_finite(
    path, traverse_util.flatten_dict(converted, sep="/")
  )
  if size == 224 and channels == 3:  # One of torchvision's networks.
    reading = reading.or_else(0, *programs.IMAGENET)
  metadata = {
    "model": model,
    "num_classes": str(num_classes),
    "channels": str(channels),
    "converted_from": path.name,
    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    **{name: json.dumps(x) for name, x in reading._asdict().items() if x},
  }
  with files.output_errors(output):
    weight_files.save(output, converted, metadata)
  return report._replace(notes=checkpoint.notes)
