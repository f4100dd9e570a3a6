"""Batches of small images that all stay on the device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from l2t_jax import types
from l2t_jax.data import augmentation, data_fields, datasets, pillow

# Takes the place of an epoch in the keys of images without labels.
NO_EPOCH = 2**32 - 1


class _Preparation(NamedTuple):
  """What is done to the images of a training batch; static under jit."""

  plan: datasets.BatchPlan
  augment: str
  padding: int
  mean: tuple[float, ...]
  std: tuple[float, ...]


class InMemoryDataset(datasets.Dataset):
  """Images that are resized once and then kept on the device as uint8."""

  def __init__(
    self, contents: datasets.Contents, fields: data_fields.DataFields
  ):
    super().__init__(contents, fields)
    self._arrays = {
      name: jax.device_put(
        (_read_resized(subset, self.image_shape), subset.targets)
      )
      for name, subset in self._subsets.items()
    }
    mean, std = tuple(fields.mean), tuple(fields.std)
    self._preparation = _Preparation(
      self._plan, fields.augment, fields.crop_padding, mean, std
    )
    self._eval_batch = functools.partial(_eval_batch, mean=mean, std=std)

  def _train_batches(self, epoch: int, start: int) -> Iterator[types.Batch]:
    key = jax.random.key(self._seed)
    unlabeled_key = jax.random.fold_in(key, NO_EPOCH)
    order = datasets.epoch_order(self._seed, epoch, self.num_train)
    for step in range(start, self.steps_per_epoch):
      positions = order[self._plan.slots(step)]
      batch = _train_batch(
        self._arrays["train"],
        positions,
        (key, epoch, step),
        preparation=self._preparation,
      )
      if self.num_unlabeled:
        batch = batch._replace(
          unlabeled=self._read_unlabeled(unlabeled_key, epoch, step)
        )
      yield batch

  def _read_unlabeled(self, key: jax.Array, epoch: int, step: int) -> jax.Array:
    slots = self._unlabeled_plan.slots(epoch * self.steps_per_epoch + step)
    positions = datasets.unlabeled_positions(
      self._seed, slots, self.num_unlabeled
    )
    images, _ = self._arrays["unlabeled"]
    return _train_images(
      images,
      positions,
      (key, epoch, step),
      preparation=self._preparation._replace(plan=self._unlabeled_plan),
    )

  def _eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    images, labels = self._arrays[split]
    for step in range(self._eval_plan.num_eval_steps(len(labels))):
      positions, mask = self._eval_plan.eval_positions(len(labels), step)
      yield self._eval_batch(images, labels, positions, mask)


def _read_resized(
  subset: datasets.Subset, image_shape: tuple[int, int, int]
) -> np.ndarray:
  """Read all images of a subset as uint8 [N, H, W, C]."""
  height, width, channels = image_shape
  pixels = subset.records.pixels
  if pixels is not None and pixels.shape[1:] == image_shape:
    return pixels[subset.indices]

  def read(position: int) -> np.ndarray:
    image = subset.read_image(position, channels=channels)
    return pillow.to_array(pillow.resize(image, width, height))

  num_images = len(subset.indices)
  resized = np.empty((num_images, *image_shape), np.uint8)
  with futures.ThreadPoolExecutor() as pool:
    for position, image in enumerate(pool.map(read, range(num_images))):
      resized[position] = image
  return resized


@functools.partial(jax.jit, static_argnames="preparation")
def _train_batch(
  data: tuple[jax.Array, jax.Array],
  positions: jax.Array,
  draw: tuple[jax.Array, Any, Any],
  *,
  preparation: _Preparation,
) -> types.Batch:
  """Prepare this process's rows of a batch, with labels; see _train_images."""
  images, labels = data
  return types.Batch(
    _train_images(images, positions, draw, preparation=preparation),
    labels[positions],
  )


@functools.partial(jax.jit, static_argnames="preparation")
def _train_images(
  images: jax.Array,
  positions: jax.Array,
  draw: tuple[jax.Array, Any, Any],
  *,
  preparation: _Preparation,
) -> jax.Array:
  """Gather, augment and normalise this process's rows of a batch.

  Args:
    images: all images, uint8 [N, H, W, C].
    positions: of the rows, [b].
    draw: PRNG key, epoch and step.
    preparation: what is done to them.

  Returns:
    float32 [b, H, W, C].
  """
  plan, augment, padding, mean, std = preparation
  batch = images[positions]
  if augment != "none":
    key, epoch, step = draw
    key = jax.random.fold_in(jax.random.fold_in(key, epoch), step)
    # Drawn for the global batch, so that the number of processes does not
    # matter.
    offsets, flips = augmentation.draw_crops(
      key, plan.batch_size, padding=padding
    )
    offsets, flips = offsets[plan.rows], flips[plan.rows]
    flips = flips & (augment == "crop_flip")
    batch = augmentation.pad_crop_flip(batch, offsets, flips, padding=padding)
  return augmentation.normalise(batch, mean, std)


@functools.partial(jax.jit, static_argnames=("mean", "std"))
def _eval_batch(
  images: jax.Array,
  labels: jax.Array,
  positions: jax.Array,
  mask: jax.Array,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> types.EvalBatch:
  """Gather and normalise this process's rows of a batch."""
  batch = augmentation.normalise(images[positions], mean, std)
  return types.EvalBatch(batch, labels[positions], mask)
