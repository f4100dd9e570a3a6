"""Networks of keras.applications as exportable pure functions."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys
from typing import Any
import warnings

import numpy as np

from l2t_jax import errors, imports
from l2t_jax.models import programs, tapping

_USUAL_SIZE = 224  # Image size of most ImageNet networks.
# Layers in which the branches of a block merge.
_MERGES = ("Add", "Concatenate")
# Layers that only prepare the input of others.
_NO_LAYERS = ("InputLayer", "Rescaling", "Normalization", "ZeroPadding2D")


def from_keras(
  name: str,
  checkpoint: pathlib.Path | None,
  key: str,
  reading: programs.Reading,
) -> programs.Exportable:
  """Create a network of keras.applications; each layer's map is a tap.

  Args:
    name: such as "EfficientNetV2B0".
    checkpoint: weights from Keras's `save_weights`; None to download those of
      ImageNet.
    key: must be "", since such a file holds a single network.
    reading: the image size; Keras itself normalises the images.

  Raises:
    errors.InputError: Keras is not installed or knows no such network, weights
      cannot be downloaded, or the checkpoint does not fit.
  """
  keras = _require_keras(f"keras:{name}")
  makers = {
    key: value
    for key, value in vars(keras.applications).items()
    if key[0].isupper() and callable(value)
  }
  if name not in makers:
    raise errors.InputError(
      f"keras.applications has no network {name!r}"
      f"{programs.did_you_mean(name, makers)}"
    )
  if reading.mean or reading.std:
    raise errors.InputError(
      f"keras:{name} normalises its images itself; leave out --mean and --std"
    )
  if key:
    raise errors.InputError("--key is for checkpoints of PyTorch")
  make = functools.partial(_make, makers[name], checkpoint)
  model = make(reading.image_size)
  if model.input_shape[1] is None:  # Any size; programs need a fixed one.
    model = make(_USUAL_SIZE)
  # Each family of networks has its own preprocessing of values from 0 to 255.
  preprocess = sys.modules[makers[name].__module__].preprocess_input
  size = model.input_shape[1]
  outputs: dict[str, tapping.Grid | None] = {}  # Grid of tokens; None for maps.
  grids = []
  for layer in model.layers:
    shape = getattr(layer.output, "shape", None)
    if layer.output is model.output or shape is None:
      continue
    if len(shape) == 4:
      grids.append(shape[1:3])
      outputs[layer.name] = None
    elif len(shape) == 3 and (grid := tapping.find_grid(shape[1], grids)):
      outputs[layer.name] = grid
  inner = keras.Model(
    model.inputs,
    [model.output, *(model.get_layer(name).output for name in outputs)],
  )
  variables = [inner.trainable_variables, inner.non_trainable_variables]
  # Only floats are weights; other variables become constants of the program.
  is_float = lambda v: np.issubdtype(np.dtype(v.dtype), np.floating)
  # "/" would separate levels of nesting in the weight file.
  name_of = lambda v: v.path.replace("/", ".")

  def apply(params, images):
    values = [
      [params[name_of(v)] if is_float(v) else v.value for v in part]
      for part in variables
    ]
    (logits, *maps), _ = inner.stateless_call(
      *values, preprocess(images * 255.0), training=False
    )
    return logits, *(
      x if grid is None else tapping.to_grid(x, grid)
      for x, grid in zip(maps, outputs.values(), strict=True)
    )

  def reference(images):
    return np.asarray(model(preprocess(images * 255.0), training=False))

  return programs.Exportable(
    apply,
    {name_of(v): np.asarray(v) for v in inner.variables if is_float(v)},
    reference,
    size,
    tuple(outputs),
    _default_taps(model, outputs),
    {
      "class_names": "[]",
      "interpolation": "bilinear",
      "licence": "",
      "versions": json.dumps({"keras": keras.__version__}),
    },
  )


def _default_taps(model, outputs):
  """Return the output of the last block at each resolution.

  A block with a skip connection or several branches ends where these merge.
  Later layers at the same resolution belong to the block that reduces it.
  """
  kind = lambda name: type(model.get_layer(name)).__name__
  size = lambda name: tuple(model.get_layer(name).output.shape[1:3])
  maps = [name for name in outputs if size(name) != (1, 1)]
  ends = [name for name in maps if kind(name) in _MERGES]
  if len({size(name) for name in ends}) < 2:
    ends = [name for name in maps if kind(name) not in _NO_LAYERS]
  ends = [_with_activation(model.get_layer(name)).name for name in ends]
  return tuple({size(name): name for name in ends}.values())


def _with_activation(layer):
  """Return the activation that is a layer's only consumer, else the layer."""
  readers = [node.operation for node in layer._outbound_nodes]
  names = [type(reader).__name__ for reader in readers]
  return readers[0] if names in (["Activation"], ["ReLU"]) else layer


def _require_keras(what):
  """Import Keras with JAX as its backend."""
  if "keras" not in sys.modules:  # Keras chooses its backend on import.
    os.environ["KERAS_BACKEND"] = "jax"
  keras = imports.require("keras", needed_for=what)
  if keras.backend.backend() != "jax":
    raise errors.InputError(
      f"{what} needs Keras with JAX as its backend: set KERAS_BACKEND=jax"
    )
  return keras


def _make(maker, checkpoint, image_size):
  """Make a model that returns logits, with its weights."""
  options: dict[str, Any] = {"classifier_activation": None}
  if image_size:
    options["input_shape"] = (image_size, image_size, 3)
  try:
    if checkpoint is None:
      return maker(weights="imagenet", **options)
    return _load(maker, checkpoint, options)
  except errors.InputError:
    raise
  except Exception as error:  # Keras raises many types, also when offline.
    hint = "" if checkpoint else "; --checkpoint=FILE takes weights you have"
    raise errors.InputError(
      f"Keras cannot make {maker.__name__!r}: {errors.in_one_line(error)}{hint}"
    ) from error


def _load(maker, checkpoint, options):
  """Make a model with a checkpoint's number of classes and load its weights."""
  if not checkpoint.is_file():
    raise errors.InputError(f"no checkpoint at {checkpoint}")
  h5py = imports.require("h5py", needed_for=f"reading {checkpoint.name}")
  stored: list[tuple[int, ...]] = []

  def note(name, item):
    if isinstance(item, h5py.Dataset):
      stored.append(item.shape)

  try:
    with h5py.File(checkpoint) as file:
      file.visititems(note)
  except OSError as error:
    raise errors.InputError(
      f"{checkpoint} is not a whole HDF5 file; give one of Keras's save_weights"
    ) from error
  model = maker(weights=None, **options)
  # With another number of classes, the bias of the classifier is the only
  # vector whose length differs.
  lengths = {shape[0] for shape in stored if len(shape) == 1}
  lengths -= {v.shape[0] for v in model.variables if len(v.shape) == 1}
  if len(lengths) == 1:
    model = maker(weights=None, classes=lengths.pop(), **options)
  try:
    with warnings.catch_warnings(action="ignore"):  # About nested containers.
      model.load_weights(checkpoint)
  except ValueError as error:
    raise errors.InputError(
      f"{checkpoint} does not fit the network: {errors.in_one_line(error)}"
    ) from error
  return model
