"""Which images are in which batch, for both ways of reading them.

Every draw depends on (seed, epoch, step) alone: a run can stop anywhere and go
on with the same batches, and each process yields its rows of global batches.
Images without labels are one stream, whatever the epochs: permutation after
permutation, cut into a batch for each step of the whole training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import copy
import functools
import hashlib
from typing import NamedTuple, Protocol, Self

import numpy as np
from PIL import Image

from l2t_jax import errors, types
from l2t_jax.data import pillow, records, splits

# Evaluation batches are at least this large: faster than the small batches that
# some trainings want, with the same results.
MIN_EVAL_BATCH_SIZE = 128
# How many images of a split, evenly spaced, are looked at to tell it apart.
_NUM_FINGERPRINTED = 1_000


class Dataset(Protocol):
  """Labelled images in three splits, as batches on the device.

  Training batches may hold images without labels beside the labelled ones.
  """

  num_classes: int
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # (H, W, C).
  label_shape: tuple[int, ...]  # Of one image; () for a class.
  label_dtype: np.dtype
  num_labels: int  # Classes, where labels are classes.
  num_train: int
  num_val: int  # 0 where no validation images were asked for.
  num_test: int
  num_unlabeled: int  # 0 where batches hold only labelled images.
  split_hash: str  # 16 hex digits of the indices in use.
  fingerprint: str  # 16 hex digits of the images and labels in use.
  notes: tuple[str, ...]  # What the user should be told of the split.
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

  def with_seed(self, seed: int) -> Dataset:
    """Return the same images and split with another order and augmentation.

    Args:
      seed: as `load` takes it.

    Returns:
      What `load` would return; images in memory are shared, not copied.

    Raises:
      errors.InputError: the seed is negative.
    """


class Subset(NamedTuple):
  """The images of one split, or those without labels."""

  records: records.Records
  indices: np.ndarray  # [N] int64, into records.

  @property
  def labels(self) -> np.ndarray:
    """Labels int32 [N]."""
    return self.records.labels[self.indices]

  @property
  def targets(self) -> np.ndarray:
    """What batches hold as labels, [N, ...]: the classes or something else."""
    if self.records.targets is None:
      return self.labels
    return self.records.targets[self.indices]

  def read_image(self, position: int, *, channels: int) -> Image.Image:
    """Read the image at a position from 0 to N - 1, grey or RGB."""
    image = self.records.read_image(int(self.indices[position]))
    return pillow.convert(image, channels)


class BatchPlan(NamedTuple):
  """How large batches are, and which rows of them are this process's."""

  batch_size: int  # Over all processes.
  process_index: int
  process_count: int

  @property
  def rows(self) -> slice:
    """This process's rows of every global batch."""
    size = self.batch_size // self.process_count
    return slice(self.process_index * size, (self.process_index + 1) * size)

  def slots(self, step: int) -> np.ndarray:
    """Number this process's rows of a step, counted on, int64 [b]."""
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


class Contents(NamedTuple):
  """What a Dataset holds, and how it is cut into batches."""

  source: records.ImageSet
  split: splits.Split
  unlabeled: Subset | None
  plan: BatchPlan
  unlabeled_plan: BatchPlan
  seed: int  # Of the order of training images and their augmentation.
  image_shape: tuple[int, int, int]  # (H, W, C).


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
  """Return an epoch's permutation of the labelled images, int64 [N]."""
  return _permutation((seed, epoch), num_images)


def unlabeled_positions(
  seed: int, slots: np.ndarray, num_images: int
) -> np.ndarray:
  """Return which images without labels are at some slots of their stream.

  Args:
    seed: of the stream.
    slots: from 0 at the start of training, without gaps, int64 [u]; possibly
      more than there are images.
    num_images: N, the length of each of the stream's permutations.

  Returns:
    Positions from 0 to N - 1, int64 [u].
  """
  first, last = slots[0] // num_images, slots[-1] // num_images
  passes = [
    # Labelled images' draws have two or three numbers: none is like these.
    _permutation((seed, number, 0, 1), num_images)
    for number in range(first, last + 1)
  ]
  return np.concatenate(passes)[slots - first * num_images]


