"""Classify images with the target of a finished run.

    python -m l2t_jax.predict RUN IMAGES... > predictions.csv

RUN is the folder of a run, or its target.safetensors; IMAGES are files, and
folders that are searched with their subfolders. The table has the columns
image, class and probability.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from typing import Any
import warnings

import chex
import jax
import numpy as np
from PIL import Image

from l2t_jax import data, errors, models, types
from l2t_jax.data import augmentation, formats, from_folders, pillow
from l2t_jax.models import weight_files
from l2t_jax.runtime import cpu_lowering

_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A trained network with all that it takes to run it on images."""

  network: models.Network
  params: types.PyTree
  model_state: types.PyTree
  image_format: formats.ImageFormat
  class_names: tuple[str, ...]
  task: str  # As in config.target.task.
  # An image of any size, grey or RGB -> one of the network's, as in evaluation.
  resize: Callable[[Image.Image], Image.Image]

  def read(self, path: pathlib.Path) -> np.ndarray:
    """Read an image as the network wants it, uint8 [H, W, C].

    Raises:
      errors.InputError: it cannot be read.
    """
    image = pillow.decode(path, name=str(path))
    if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
      warnings.warn(
        "some images have transparent pixels; transparency is dropped, as in"
        " training: put them on a background if it was not there",
        stacklevel=2,
      )
    image = pillow.convert(image, self.image_format.channels)
    return pillow.to_array(self.resize(image))

  def apply(self, images: chex.Array) -> jax.Array:
    """Compute the outputs [B, ...] for images uint8 [B, H, W, C]."""
    return self._apply_fn(self.params, self.model_state, images)

  def outputs(self, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Compute outputs, some images at a time.

    Args:
      images: uint8 [N, H, W, C].
      batch_size: the last, smaller batch is filled up with zeros: one shape is
        compiled.

    Returns:
      Outputs [N, ...].
    """
    parts = []
    for start in range(0, len(images) or 1, batch_size):
      batch = images[start : start + batch_size]
      padding = ((0, batch_size - len(batch)), *((0, 0),) * 3)
      parts.append(np.asarray(self.apply(np.pad(batch, padding)))[: len(batch)])
    return np.concatenate(parts)

  @functools.cached_property
  def _apply_fn(self) -> Any:
    apply_fn = models.as_apply_fn(self.network, ())

    @jax.jit
    @jax.default_matmul_precision("highest")  # As evaluation has it.
    def outputs(params, model_state, images):
      images = augmentation.normalise(
        images, self.image_format.mean, self.image_format.std
      )
      return apply_fn(params, model_state, images, train=False)[0]

    return outputs


def load(run: pathlib.Path, network: models.Network | None = None) -> Predictor:
  """Read what a run leaves.

  Args:
    run: its folder, or the target.safetensors in it.
    network: the target, where its config does not name it.

  Raises:
    errors.InputError: there is no such file, or its network cannot be made.
  """
  path = run / "target.safetensors" if run.is_dir() else run
  if not path.is_file():
    raise errors.InputError(
      f"there is no target.safetensors in {run}; a run leaves it with its first"
      " epoch"
    )
  metadata = weight_files.read_metadata(path)
  if "config" not in metadata:
    raise errors.InputError(
      f"{path} was converted and not trained by l2t_jax: it says nothing of its"
      " images and classes"
    )
  config = json.loads(metadata["config"])
  size = config["data"]["image_size"]
  image_format = formats.ImageFormat(
    size,
    int(metadata["channels"]),
    tuple(json.loads(metadata["mean"])),
    tuple(json.loads(metadata["std"])),
  )
  if network is None:
    network, params, model_state, _ = weight_files.load_network(path)
    weight_files.check_shapes(
      models.trace(network, image_format.shape),
      {"params": params, **model_state},
      str(path),
    )
  else:
    model_state, _ = weight_files.load(path)
    params = model_state.pop("params")
  return Predictor(
    network,
    params,
    model_state,
    image_format,
    tuple(json.loads(metadata["class_names"])),
    config["target"]["task"],
    data.make_eval_resize(size, config["data"]["eval_resize"]),
  )


def predict(
  predictor: Predictor, paths: Iterable[pathlib.Path]
) -> Iterator[tuple[pathlib.Path, str, float]]:
  """Classify images.

  Args:
    predictor: from `load`.
    paths: of images.

  Yields:
    (path, name of the likeliest class, its probability).

  Raises:
    errors.InputError: an image cannot be read, or the network is no classifier.
  """
  if predictor.task != "classification":
    raise errors.InputError(
      f"the network learned the task {predictor.task!r}, and no classes; its"
      " outputs are those of l2t_jax.export OUT.stablehlo"
    )
  for batch in _batched(paths, _BATCH_SIZE):
    images = np.stack([predictor.read(path) for path in batch])
    logits = predictor.outputs(images, _BATCH_SIZE)
    # A network may have more outputs than there are classes.
    logits = logits[:, : len(predictor.class_names)]
    probabilities = np.asarray(jax.nn.softmax(logits))
    for path, row in zip(batch, probabilities, strict=True):
      best = int(row.argmax())
      yield path, predictor.class_names[best], float(row[best])


def find_images(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """List images: files as they are, folders searched and sorted.

  Raises:
    errors.InputError: a path does not exist, or a folder has no images.
  """
  found: list[pathlib.Path] = []
  for path in paths:
    if path.is_dir():
      found += from_folders.list_images(path)
    elif path.exists():
      found.append(path)
    else:
      raise errors.InputError(f"there is no image or folder {path}")
  return found


def _batched(paths, size):
  paths = iter(paths)
  while batch := list(itertools.islice(paths, size)):
    yield batch


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("run", type=pathlib.Path)
  parser.add_argument("images", type=pathlib.Path, nargs="+")
  return parser


def main(args: argparse.Namespace) -> None:
  """Print the class of each image as CSV."""
  cpu_lowering.install()
  paths = find_images(args.images)
  table = csv.writer(sys.stdout)
  table.writerow(("image", "class", "probability"))
  for path, name, probability in predict(load(args.run), paths):
    table.writerow((path, name, f"{probability:.4f}"))


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
