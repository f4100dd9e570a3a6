"""Source weights: from PyTorch checkpoints to a file that training reads.

    python -m l2t_jax.pretrained IN.pth OUT.safetensors --model=resnet32

The result is a safetensors file: plain arrays, no code, no torch. A tensor
"params/block1/conv1/kernel" of it is that leaf of the Flax variables; its
metadata hold the model's name, the number of classes and where it came from.

Submodules are named as in PyTorch, but for the dot before a number:
"blocks2.0.bn1.running_mean" is "batch_stats/blocks2_0/bn1/mean".
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import hashlib
import json
import pathlib
import re
from types import NoneType
from typing import Any, NamedTuple
import warnings

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from l2t_jax import arguments, files, imports, models, types

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
# What a file says of itself in JSON; all but the classes may be absent.
_RECORDED: Mapping[str, tuple[type, ...]] = {
  "num_classes": (int,),
  "channels": (int, NoneType),
  "mean": (list, NoneType),
  "std": (list, NoneType),
}


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
    types.InputError: where a tensor is missing or has another shape, or where
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
    raise types.InputError(
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
    raise types.InputError(
      f"the checkpoint has layers that the network lacks: {len(deeper)}"
      f" tensors, such as {deeper[0]}; choose the network that it was trained"
      " with"
    )
  return traverse_util.unflatten_dict(converted), Report(mapped, left_over)


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Read a state dict from `.safetensors` or, with torch installed, `.pth`.

  A pickle is only ever read with `weights_only=True`, which runs no code.

  Raises:
    types.InputError: for a file that is missing, damaged, or not a checkpoint.
  """
  if not path.is_file():
    raise types.InputError(f"no checkpoint at {path}")
  if path.suffix == ".safetensors":
    return _read_safetensors(path)
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
    raise types.InputError(
      f"{path} cannot be read safely (weights_only): {reason}; save a"
      " state_dict() of tensors alone"
    ) from error
  for key in ("state_dict", "model"):
    if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
      content = content[key]
  if not isinstance(content, Mapping) or not all(
    isinstance(value, torch.Tensor) for value in content.values()
  ):
    raise types.InputError(
      f"{path} holds no state dict: expected tensors by name, alone or under"
      " 'state_dict'"
    )
  return {
    name: value.detach().float().numpy() for name, value in content.items()
  }


def save(
  path: pathlib.Path, variables: types.PyTree, metadata: Mapping[str, str]
) -> None:
  """Write variables and metadata to a safetensors file, all or nothing.

  Raises:
    OSError: what the operating system says.
  """
  flat = traverse_util.flatten_dict(variables, sep="/")
  arrays = {name: np.asarray(leaf, order="C") for name, leaf in flat.items()}
  # Its `save_file` does not tell a full disk from anything else.
  files.write(path, safetensors.numpy.save(arrays, dict(metadata)))


def check_exists(path: pathlib.Path) -> None:
  """Raise `types.InputError` where there is no such file of weights."""
  if not path.is_file():
    raise types.InputError(
      f"no source weights at {path}; convert a checkpoint (python -m"
      " l2t_jax.pretrained) or take target.safetensors of another run"
    )


def load(path: pathlib.Path) -> tuple[types.PyTree, dict[str, str]]:
  """Read what `save` wrote; return (variables, metadata).

  Raises:
    types.InputError: for a file that is missing, damaged, or not converted.
  """
  metadata = read_metadata(path)
  arrays = _read_safetensors(path)
  _check_finite(path, arrays)
  return traverse_util.unflatten_dict(arrays, sep="/"), metadata


class Loaded(NamedTuple):
  """A network with its weights."""

  network: models.Network
  layout: models.Layout
  params: types.PyTree
  model_state: types.PyTree


def load_network(
  path: pathlib.Path, image_shape: tuple[int, int, int], dtype: Any = None
) -> Loaded:
  """Read a file that `save` wrote and make the network that it names.

  Args:
    path: of the weights.
    image_shape: (H, W, C) of the images that the network will see.
    dtype: of its activations; None for that of the parameters.

  Raises:
    types.InputError: as `load` does, and where the weights do not fit the
      network or the images.
  """
  variables, metadata = load(path)
  name, num_classes = metadata["model"], int(metadata["num_classes"])
  try:
    network = models.create(name, num_classes, dtype)
  except types.InputError as error:
    raise types.InputError(f"{path}: {error}") from error
  layout = models.trace(network, image_shape)
  check_shapes(layout, variables, f"{path}: {name}")
  return Loaded(network, layout, variables.pop("params"), variables)


