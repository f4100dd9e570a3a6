"""Weight files: safetensors with the name of their network as metadata."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import json
import pathlib
from typing import Any, NamedTuple

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from l2t_jax import errors, files, models, types
from l2t_jax.models import bundled, programs

# Takes the place of the model's name for the networks that linear_probe and
# finetune_source train.
SOURCE_AND_CLASSIFIER = "source with a new linear classifier"


def save(
  path: pathlib.Path, variables: types.PyTree, metadata: Mapping[str, str]
) -> None:
  """Write variables and metadata to a safetensors file, atomically.

  Args:
    path: the file.
    variables: nested dicts of arrays; "a/b" names the array at ["a"]["b"].
    metadata: see `read_metadata`.

  Raises:
    OSError: the file cannot be written.
  """
  flat = traverse_util.flatten_dict(variables, sep="/")
  arrays = {name: np.asarray(leaf, order="C") for name, leaf in flat.items()}
  # safetensors' own `save_file` does not report a full disk as an OSError.
  files.write(path, safetensors.numpy.save(arrays, dict(metadata)))


def check_exists(path: pathlib.Path) -> None:
  """Raise `errors.InputError` if there is no such weight file."""
  # LIBRARY:NAME is what `l2t_jax.pretrained` takes, not a file.
  library, _, name = str(path).partition(":")
  if library in programs.LIBRARIES and name:
    raise errors.InputError(
      f"'{path}' is a network of a library, not a weight file; convert it once:"
      f" python -m l2t_jax.pretrained {path} OUT.safetensors"
    )
  if not path.is_file():
    raise errors.InputError(
      f"no source weights at {path}; convert a checkpoint (python -m"
      " l2t_jax.pretrained) or take target.safetensors of another run"
    )


def load(path: pathlib.Path) -> tuple[types.PyTree, dict[str, str]]:
  """Read a weight file; return (variables, metadata).

  Raises:
    errors.InputError: the file is missing or damaged, was not written by
      `save`, or holds NaN or infinite values.
  """
  metadata = read_metadata(path)
  arrays = read_safetensors(path)
  # Constants of the model state may be -inf, as those of attention masks are.
  check_finite(
    path,
    {
      name: array if name.startswith("params/") else array[array != -np.inf]
      for name, array in arrays.items()
    },
  )
  return traverse_util.unflatten_dict(arrays, sep="/"), metadata


class Loaded(NamedTuple):
  """A network with its weights."""

  network: models.Network
  params: types.PyTree
  model_state: types.PyTree
  metadata: dict[str, str]


def load_network(path: pathlib.Path, dtype: Any = None) -> Loaded:
  """Read a weight file and create the network that it names.

  Use `check_shapes` to check that the weights fit the network; it needs the
  size of the images.

  Args:
    path: the weight file.
    dtype: dtype of the activations; None for that of the parameters.

  Raises:
    errors.InputError: see `load`; or there is no such network.
  """
  variables, metadata = load(path)
  if metadata["model"] == SOURCE_AND_CLASSIFIER:
    raise errors.InputError(
      f"{path} holds a {SOURCE_AND_CLASSIFIER}, which only the run's folder can"
      " load; use the source's own weight file"
    )
  program, params = variables.pop("program", None), variables.pop("params", {})
  try:
    network: models.Network
    if program is None:
      name, num_classes = metadata["model"], int(metadata["num_classes"])
      network = bundled.create(name, num_classes, dtype)
    else:
      network = programs.to_functions(
        program.tobytes(),
        params,
        json.loads(metadata["taps"]),
        json.loads(metadata["default_taps"]),
      )
  except errors.InputError as error:
    again = metadata.get("command")
    hint = f"; make the file again: {again}" if again else ""
    raise errors.InputError(f"{path}: {error}{hint}") from error
  return Loaded(network, params, variables, metadata)


def save_program(
  path: pathlib.Path,
  network: programs.Exportable,
  program: bytes,
  metadata: Mapping[str, str],
) -> None:
  """Write the weights and the program of a converted network; see `save`."""
  save(
    path,
    {"params": network.params, "program": np.frombuffer(program, np.uint8)},
    {
      **metadata,
      **network.metadata,
      "image_size": str(network.image_size),
      # Programs take images on a scale from 0 to 1 and normalise them.
      "channels": "3",
      "mean": "[0.0]",
      "std": "[1.0]",
      "taps": json.dumps(network.taps),
      "default_taps": json.dumps(network.default_taps),
    },
  )


def check_shapes(
  layout: models.Layout, variables: types.PyTree, name: str
) -> None:
  """Check that variables have the names and shapes of a network's variables.

  Args:
    layout: the network's layout, from `models.trace`.
    variables: {"params": ..., and the collections of the model state}.
    name: the name of the network for the error message.

  Raises:
    errors.InputError: a variable does not fit; the message names it.
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
  """Read the metadata of a weight file.

  Returns:
    "model", "num_classes" and all other metadata passed to `save`, such as
    "channels", "mean" and "std", as JSON.

  Raises:
    errors.InputError: the file is missing, damaged, or was not written by
      `save`.
  """
  check_exists(path)
  with (
    _report_damage(path),
    safetensors.safe_open(path, framework="numpy") as file,
  ):
    metadata = file.metadata() or {}
  if "model" not in metadata or "num_classes" not in metadata:
    raise errors.InputError(
      f"{path} was not written by l2t_jax; convert it first:"
      f" python -m l2t_jax.pretrained {path} OUT.safetensors --model=..."
    )
  return metadata


