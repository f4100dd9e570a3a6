"""A trained target, ready to run on new images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from typing import Any
import warnings

import chex
import jax
import numpy as np
from PIL import Image

from l2t_jax import data, errors, models, types
from l2t_jax.data import augmentation, image_files, image_formats, pillow
from l2t_jax.method import objectives, transfer
from l2t_jax.models import weight_files
from l2t_jax.run import experiments, sources
from l2t_jax.runtime import compilation, run_folder

_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A trained network, and everything needed to run it on new images."""

  network: models.Network
  params: types.PyTree
  model_state: types.PyTree
  image_format: image_formats.ImageFormat
  dtype: np.dtype  # Of the pixels: uint8, or that of the training arrays.
  bit_depth: int  # Of images with more than 8 bits.
  class_names: tuple[str, ...]
  task: str  # As in config.target.task.
  # An image of any size -> one of the network's size, as in evaluation.
  resize: Callable[[Image.Image], Image.Image]
  precision: str = "float32"  # Of matrix products, for `jax`.

  def __repr__(self) -> str:
    return (
      f"Predictor: {len(self.class_names)} classes, {self.dtype} images"
      f" {list(self.image_format.shape)}"
    )

  def read(self, path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file in the network's format, uint8 [H, W, C].

    Raises:
      errors.InputError: it cannot be read, or the network does not take images
        of files.
    """
    self._check_reads_files()
    image = image_files.decode(pathlib.Path(path), name=str(path))
    if pillow.is_transparent(image):
      warnings.warn(
        "some images have transparent pixels; transparency is dropped, as in"
        " training: put them on a background if it was not there",
        stacklevel=2,
      )
    image = pillow.convert(image, self.image_format.channels, self.bit_depth)
    return pillow.to_array(self.resize(image))

  def apply(self, images: chex.Array) -> jax.Array:
    """Compute the outputs [B, ...] for images of `dtype` [B, H, W, C]."""
    return self._apply_fn(self.params, self.model_state, images)

  def _check_reads_files(self):
    channels = self.image_format.channels
    if self.dtype != np.uint8 or channels not in (1, 3):
      raise errors.InputError(
        f"the network sees {self.dtype} arrays of {channels} channels, not"
        " image files; python -m l2t_jax.export writes it as a program that"
        " takes arrays"
      )

  def outputs(
    self, images: np.ndarray, batch_size: int = _BATCH_SIZE
  ) -> np.ndarray:
    """Compute the outputs of many images, batch by batch.

    Args:
      images: of `dtype`, [N, H, W, C].
      batch_size: images per forward pass; a last, smaller batch is padded with
        zeros so that one shape is compiled.

    Returns:
      Outputs [N, ...].

    Raises:
      errors.InputError: images of another type or shape than in training.
    """
    shape = self.image_format.shape
    if images.dtype != self.dtype or images.shape[1:] != shape:
      size, _, channels = shape
      raise errors.InputError(
        f"images are {images.dtype} {list(images.shape)}, but must be"
        f" {self.dtype} [N, {size}, {size}, {channels}], as in training"
      )
    parts = []
    for start in range(0, len(images) or 1, batch_size):
      batch = images[start : start + batch_size]
      padding = ((0, batch_size - len(batch)), *((0, 0),) * 3)
      parts.append(np.asarray(self.apply(np.pad(batch, padding)))[: len(batch)])
    return np.concatenate(parts)

  def classify(
    self, paths: Iterable[str | os.PathLike[str]]
  ) -> Iterator[tuple[pathlib.Path, str, float]]:
    """Classify image files, batch by batch.

    Yields:
      (path, name of the likeliest class, its probability).

    Raises:
      errors.InputError: the network does not classify image files; or, after
        all other images, some cannot be read.
    """
    if self.task != "classification":
      raise errors.InputError(
        f"the network learned the task {self.task!r}, not classes; its outputs"
        " are those of the program that l2t_jax.export writes to OUT.stablehlo"
      )
    self._check_reads_files()
    if isinstance(paths, str | os.PathLike):
      raise errors.InputError(
        f"paths is {paths!r}; it must be a list of image files"
      )
    paths, unreadable = map(pathlib.Path, paths), []

    def read_all():
      for path in paths:
        try:
          yield path, self.read(path)
        except errors.InputError as error:
          unreadable.append(str(error))

    readable = read_all()
    while pairs := list(itertools.islice(readable, _BATCH_SIZE)):
      batch, images = zip(*pairs, strict=True)
      # A network may have more outputs than there are classes.
      logits = self.outputs(np.stack(images))[:, : len(self.class_names)]
      probabilities = np.asarray(jax.nn.softmax(logits))
      for path, row in zip(batch, probabilities, strict=True):
        best = int(row.argmax())
        yield path, self.class_names[best], float(row[best])
    if unreadable:
      raise errors.InputError(
        f"{len(unreadable)} of the images cannot be read:"
        f" {'; '.join(unreadable[:20])}"
      )

  @functools.cached_property
  def _apply_fn(self) -> Any:
    apply_fn = models.as_apply_fn(self.network, ())

    @jax.jit
    @jax.default_matmul_precision(self.precision)
    def outputs(params, model_state, images):
      images = augmentation.normalise(
        images,
        self.image_format.mean,
        self.image_format.std,
        white=augmentation.white(self.dtype, self.bit_depth),
      )
      logits, *_ = apply_fn(params, model_state, images, train=False)
      return transfer.at_least_float32(logits)

    return outputs


def load(
  run: str | os.PathLike[str],
  network: models.Network | None = None,
  source: experiments.Source | str | os.PathLike[str] | None = None,
) -> Predictor:
  """Load the trained target of a run.

  Args:
    run: folder of the run, or the target.safetensors in it.
    network: the target network, for a run whose config does not name it.
    source: the source, or the path of its weight file, for a run of
      linear_probe or finetune_source whose config does not name it or whose
      weight file has moved. The run's own weights are used.

  Raises:
    errors.InputError: there is no such file, its network cannot be made, or its
      source is missing or another one.
  """
  run = pathlib.Path(run).expanduser()
  path = run / run_folder.TARGET if run.is_dir() else run
  if not path.is_file():
    raise errors.InputError(
      f"there is no target.safetensors in {run}; a run leaves it with its first"
      " epoch"
    )
  metadata = weight_files.read_metadata(path)
  if "config" not in metadata:
    raise errors.InputError(
      f"{path} holds converted weights, not a run of l2t_jax: it does not say"
      " which images and classes it is for"
    )
  config = json.loads(metadata["config"])
  size = config["data"]["image_size"]
  image_format = image_formats.ImageFormat(
    size,
    int(metadata["channels"]),
    tuple(json.loads(metadata["mean"])),
    tuple(json.loads(metadata["std"])),
  )
  trains = objectives.get_method(config["method"]).trains
  if trains != "target":
    network = sources.as_target(
      sources.trace_one(
        "", _find_source(source, config, metadata), image_format
      ),
      int(metadata["num_classes"]),
      image_format,
      trains=trains,
    )
  dtype, precision = compilation.PRECISIONS[config["precision"]]
  name = str(path)
  if network is None:
    network, params, model_state, _ = weight_files.load_network(path, dtype)
  else:
    name = f"the network that is given for {path}"
    model_state, _ = weight_files.load(path)
    params = model_state.pop("params")
  weight_files.check_shapes(
    models.trace(network, image_format.shape),
    {"params": params, **model_state},
    name,
  )
  return Predictor(
    network,
    params,
    model_state,
    image_format,
    np.dtype(metadata["dtype"]),
    int(metadata["bit_depth"]),
    tuple(json.loads(metadata["class_names"])),
    config["target"]["task"],
    data.make_eval_resize(size, config["data"]["eval_resize"]),
    precision,
  )


def _find_source(source, config, metadata):
  """Return the source that a run without a target was trained with."""
  named = config["sources"] or {"": config["source"]}
  ((name, fields),) = named.items()
  fields = {**fields}
  weights = fields.pop("weights")
  if isinstance(source, experiments.Source):
    return experiments.with_plain_fields(source)
  if source is not None and not isinstance(source, str | os.PathLike):
    raise errors.InputError(
      f"source is of type {type(source).__name__}; it must be a Source, or the"
      " path of a weight file"
    )
  path = os.path.expanduser(source or weights)
  if not os.path.isfile(path):
    raise errors.InputError(
      f"this run of {config['method']} needs its source, but {path!r} is not"
      " there; give it: l2t_jax.load(run, source=...)"
    )
  field = f"sources.{name}.weights" if name else "source.weights"
  before = json.loads(metadata["contents"]).get(field, "")
  if before and data.digest(path) != before:
    raise errors.InputError(
      f"{path} is another file than the source of this run was; bring that"
      " back, or name its place: l2t_jax.load(run, source=...)"
    )
  return sources.load_source(path, **fields, precision=config["precision"])