def check_shapes(
  layout: models.Layout, variables: types.PyTree, name: str
) -> None:
  """Make sure that variables are those of a network.

  Args:
    layout: of the network, from `models.trace`.
    variables: {"params": ..., and the collections of its model state}.
    name: of the network, for messages.

  Raises:
    types.InputError: naming the first variable that does not fit.
  """
  expected = traverse_util.flatten_dict(layout.variables)
  given = traverse_util.flatten_dict(variables)
  for leaf in sorted(expected.keys() | given.keys()):
    shapes = [
      list(np.shape(side[leaf])) if leaf in side else "missing"
      for side in (given, expected)
    ]
    if shapes[0] != shapes[1]:
      size = "x".join(map(str, layout.image_shape))
      raise types.InputError(
        f"{name} on images of {size} does not fit its weights:"
        f" {'/'.join(leaf)} is {shapes[0]}, expected {shapes[1]}"
      )


def read_metadata(path: pathlib.Path) -> dict[str, str]:
  """Read what a file that `save` wrote says of itself; errors as in `load`."""
  check_exists(path)
  with (
    _naming_damage(path),
    safetensors.safe_open(path, framework="numpy") as file,
  ):
    metadata = file.metadata() or {}
  if "model" not in metadata or "num_classes" not in metadata:
    raise types.InputError(
      f"{path} was not written by l2t_jax; convert it first:"
      f" python -m l2t_jax.pretrained {path} OUT.safetensors --model=..."
    )
  for name, kind in _RECORDED.items():
    if not isinstance(_from_json(metadata.get(name, "null")), kind):
      raise types.InputError(
        f"{path} says that its {name} is {metadata[name]!r}, which no run"
        " writes; convert or train it again"
      )
  return metadata


class Adopted(NamedTuple):
  """Variables that start from those of another network."""

  variables: types.PyTree
  copied: tuple[str, ...]  # Names of the arrays that were taken over.
  kept: tuple[str, ...]  # Of those without a namesake of the same shape.


def adopt(variables: types.PyTree, others: types.PyTree) -> Adopted:
  """Take over every array that has a namesake of the same shape.

  Args:
    variables: of the network that is to be trained, params and batch_stats.
    others: of the network that it starts from.
  """
  flat = {}
  copied: list[str] = []
  kept: list[str] = []
  flat_others = traverse_util.flatten_dict(others)
  for path, leaf in traverse_util.flatten_dict(variables).items():
    other = flat_others.get(path)
    agrees = other is not None and other.shape == leaf.shape
    flat[path] = jnp.asarray(other, leaf.dtype) if agrees else leaf
    (copied if agrees else kept).append("/".join(path))
  return Adopted(traverse_util.unflatten_dict(flat), tuple(copied), tuple(kept))


def _check_finite(path, arrays):
  for name, values in arrays.items():
    if not np.isfinite(values).all():
      raise types.InputError(
        f"{path}: {np.sum(~np.isfinite(values))} of {values.size} values of"
        f" {name} are NaN or infinite; take weights of a run that did not"
        " diverge"
      )


def _from_json(text):
  try:
    return json.loads(text)
  except ValueError:
    return text


def _read_safetensors(path):
  with _naming_damage(path):
    return safetensors.numpy.load_file(path)


@contextlib.contextmanager
def _naming_damage(path):
  """Turn what the library raises on broken files into an InputError."""
  try:
    yield
  except safetensors.SafetensorError as error:
    raise types.InputError(
      f"{path} is not a whole safetensors file: {error}"
    ) from error


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
    raise types.InputError(
      f"{checkpoint} has {len(classes)} linear layers, expected 1: the"
      " classifier"
    )
  module = models.create(model, num_classes=classes[0])
  size = models.image_size(module)
  # The first convolution is the one with the fewest inputs.
  inputs = [v.shape[1] for v in tensors.values() if v.ndim == 4]
  image_shape = (size, size, min(inputs, default=3))
  variables = models.trace(module, image_shape).variables
  converted, report = convert(tensors, variables)
  _check_finite(checkpoint, traverse_util.flatten_dict(converted, sep="/"))
  metadata = {
    "model": model,
    "num_classes": str(classes[0]),
    "channels": str(image_shape[-1]),
    "converted_from": checkpoint.name,
    "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
  }
  with files.output_errors(output):
    save(output, converted, metadata)
  return report


def main() -> None:
  parser = arguments.Parser(
    description="Convert a PyTorch checkpoint to source weights."
  )
  parser.add_argument(
    "checkpoint", type=pathlib.Path, help=".pth, .pt, .tar or .safetensors"
  )
  parser.add_argument("output", type=pathlib.Path, help="OUT.safetensors")
  parser.add_argument("--model", required=True, choices=list(models.MODELS))
  args = parser.parse_args()
  with types.errors_in_one_line():
    report = convert_file(args.checkpoint, args.output, args.model)
  for name, new_name in report.mapped.items():
    print(f"{name:40} -> {new_name}")
  print(
    f"{len(report.mapped)} tensors mapped, {len(report.left_over)} left over"
  )
  for name in report.left_over:
    print(f"left over: {name}")
  print(f"wrote {args.output}")


if __name__ == "__main__":
  main()
