"""Files of weights that name their network, in safetensors format."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import json
import pathlib
from types import NoneType
from typing import Any, NamedTuple

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from l2t_jax import errors, files, models, types
from l2t_jax.models import bundled

# What a file says of itself in JSON; all but the classes may be absent.
_RECORDED: Mapping[str, tuple[type, ...]] = {
  "num_classes": (int,),
  "channels": (int, NoneType),
  "mean": (list, NoneType),
  "std": (list, NoneType),
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
  """Raise `errors.InputError` where there is no such file of weights."""
  if not path.is_file():
    raise errors.InputError(
      f"no source weights at {path}; convert a checkpoint (python -m"
      " l2t_jax.pretrained) or take target.safetensors of another run"
    )


def load(path: pathlib.Path) -> tuple[types.PyTree, dict[str, str]]:
  """Read what `save` wrote; return (variables, metadata).

  Raises:
    errors.InputError: for a file that is missing, damaged, or not converted.
  """
  metadata = read_metadata(path)
  arrays = read_safetensors(path)
  check_finite(path, arrays)
  return traverse_util.unflatten_dict(arrays, sep="/"), metadata


class Loaded(NamedTuple):
  """A network with its weights."""

  network: models.Network
  params: types.PyTree
  model_state: types.PyTree
  metadata: dict[str, str]


def load_network(path: pathlib.Path, dtype: Any = None) -> Loaded:
  """Read a file that `save` wrote and make the network that it names.

  Whether the weights fit the network is for `check_shapes` to say, which needs
  the size of the images.

  Args:
    path: of the weights.
    dtype: of the activations; None for that of the parameters.

  Raises:
    errors.InputError: as `load` does, and where there is no such network.
  """
  variables, metadata = load(path)
  name, num_classes = metadata["model"], int(metadata["num_classes"])
  try:
    network = bundled.create(name, num_classes, dtype)
  except errors.InputError as error:
    raise errors.InputError(f"{path}: {error}") from error
  return Loaded(network, variables.pop("params"), variables, metadata)


def check_shapes(
  layout: models.Layout, variables: types.PyTree, name: str
) -> None:
  """Make sure that variables are those of a network.

  Args:
    layout: of the network, from `models.trace`.
    variables: {"params": ..., and the collections of its model state}.
    name: of the network, for messages.

  Raises:
    errors.InputError: naming the first variable that does not fit.
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
      raise errors.InputError(
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
    raise errors.InputError(
      f"{path} was not written by l2t_jax; convert it first:"
      f" python -m l2t_jax.pretrained {path} OUT.safetensors --model=..."
    )
  for name, kind in _RECORDED.items():
    if not isinstance(_from_json(metadata.get(name, "null")), kind):
      raise errors.InputError(
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


def check_finite(path, arrays):
  for name, values in arrays.items():
    if not np.isfinite(values).all():
      raise errors.InputError(
        f"{path}: {np.sum(~np.isfinite(values))} of {values.size} values of"
        f" {name} are NaN or infinite; take weights of a run that did not"
        " diverge"
      )


def _from_json(text):
  try:
    return json.loads(text)
  except ValueError:
    return text


def read_safetensors(path):
  with _naming_damage(path):
    return safetensors.numpy.load_file(path)


@contextlib.contextmanager
def _naming_damage(path):
  """Turn what the library raises on broken files into an InputError."""
  try:
    yield
  except safetensors.SafetensorError as error:
    raise errors.InputError(
      f"{path} is not a whole safetensors file: {error}"
    ) from error
