"""Batches of small images that all stay on the device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
import functools
from typing import Any

import jax
import numpy as np

from l2t_jax import types
from l2t_jax.data import augmentation, datasets, pillow

AUGMENTS = ("none", "crop", "crop_flip")
# In place of an epoch, for the draws of images without labels.
NO_EPOCH = 2**32 - 1


class InMemoryDataset(datasets.SplitDataset):
  """Images that are resized once and then kept as uint8; see Dataset."""

  def __init__(
    self,
    contents: datasets.Contents,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: str,
    crop_padding: int,
  ):
    super().__init__(contents)
    self._arrays = {
      name: jax.device_put(
        (_read_resized(subset, self.image_shape), subset.targets)
      )
      for name, subset in self._subsets.items()
    }
    static = {
      "augment": augment,
      "padding": crop_padding,
      "mean": mean,
      "std": std,
    }
    self._train_batch = functools.partial(
      _train_batch, plan=self._plan, **static
    )
    self._unlabeled_images = functools.partial(
      _train_images, plan=self._unlabeled_plan, **static
    )
    self._eval_batch = functools.partial(_eval_batch, mean=mean, std=std)

  def _train_batches(self, epoch: int, start: int) -> Iterator[types.Batch]:
    key = jax.random.key(self._seed)
    unlabeled_key = jax.random.fold_in(key, NO_EPOCH)
    order = datasets.epoch_order(self._seed, epoch, self.num_train)
    for step in range(start, self.steps_per_epoch):
      positions = order[self._plan.slots(step)]
      batch = self._train_batch(
        *self._arrays["train"], positions, key, epoch, step
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
    return self._unlabeled_images(images, positions, key, epoch, step)

  def _eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    images, labels = self._arrays[split]
    for step in range(self._eval_plan.num_eval_steps(len(labels))):
      positions, mask = self._eval_plan.eval_positions(len(labels), step)
      yield self._eval_batch(images, labels, positions, mask)


def _read_resized(
  subset: datasets.Subset, image_shape: tuple[int, int, int]
) -> np.ndarray:
  """Read all images of a split as uint8 [N, H, W, C]."""
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


@functools.partial(
  jax.jit, static_argnames=("plan", "augment", "padding", "mean", "std")
)
def _train_batch(
  images: jax.Array,
  labels: jax.Array,
  positions: jax.Array,
  key: jax.Array,
  epoch: jax.Array,
  step: jax.Array,
  **static: Any,
) -> types.Batch:
  """Gather this process's rows of a batch; see _train_images."""
  read = _train_images(images, positions, key, epoch, step, **static)
  return types.Batch(read, labels[positions])


@functools.partial(
  jax.jit, static_argnames=("plan", "augment", "padding", "mean", "std")
)
def _train_images(
  images: jax.Array,
  positions: jax.Array,
  key: jax.Array,
  epoch: jax.Array,
  step: jax.Array,
  *,
  plan: datasets.BatchPlan,
  augment: str,
  padding: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> jax.Array:
  """Gather, augment and normalise this process's rows of a batch."""
  batch = images[positions]
  if augment != "none":
    key = jax.random.fold_in(key, epoch)
    # Drawn for the global batch: the same whatever the number of processes.
    offsets, flips = augmentation.draw_crops(
      jax.random.fold_in(key, step), plan.batch_size, padding=padding
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
