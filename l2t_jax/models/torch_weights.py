"""PyTorch weights: names, layouts and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import pathlib
import re
from typing import Any, NamedTuple
import warnings

from flax import traverse_util
import jax
import numpy as np

from l2t_jax import errors, files, imports, models, types
from l2t_jax.models import bundled, weight_files

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
    tensors: a state dict of NumPy arrays; the prefix "module." of names, from
      DataParallel, is ignored.
    variables: {"params": ..., "batch_stats": ...} of the network, arrays or
      shapes.

  Returns:
    (variables as NumPy arrays, how tensors were mapped).

  Raises:
    errors.InputError: a tensor is missing or has another shape, or the tensors
      are those of a deeper network.
  """
  tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
  converted, mapped = {}, {}
  for path, leaf in traverse_util.flatten_dict(variables).items():
    name = torch_name(path)
    expected = list(jax.eval_shape(to_torch_layout, leaf).shape)
    found = list(tensors[name].shape) if name in tensors else "missing"
    if found != expected:
      raise errors.InputError(
        f"the checkpoint does not fit the network: {name} is {found}, expected"
        f" {expected}; choose the network that it was trained with"
      )
    converted[path] = from_torch_layout(np.asarray(tensors[name]))
    mapped[name] = "/".join(path)
  left_over = tuple(
    name
    for name in tensors
    if name not in mapped and not name.endswith("num_batches_tracked")
  )
  # A tensor of a missing layer differs from a mapped one only in its numbers.
  without_numbers = lambda name: re.sub(r"\d+", "", name)
  kinds = set(map(without_numbers, mapped))
  if deeper := [name for name in left_over if without_numbers(name) in kinds]:
    raise errors.InputError(
      f"the checkpoint has layers that the network lacks: {len(deeper)}"
      f" tensors, such as {deeper[0]}; choose the network that it was trained"
      " with"
    )
  return traverse_util.unflatten_dict(converted), Conversion(mapped, left_over)


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Read a state dict from `.safetensors` or, with torch installed, `.pth`.

  Pickles are read with `weights_only=True`, which runs none of their code.

  Returns:
    Name -> array, in PyTorch's layout.

  Raises:
    errors.InputError: the file is missing, damaged, or not a checkpoint.
  """
  if not path.is_file():
    raise errors.InputError(f"no checkpoint at {path}")
  if path.suffix == ".safetensors":
    return weight_files.read_safetensors(path)
  torch = imports.require("torch", needed_for=f"reading {path.name}")
  try:
    with warnings.catch_warnings(action="ignore"):  # About old formats.
      content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    code = re.search(r"GLOBAL (\S+)", str(error))
    reason = (
      f"it asks to run {code[1]}, and its code is never run"
      if code
      else "it is no checkpoint of PyTorch, or not a whole one"
    )
    raise errors.InputError(
      f"{path} cannot be read safely (weights_only): {reason}; save a"
      " state_dict() of tensors alone"
    ) from error
  for key in ("state_dict", "model"):
    if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
      content = content[key]
  if not isinstance(content, Mapping) or not all(
    isinstance(value, torch.Tensor) for value in content.values()
  ):
    raise errors.InputError(
      f"{path} holds no state dict: expected tensors by name, alone or under"
      " 'state_dict'"
    )
  return {
    name: value.detach().float().numpy() for name, value in content.items()
  }


def convert_file(
  checkpoint: pathlib.Path, output: pathlib.Path, model: str
) -> Conversion:
  """Convert a checkpoint of a bundled network to a weight file.

  The number of classes is that of the checkpoint's classifier.

  Args:
    checkpoint: see `read_torch`.
    output: the weight file to write.
    model: a key of `models.MODELS`.

  Raises:
    errors.InputError: the checkpoint cannot be read or does not fit the
      network, or the output cannot be written.
  """
  tensors = read_torch(checkpoint)
  # All bundled networks have a single linear layer, the classifier.
  classes = [v.shape[0] for k, v in tensors.items() if v.ndim == 2]
  if len(classes) != 1:
    raise errors.InputError(
      f"{checkpoint} has {len(classes)} linear layers, expected 1: the"
      " classifier"
    )
  module = bundled.create(model, num_classes=classes[0])
  size = bundled.image_size(module)
  # The first convolution has the fewest input channels.
  inputs = [v.shape[1] for v in tensors.values() if v.ndim == 4]
  image_shape = (size, size, min(inputs, default=3))
  variables = models.trace(module, image_shape).variables
  converted, report = convert(tensors, variables)
  weight_files.check_finite(
    checkpoint, traverse_util.flatten_dict(converted, sep="/")
  )
  metadata = {
    "model": model,
    "num_classes": str(classes[0]),
    "channels": str(image_shape[-1]),
    "converted_from": checkpoint.name,
    "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
  }
  with files.output_errors(output):
    weight_files.save(output, converted, metadata)
  return report
