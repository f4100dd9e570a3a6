"""Batches of small images that all stay on the device."""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import Any

import jax
import numpy as np

from l2t_jax import types
from l2t_jax.data import augmentation, data_fields, datasets

# In place of an epoch, in the key of images without labels.
NO_EPOCH = 2**32 - 1


class InMemoryDataset(datasets.Dataset):
  """Images that stay on the device, resized; `Subset.pixels`."""

  def __init__(
    self, contents: datasets.Contents, fields: data_fields.DataFields
  ):
    super().__init__(contents, fields)
    self._arrays = {
      name: jax.device_put(
        (
          np.zeros((0, *self.image_shape), subset.dtype)
          if subset.pixels is None
          else subset.pixels,
          subset.targets,
        )
      )
      for name, subset in self._subsets.items()
    }
    normalisation = {
      "mean": self.mean,
      "std": self.std,
      "white": self._subsets["train"].white,
    }
    self._train_batch = functools.partial(
      _train_batch,
      augment=fields.augment,
      padding=fields.crop_padding,
      **normalisation,
    )
    self._eval_batch = functools.partial(_eval_batch, **normalisation)

  def train_batches(self, epoch: int, start: int = 0) -> Iterator[types.Batch]:
    """See `Dataset.train_batches`."""
    key = jax.random.key(self._seed)
    unlabeled_key = jax.random.fold_in(key, NO_EPOCH)
    order = datasets.epoch_order(self._seed, epoch, self.num_train)
    for step in range(start, self.steps_per_epoch):
      batch = self._train_batch(
        *self._arrays["train"],
        order[self._plan.slots(step)],
        (key, epoch, step),
        plan=self._plan,
      )
      if self.num_unlabeled:
        slots = self._unlabeled_plan.slots(epoch * self.steps_per_epoch + step)
        others = self._train_batch(
          *self._arrays["unlabeled"],
          datasets.unlabeled_positions(self._seed, slots, self.num_unlabeled),
          (unlabeled_key, epoch, step),
          plan=self._unlabeled_plan,
        )
        batch = batch._replace(unlabeled=others.images)
      yield batch

  def eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    """See `Dataset.eval_batches`."""
    images, labels = self._arrays[split]
    for step in range(self._eval_plan.num_eval_steps(len(labels))):
      positions, mask = self._eval_plan.eval_positions(len(labels), step)
      yield self._eval_batch(images, labels, positions, mask)


@functools.partial(
  jax.jit,
  static_argnames=("plan", "augment", "padding", "mean", "std", "white"),
)
def _train_batch(
  images: jax.Array,
  labels: jax.Array,
  positions: jax.Array,
  draw: tuple[jax.Array, Any, Any],
  *,
  plan: datasets.BatchPlan,
  augment: str,
  padding: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  white: int,
) -> types.Batch:
  """Gather, augment and normalise this process's rows of a batch.

  Args:
    images: all images, [N, H, W, C].
    labels: of all images, [N, ...].
    positions: which images are in the rows, [b].
    draw: PRNG key, epoch and step.
    plan: says which rows of the global batch these are.
    augment: see `DataFields`.
    padding: width of the black border, in pixels.
    mean: of the pixels, for normalisation.
    std: of the pixels, for normalisation.
    white: the value of a pixel that is 1 for normalisation.

  Returns:
    Images float32 [b, H, W, C] and labels [b, ...].
  """
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
  return types.Batch(
    augmentation.normalise(batch, mean, std, white=white), labels[positions]
  )


@functools.partial(jax.jit, static_argnames=("mean", "std", "white"))
def _eval_batch(
  images: jax.Array,
  labels: jax.Array,
  positions: jax.Array,
  mask: jax.Array,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  white: int,
) -> types.EvalBatch:
  """Gather and normalise this process's rows of a batch."""
  batch = augmentation.normalise(images[positions], mean, std, white=white)
  return types.EvalBatch(batch, labels[positions], mask)
