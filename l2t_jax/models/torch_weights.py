"""Weights of PyTorch: names, layouts and checkpoints."""

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

# Leaves of Flax variables and what PyTorch calls them.
_TORCH_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
# Tensors that carry no weight of the network.
_BOOKKEEPING = re.compile(r"num_batches_tracked$")


class Report(NamedTuple):
  """What a conversion did."""

  mapped: dict[str, str]  # Torch name -> name in the file.
  left_over: tuple[str, ...]  # Torch tensors that the network has no place for.


def torch_name(path: tuple[str, ...]) -> str:
  """Name a leaf of the variables as PyTorch does.

  Args:
    path: such as ("params", "blocks2_0", "conv1", "kernel").

  Returns:
    Such as "blocks2.0.conv1.weight".
  """
  _, *modules, leaf = path
  modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
  return ".".join([*modules, _TORCH_LEAVES[leaf]])


def has_torch_name(path: tuple[str, ...]) -> bool:
  """Return whether `torch_name` knows such a leaf."""
  return path[0] in ("params", "batch_stats") and path[-1] in _TORCH_LEAVES


def to_torch_layout(kernel: Any) -> Any:
  """[H, W, I, O] -> [O, I, H, W] and [I, O] -> [O, I]; others as they are."""
  if kernel.ndim == 4:
    return kernel.transpose(3, 2, 0, 1)
  return kernel.T if kernel.ndim == 2 else kernel


def from_torch_layout(weight: Any) -> Any:
  """[O, I, H, W] -> [H, W, I, O] and [O, I] -> [I, O]; others as they are."""
  if weight.ndim == 4:
    return weight.transpose(2, 3, 1, 0)
  return weight.T if weight.ndim == 2 else weight


def convert(
  tensors: Mapping[str, np.ndarray], variables: types.PyTree
) -> tuple[types.PyTree, Report]:
  """Map PyTorch tensors to a network's variables by name.

  Args:
    tensors: a state dict as numpy arrays; a leading "module." (from
      DataParallel) is ignored.
    variables: {"params": ..., "batch_stats": ...} of the network; shapes
      suffice.

  Returns:
    The variables as numpy arrays, and what was mapped and left over.

  Raises:
    errors.InputError: where a tensor is missing or has another shape, or where
      the tensors are those of a deeper network.
  """
  tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
  converted, mapped, problems = {}, {}, []
  for path, leaf in traverse_util.flatten_dict(variables).items():
    name = torch_name(path)
    wanted = jax.eval_shape(to_torch_layout, leaf).shape
    if name not in tensors:
      problems.append(f"{name} {list(wanted)} is missing")
    elif tensors[name].shape != wanted:
      problems.append(
        f"{name} has shape {list(tensors[name].shape)}, not {list(wanted)}"
      )
    else:
      converted[path] = from_torch_layout(np.asarray(tensors[name]))
      mapped[name] = "/".join(path)
  if problems:
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    raise errors.InputError(
      f"the checkpoint does not fit the network: {'; '.join(problems[:3])}"
      f"{more}; choose the network that it was trained with"
    )
  left_over = tuple(
    name
    for name in tensors
    if name not in mapped and not _BOOKKEEPING.search(name)
  )
  unnumbered = lambda name: re.sub(r"\d+", "", name)
  kinds = set(map(unnumbered, mapped))
  if deeper := [name for name in left_over if unnumbered(name) in kinds]:
    raise errors.InputError(
      f"the checkpoint has layers that the network lacks: {len(deeper)}"
      f" tensors, such as {deeper[0]}; choose the network that it was trained"
      " with"
    )
  return traverse_util.unflatten_dict(converted), Report(mapped, left_over)


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Read a state dict from `.safetensors` or, with torch installed, `.pth`.

  A pickle is only ever read with `weights_only=True`, which runs no code.

  Raises:
    errors.InputError: for a file that is missing, damaged, or not a checkpoint.
  """
  if not path.is_file():
    raise errors.InputError(f"no checkpoint at {path}")
  if path.suffix == ".safetensors":
    return weight_files.read_safetensors(path)
  torch = imports.require("torch", needed_for=f"reading {path.name}")
  try:
    with warnings.catch_warnings(action="ignore"):  # Of old formats.
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
) -> Report:
  """Convert a checkpoint of a known network; see the module's docstring.

  The number of classes is that of the checkpoint's classifier.
  """
  tensors = read_torch(checkpoint)
  # The classifier is the one linear layer of all networks here.
  classes = [v.shape[0] for k, v in tensors.items() if v.ndim == 2]
  if len(classes) != 1:
    raise errors.InputError(
      f"{checkpoint} has {len(classes)} linear layers, expected 1: the"
      " classifier"
    )
  module = bundled.create(model, num_classes=classes[0])
  size = bundled.image_size(module)
  # The first convolution is the one with the fewest inputs.
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
