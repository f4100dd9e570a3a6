"""Which images are in which batch, for both ways of reading them.

Every draw depends on (seed, epoch, step) alone: a run can stop anywhere and go
on with the same batches, and each process yields its rows of global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from l2t_jax import types
from l2t_jax.data import images as pillow
from l2t_jax.data import records, splits


class Dataset(Protocol):
  """Labelled images in three splits, as batches on the device."""

  num_classes: int
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # (H, W, C).
  num_train: int
  num_val: int  # 0 where no validation images were asked for.
  num_test: int
  split_hash: str  # 16 hex digits of the indices in use.
  steps_per_epoch: int  # The last, smaller batch is dropped in training.

  def train_batches(self, epoch: int, start: int = 0) -> Iterator[types.Batch]:
    """Yield an epoch's batches in its own random order.

    Args:
      epoch: from 0; with the seed it decides order and augmentation.
      start: steps to skip; the others stay as they are.

    Yields:
      This process's rows of each global batch.
    """

  def eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    """Yield every image of a split once, in a fixed order.

    Args:
      split: 'val' or 'test'.

    Yields:
      This process's rows of each global batch; padding has mask 0.
    """


class Subset(NamedTuple):
  """The images of one split."""

  records: records.Records
  indices: np.ndarray  # [N] int64, into records.

  @property
  def labels(self) -> np.ndarray:
    """Labels int32 [N]."""
    return self.records.labels[self.indices]

  def read_image(self, position: int, *, channels: int) -> Image.Image:
    """Read the image at a position from 0 to N - 1, grey or RGB."""
    image = self.records.read_image(int(self.indices[position]))
    return pillow.convert(image, channels)


class BatchPlan(NamedTuple):
  """Which images are in which batch of this process."""

  batch_size: int  # Over all processes.
  seed: int
  process_index: int
  process_count: int

  @property
  def rows(self) -> slice:
    """This process's rows of every global batch."""
    size = self.batch_size // self.process_count
    return slice(self.process_index * size, (self.process_index + 1) * size)

  def slots(self, step: int) -> np.ndarray:
    """Number this process's rows of a step within the epoch, int64 [b]."""
    first = step * self.batch_size
    return np.arange(first + self.rows.start, first + self.rows.stop)

  def num_eval_steps(self, num_images: int) -> int:
    """Return how many batches it takes to see every image."""
    return -(-num_images // self.batch_size)

  def eval_positions(
    self, num_images: int, step: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return positions int64 [b] and mask float32 [b], 0 for padding."""
    slots = self.slots(step)
    mask = slots < num_images
    return np.where(mask, slots, 0), mask.astype(np.float32)


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
  """Return an epoch's permutation of the training images, int64 [N]."""
  return np.random.default_rng([seed, epoch]).permutation(num_images)


class SplitDataset:
  """The part of a Dataset that does not depend on how images are read."""

  def __init__(
    self,
    source: records.Source,
    split: splits.Split,
    plan: BatchPlan,
    image_shape: tuple[int, int, int],
  ):
    self.num_classes = len(source.class_names)
    self.class_names = source.class_names
    self.image_shape = image_shape
    self.num_train, self.num_val, self.num_test = map(len, split)
    self.split_hash = splits.split_hash(split)
    self.steps_per_epoch = self.num_train // plan.batch_size
    self._plan = plan
    self._subsets = {
      "train": Subset(source.train, split.train),
      "val": Subset(source.train, split.val),
      "test": Subset(source.test or source.train, split.test),
    }

  def train_batches(self, epoch: int, start: int = 0) -> Iterator[types.Batch]:
    """Yield an epoch's batches; see Dataset."""
    if not 0 <= start <= self.steps_per_epoch:
      raise types.InputError(
        f"start is {start}, but an epoch has {self.steps_per_epoch} steps"
      )
    return self._train_batches(epoch, start)

  def eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    """Yield every image of a split once; see Dataset."""
    if split not in ("val", "test"):
      raise types.InputError(f"split {split!r} is unknown; possible: val, test")
    return self._eval_batches(split)

  def _train_batches(self, epoch: int, start: int) -> Iterator[types.Batch]:
    raise NotImplementedError

  def _eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    raise NotImplementedError
