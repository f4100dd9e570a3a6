"""Read PyTorch checkpoints of all usual layouts, as tensors by name."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Collection, Iterator, Mapping
import pathlib
import re
from typing import Any, NamedTuple
import warnings

import numpy as np

from l2t_jax import errors, imports
from l2t_jax.models import weight_files

# Keys under which training scripts store the state dict, in order of
# preference. Averaged weights (EMA) come first: these were evaluated.
_USUAL_KEYS = (
  "model_ema",
  "state_dict_ema",
  "ema_state_dict",
  "params_ema",
  "ema",
  "state_dict",
  "model_state_dict",
  "model_state",
  "model",
  "net",
  "network",
  "params",
  "teacher",
)
_MAX_DEPTH = 3  # Nesting of the dicts that are searched.


class Checkpoint(NamedTuple):
  """The tensors of a checkpoint."""

  tensors: dict[str, np.ndarray]  # In PyTorch's layout; floats are float32.
  notes: tuple[str, ...] = ()  # Choices made on reading, one line each.


def read(path: pathlib.Path, key: str = "") -> Checkpoint:
  """Read a PyTorch or safetensors checkpoint without executing code from it.

  Pickles are read with `weights_only=True`. In addition to tensors they may
  hold plain values of Python and NumPy.

  Args:
    path: the file.
    key: the state dict to use, such as "model_ema", or a prefix of the names of
      the tensors to use; "" for the usual one.

  Raises:
    errors.InputError: the file is missing, damaged or no checkpoint, or the
      choice of the state dict is ambiguous.
  """
  if not path.is_file():
    raise errors.InputError(f"no checkpoint at {path}")
  if is_safetensors(path):
    content: Any = weight_files.read_safetensors(path)
  else:
    content = _read_pickle(path)
  found = dict(_state_dicts(content))
  if not found:
    raise errors.InputError(
      f"{path} holds no state dict: expected tensors by name, alone or under a"
      " key such as 'state_dict'"
    )
  chosen = _choose(path, list(found), key)
  notes = []
  if len(found) > 1:
    others = ", ".join(repr(name) for name in found if name != chosen)
    notes.append(f"took {chosen!r}, not {others} (--key chooses)")
  tensors = {name: _to_numpy(value) for name, value in found[chosen].items()}
  prefix = f"{key.removesuffix('.')}."
  if key and key != chosen:
    tensors = {
      name.removeprefix(prefix): value
      for name, value in tensors.items()
      if name.startswith(prefix)
    }
    if not tensors:
      raise errors.InputError(
        f"{path} has neither a state dict {key!r} nor tensors named {prefix}*;"
        f" it has {', '.join(filter(None, found)) or 'one state dict alone'}"
      )
  return Checkpoint(tensors, tuple(notes))


def is_safetensors(path: pathlib.Path) -> bool:
  """Return whether a file is in safetensors format, whatever its name."""
  if path.suffix.lower() == ".safetensors":
    return True
  # The format starts with the header's length in 8 bytes, then its JSON.
  with path.open("rb") as file:
    return file.read(9)[8:] == b"{"


def without_prefix(
  checkpoint: Checkpoint, expected: Collection[str]
) -> Checkpoint:
  """Strip the prefix that a wrapper of the network adds to tensor names.

  Args:
    checkpoint: tensors with names such as "module.encoder.conv1.weight".
    expected: names of the network's tensors, such as "conv1.weight".

  Raises:
    errors.InputError: two prefixes match equally well.
  """
  # Prefix -> number of tensors whose names are expected without it.
  counts: collections.Counter[str] = collections.Counter()
  for name in checkpoint.tensors:
    parts = name.split(".")
    for start in range(len(parts)):
      if ".".join(parts[start:]) in expected:
        counts["".join(f"{part}." for part in parts[:start])] += 1
  most = max(counts.values(), default=0)
  best = sorted(p for p, count in counts.items() if count == most)
  if not best or "" in best:
    return checkpoint
  if len(best) > 1:
    raise errors.InputError(
      "the checkpoint holds several networks of that kind, under"
      f" {' and '.join(best)}; choose one, as by --key={best[0]}"
    )
  (prefix,) = best
  tensors = checkpoint.tensors
  inside = {
    name.removeprefix(prefix): x
    for name, x in tensors.items()
    if name.startswith(prefix)
  }
  outside = {n: x for n, x in tensors.items() if not n.startswith(prefix)}
  hidden = sorted(inside.keys() & outside.keys())
  return Checkpoint(
    outside | inside,
    (
      *checkpoint.notes,
      f"without the prefix {prefix!r} of the names",
      *(f"left over: {name}, since there is {prefix}{name}" for name in hidden),
    ),
  )


def left_over(
  tensors: Collection[str], used: Collection[str], linear: Collection[str]
) -> tuple[str, ...]:
  """Return the names of a checkpoint's tensors that a network does not have.

  Args:
    tensors: names of the checkpoint's tensors.
    used: those that the network has.
    linear: names of the network's linear layers.

  Raises:
    errors.InputError: the tensors are those of a deeper network.
  """
  # num_batches_tracked is PyTorch's counter, which Flax does not have.
  unused = tuple(
    name
    for name in tensors
    if name not in used and not name.endswith("num_batches_tracked")
  )
  # A left-over tensor whose name differs from a used one's only in numbers
  # belongs to a layer that the network lacks. Linear layers are exempt: a
  # second classifier is harmless.
  without_numbers = lambda name: re.sub(r"\d+", "", name)
  is_linear = lambda name: name.rpartition(".")[0] in linear
  kinds = {without_numbers(name) for name in used if not is_linear(name)}
  if deeper := [name for name in unused if without_numbers(name) in kinds]:
    raise errors.InputError(
      f"the checkpoint has layers that the network lacks: {len(deeper)}"
      f" tensors, such as {deeper[0]}; choose the network that it was trained"
      " with, or leave these tensors out of the file"
    )
  return unused


def _read_pickle(path):
  """Unpickle a PyTorch file with `weights_only=True`."""
  torch = imports.require("torch", needed_for=f"reading {path.name}")
  harmless = [
    argparse.Namespace,
    np.dtype,
    np.float64(0).__reduce__()[0],  # The constructor of NumPy scalars.
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
  ]
  try:
    with (
      warnings.catch_warnings(action="ignore"),  # About old formats.
      torch.serialization.safe_globals(harmless),
    ):
      return torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    code = re.search(r"GLOBAL (\S+)", str(error))
    reason = (
      f"it asks to run {code[1]}, and its code is never run"
      if code
      else "it is not a PyTorch checkpoint, or is cut off"
    )
    raise errors.InputError(
      f"{path} cannot be read safely (weights_only): {reason}; save a"
      " state_dict() of tensors alone"
    ) from error


def _state_dicts(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
  """Yield (dotted key, dict) for each nested dict that holds tensors."""
  if not isinstance(content, Mapping):
    return
  tensors = {
    name: value
    for name, value in content.items()
    if isinstance(name, str) and hasattr(value, "shape") and value.shape != ()
  }
  if tensors:
    # Scalars do not make a dict a state dict, but belong to one, such as the
    # num_batches_tracked of batch normalisation.
    scalars = {n: x for n, x in content.items() if hasattr(x, "shape")}
    yield key, scalars
  if key.count(".") + 1 < _MAX_DEPTH:
    for name, value in content.items():
      if isinstance(name, str):
        yield from _state_dicts(value, f"{key}.{name}" if key else name)


def _choose(path, names, key):
  """Return the name of the state dict to use."""
  if key and key in names:
    return key
  if len(names) == 1:
    return names[0]
  for usual in _USUAL_KEYS:
    for name in names:
      if usual in name.split("."):
        return name
  raise errors.InputError(
    f"{path} holds several state dicts: {', '.join(map(repr, names))}; choose"
    f" one, as by --key={names[0]}"
  )


def _to_numpy(tensor):
  """Convert to a NumPy array; floats of any width become float32."""
  if hasattr(tensor, "detach"):
    tensor = tensor.detach()
    if tensor.is_floating_point():
      tensor = tensor.float()
    return tensor.numpy()
  if tensor.dtype.kind in "iub":
    return tensor
  return np.asarray(tensor, np.float32)