class Copied(NamedTuple):
  """Variables, some of which were copied from another network."""

  variables: types.PyTree
  copied: tuple[str, ...]  # Names of the arrays that were copied.
  kept: tuple[str, ...]  # Names of the arrays without a counterpart.


def copy_matching(
  variables: types.PyTree, source_variables: types.PyTree
) -> Copied:
  """Copy the arrays that the source has under the same name and shape.

  Args:
    variables: {"params": ..., and the collections of the model state} of the
      network to be trained.
    source_variables: the variables of the network to copy from.
  """
  flat = traverse_util.flatten_dict(variables)
  source = traverse_util.flatten_dict(source_variables)
  copied, kept = [], []
  for path, leaf in flat.items():
    name = "/".join(path)
    if path in source and source[path].shape == leaf.shape:
      flat[path] = jnp.asarray(source[path], leaf.dtype)
      copied.append(name)
    else:
      kept.append(name)
  return Copied(traverse_util.unflatten_dict(flat), tuple(copied), tuple(kept))


def check_finite(
  path: pathlib.Path | str, arrays: Mapping[str, np.ndarray]
) -> None:
  """Raise `errors.InputError` if an array holds NaN or infinite values.

  Args:
    path: the file or network that the arrays come from, for the message.
    arrays: name -> array.
  """
  for name, values in arrays.items():
    if not np.isfinite(values).all():
      raise errors.InputError(
        f"{path}: {np.sum(~np.isfinite(values))} of {values.size} values of"
        f" {name} are NaN or infinite; take weights of a run that did not"
        " diverge"
      )


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Read the arrays of a safetensors file by name.

  Raises:
    errors.InputError: the file is damaged.
  """
  with _report_damage(path):
    return safetensors.numpy.load_file(path)


@contextlib.contextmanager
def _report_damage(path):
  """Convert the library's error about a damaged file to an InputError."""
  try:
    yield
  except safetensors.SafetensorError as error:
    hint = f": {error}"
    if pathlib.Path(path).suffix in (".pth", ".pt", ".tar", ".ckpt", ".bin"):
      hint = "; convert it with python -m l2t_jax.pretrained"
    raise errors.InputError(
      f"{path} is not a whole safetensors file{hint}"
    ) from error