# As many as are in use where epochs and passes end, for a few seeds.
@functools.lru_cache(maxsize=8)
def _permutation(entropy: tuple[int, ...], num_images: int) -> np.ndarray:
  return np.random.default_rng(entropy).permutation(num_images)


def _fingerprint(split_hash: str, subsets: Iterable[Subset]) -> str:
  """Tell contents apart: by all labels and, of arrays, by some images."""
  digest = hashlib.sha256(split_hash.encode())
  for subset in subsets:
    digest.update(subset.targets.tobytes())
    pixels = subset.records.pixels
    if pixels is not None:
      every = -(-len(subset.indices) // _NUM_FINGERPRINTED) or 1
      digest.update(pixels[subset.indices[::every]].tobytes())
  return digest.hexdigest()[:16]


def check_counts(**counts: int) -> None:
  """Raise an InputError for a value below 0."""
  for what, count in counts.items():
    if count < 0:
      raise errors.InputError(f"{what} is {count}, but must be 0 or more")


class SplitDataset:
  """The part of a Dataset that does not depend on how images are read."""

  def __init__(self, contents: Contents):
    source, split, unlabeled, plan, unlabeled_plan, seed, image_shape = contents
    self.num_classes = len(source.class_names)
    self.class_names = source.class_names
    self.image_shape = image_shape
    self.num_train, self.num_val, self.num_test = map(len, split)
    self.num_unlabeled = 0
    self.split_hash = splits.split_hash(split)
    self.steps_per_epoch = self.num_train // plan.batch_size
    self._seed = seed
    self._plan = plan
    self._unlabeled_plan = unlabeled_plan
    # A multiple: the devices that divide the one size divide the other, too.
    factor = -(-MIN_EVAL_BATCH_SIZE // plan.batch_size)
    self._eval_plan = plan._replace(batch_size=factor * plan.batch_size)
    self._subsets = {
      "train": Subset(source.train, split.train),
      "val": Subset(source.train, split.val),
      "test": Subset(source.test or source.train, split.test),
    }
    if unlabeled is not None:
      self._subsets["unlabeled"] = unlabeled
      self.num_unlabeled = len(unlabeled.indices)
      self.split_hash = splits.split_hash((*split, unlabeled.indices))
    self.fingerprint = _fingerprint(self.split_hash, self._subsets.values())
    self.notes = tuple(self._missing_classes())
    targets = self._subsets["train"].targets
    self.label_shape, self.label_dtype = targets.shape[1:], targets.dtype
    self.num_labels = self.num_classes
    if source.train.targets is not None:
      self.num_labels = 1 + int(source.train.targets.max(initial=0))

  def train_batches(self, epoch: int, start: int = 0) -> Iterator[types.Batch]:
    """Yield an epoch's batches; see Dataset."""
    if not 0 <= start <= self.steps_per_epoch:
      raise errors.InputError(
        f"start is {start}, but an epoch has {self.steps_per_epoch} steps"
      )
    return self._train_batches(epoch, start)

  def eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    """Yield every image of a split once; see Dataset."""
    if split not in ("val", "test"):
      raise errors.InputError(
        f"split {split!r} is unknown; possible: val, test"
      )
    return self._eval_batches(split)

  def with_seed(self, seed: int) -> Self:
    """Return the same images in another order; see Dataset."""
    check_counts(seed=seed)
    dataset = copy.copy(self)
    dataset._seed = seed
    return dataset

  def _missing_classes(self) -> Iterator[str]:
    for part, what in (("val", "validation"), ("test", "test")):
      subset = self._subsets[part]
      if subset.records.targets is not None or not len(subset.indices):
        continue
      missing = splits.without_images(self.class_names, subset.labels)
      if missing:
        yield (
          f"no {what} images of {len(missing)} of {self.num_classes} classes:"
          f" {records.some_of(missing)}"
        )

  def _train_batches(self, epoch: int, start: int) -> Iterator[types.Batch]:
    raise NotImplementedError

  def _eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    raise NotImplementedError
