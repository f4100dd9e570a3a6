"""Batches of small images, all of which are kept on the device."""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import Any

import jax
import numpy as np

from l2t_jax import types
from l2t_jax.data import augmentation, data_fields, datasets


class InMemoryDataset(datasets.Dataset):
  """A data set whose resized images (`Subset.pixels`) stay on the device."""

  def __init__(
    self, contents: datasets.Contents, fields: data_fields.DataFields
  ):
    super().__init__(contents, fields)
    # Name -> (images, labels); an empty subset has no pixels.
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
    self._eval_batch = functools.partial(
      _eval_batch,
      mean=self.mean,
      std=self.std,
      white=self._subsets["train"].white,
    )

  def train_batches(self, epoch: int, start: int = 0) -> Iterator[types.Batch]:
    """See `Dataset.train_batches`."""
    key = jax.random.key(self._seed)
    unlabeled_key = jax.random.fold_in(key, datasets.NO_EPOCH)
    order = datasets.epoch_order(self._seed, epoch, self.num_train)
    for step in range(start, self.steps_per_epoch):
      batch = _train_batch(
        *self._arrays["train"],
        order[self._plan.slots(step)],
        (key, epoch, step),
        plan=self._plan,
        policy=self._policy,
      )
      batch = batch._replace(mixing=self._draw_mixing(epoch, step))
      if self.num_unlabeled:
        slots = self._unlabeled_plan.slots(epoch * self.steps_per_epoch + step)
        others = _train_batch(
          *self._arrays["unlabeled"],
          datasets.stream_positions(
            self._seed,
            slots,
            self.num_unlabeled,
            stream=datasets.UNLABELED,
          ),
          (unlabeled_key, epoch, step),
          plan=self._unlabeled_plan,
          policy=self._policy,
        )
        batch = batch._replace(unlabeled=others.images)
      if self._has_outer:
        batch = batch._replace(outer=self._outer(epoch, step))
      yield batch

  def _outer(self, epoch: int, step: int) -> types.Labelled:
    slots = self._plan.slots(epoch * self.steps_per_epoch + step)
    positions = datasets.stream_positions(
      self._seed, slots, self.num_val, stream=datasets.OUTER
    )
    images, labels, _ = self._eval_batch(
      *self._arrays["val"], positions, np.ones(len(positions), np.float32)
    )
    return types.Labelled(images, labels)

  def eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    """See `Dataset.eval_batches`."""
    images, labels = self._arrays[split]
    for step in range(self._eval_plan.num_eval_steps(len(labels))):
      positions, mask = self._eval_plan.eval_positions(len(labels), step)
      yield self._eval_batch(images, labels, positions, mask)


@functools.partial(jax.jit, static_argnames=("plan", "policy"))
def _train_batch(
  images: jax.Array,
  labels: jax.Array,
  positions: jax.Array,
  draw: tuple[jax.Array, Any, Any],
  *,
  plan: datasets.BatchPlan,
  policy: augmentation.Policy,
) -> types.Batch:
  """Gather, augment and normalise this process's rows of a batch.

  Args:
    images: all images, [N, H, W, C].
    labels: of all images, [N, ...].
    positions: indices of the images in the rows, [b].
    draw: PRNG key, epoch and step.
    plan: determines the rows of this process.
    policy: how images are augmented and normalised.

  Returns:
    Images float32 [b, H, W, C] and labels [b, ...].
  """
  batch = augmentation.augment(
    images[positions], draw, policy, num_images=plan.batch_size, rows=plan.rows
  )
  return types.Batch(batch, labels[positions])


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
