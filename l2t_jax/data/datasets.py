"""Which images are in which batch, whether they are in memory or streamed.

Every random draw depends on (seed, epoch, step) alone: a run can stop anywhere
and resume with the same batches, and each process yields its rows of the global
batches. Images without labels are one stream over all epochs: permutation after
permutation, cut into one batch per step of the whole training.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
import copy
import functools
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from l2t_jax import errors, fingerprints, types
from l2t_jax.data import augmentation, data_fields, pillow, records, splits
from l2t_jax.method import mixing

# The smallest and the largest evaluation batch: large ones are faster, the
# results are the same. How many pixels one may hold decides in between.
EVAL_BATCH_SIZES = (128, 512)
_EVAL_PIXELS = 512 * 32**2
# In place of an epoch, in the key of images without labels; another such number
# is in the key of the initial values.
NO_EPOCH = 2**32 - 2
# How many images of a subset, evenly spaced, count in its fingerprint.
_NUM_FINGERPRINTED = 1_000


class Subset(NamedTuple):
  """The images of one split, or those without labels."""

  records: records.Records
  indices: np.ndarray  # [N] int64, into records.
  channels: int  # Grey images become RGB (3), RGB images grey (1).
  bit_depth: int = 16  # Of images with more than 8 bits.
  # The images as in batches, [N, H, W, C], if they stay in memory.
  pixels: np.ndarray | None = None

  @property
  def dtype(self) -> np.dtype:
    """Type of the pixels in batches: uint8, or as in the data set's arrays."""
    pixels = self.records.pixels
    return np.dtype(np.uint8) if pixels is None else pixels.dtype

  @property
  def white(self) -> int:
    """The value of a pixel that is 1 for normalisation."""
    return augmentation.white(self.dtype, self.bit_depth)

  @property
  def values(self) -> tuple[float, float]:
    """The smallest and the largest value of arrays of floats; else (0, 1)."""
    pixels = self.records.pixels
    if pixels is None or self.dtype != np.float32:
      return (0.0, 1.0)
    return float(pixels.min()), float(pixels.max())

  @property
  def labels(self) -> np.ndarray:
    """Labels int32 [N]."""
    return self.records.labels[self.indices]

  @property
  def targets(self) -> np.ndarray:
    """What batches hold as labels, [N, ...]: classes, or other targets."""
    if self.records.targets is None:
      return self.labels
    return self.records.targets[self.indices]

  def read(
    self, position: int, transform: Callable[[Image.Image], Image.Image]
  ) -> np.ndarray:
    """Read the image at a position from 0 to N - 1, transformed.

    Returns:
      `dtype` [H, W, C].
    """
    image = self.records.read_image(int(self.indices[position]))
    return self.to_pixels(image, transform)

  def to_pixels(
    self,
    image: Image.Image | np.ndarray,
    transform: Callable[[Image.Image], Image.Image],
  ) -> np.ndarray:
    """Convert and transform an image that was read, `dtype` [H, W, C]."""
    pixels = self.records.pixels
    if pixels is not None and not pillow.is_grey_or_rgb(pixels):
      return pillow.transform_channels(np.asarray(image), transform)
    converted = pillow.convert(image, self.channels, self.bit_depth)
    return pillow.to_array(transform(converted))


class BatchPlan(NamedTuple):
  """How large batches are, and which of their rows this process has."""

  batch_size: int  # Over all processes.
  process_index: int
  process_count: int

  def check(self, name: str) -> None:
    """Refuse a batch size, from the field `name`, that no run can have."""
    if self.batch_size < 1 or self.batch_size % self.process_count:
      raise errors.InputError(
        f"{name} is {self.batch_size}, but must be a positive multiple of the"
        f" number of processes, {self.process_count}"
      )

  @property
  def rows(self) -> slice:
    """This process's rows of every global batch."""
    size = self.batch_size // self.process_count
    return slice(self.process_index * size, (self.process_index + 1) * size)

  def slots(self, step: int) -> np.ndarray:
    """Return the numbers, int64 [b], of this process's rows of a step.

    The rows of all steps are numbered in one sequence.
    """
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
  """The images of a Dataset, and how they are cut into batches."""

  subsets: Mapping[str, Subset]  # train, val, test; unlabeled if there are any.
  class_names: tuple[str, ...]
  notes: tuple[str, ...]  # What the user should know about the images.
  skipped: tuple[str, ...]  # Names of the images that cannot be read.
  plan: BatchPlan
  unlabeled_plan: BatchPlan
  mean: tuple[float, ...]  # Of the pixels: one value, or one per channel.
  std: tuple[float, ...]
  seed: int  # Decides the order of training images and their augmentation.


def _eval_batch_size(plan, num_images, image_shape):
  """Return one size for both splits, so that one program evaluates them."""
  height, width, _ = image_shape
  smallest, largest = EVAL_BATCH_SIZES
  size = min(largest, max(smallest, _EVAL_PIXELS // (height * width)))
  size = min(size, max(num_images, 1))
  # A multiple, so that devices which divide one size divide the other.
  return -(-size // plan.batch_size) * plan.batch_size


def _make_policy(fields, contents, white):
  crops = fields.augment in ("crop", "crop_flip")
  return augmentation.Policy(
    contents.mean,
    contents.std,
    white,
    padding=fields.crop_padding if crops else None,
    flips=fields.augment == "crop_flip",
    num_ops=fields.rand_augment,
    magnitude=fields.rand_augment_magnitude,
    color_jitter=fields.color_jitter,
    random_erasing=fields.random_erasing,
  )


class Dataset(abc.ABC):
  """Labelled images in three splits, as batches on the device.

  Training batches may hold images without labels beside the labelled ones.

  Attributes:
    class_names: one per class.
    dtype: of the pixels before they are normalised.
    bit_depth: of images with more than 8 bits.
    mean: of the pixels, for normalisation; one value or one per channel.
    std: the same for the standard deviation.
    values: the smallest and largest value of arrays of floats; else (0, 1).
    mixes: whether the images of a training batch are to be mixed.
    num_classes: number of classes.
    num_labels: num_classes; for other targets, one more than the largest.
    label_shape: shape of the label of one image; () for a class.
    label_dtype: NumPy type of the labels.
    image_shape: (H, W, C).
    num_train: number of labelled training images.
    num_val: 0 if no validation images were asked for.
    num_test: number of test images.
    num_unlabeled: 0 if batches hold only labelled images.
    skipped: names of the images that cannot be read and are left out.
    num_eval_rows: this process's rows of an evaluation batch.
    split_hash: 16 hex digits of the indices in use.
    fingerprint: 16 hex digits of the indices, labels and images in use.
    notes: what the user should know about the images and the split.
    steps_per_epoch: number of whole training batches; the smaller batch that
      remains is dropped.
  """

  def __init__(self, contents: Contents, fields: data_fields.DataFields):
    """Set what does not depend on how images are read."""
    self._subsets = contents.subsets
    train, val, test = (
      self._subsets[name] for name in ("train", "val", "test")
    )
    sizes = [len(subset.indices) for subset in (train, val, test)]
    self._seed = contents.seed
    self._plan = contents.plan
    self._unlabeled_plan = contents.unlabeled_plan
    self._eval_plan = self._plan._replace(
      batch_size=_eval_batch_size(
        self._plan, max(sizes[1:]), fields.image_shape
      )
    )
    self._eval_resize = data_fields.make_eval_resize(
      fields.image_size, fields.eval_resize, fields.in_memory
    )
    self.class_names = contents.class_names
    self.num_classes = len(self.class_names)
    self.num_labels = self.num_classes
    if train.records.targets is not None:
      self.num_labels = 1 + int(train.records.targets.max(initial=0))
    self.label_shape = train.targets.shape[1:]
    self.label_dtype = train.targets.dtype
    self.image_shape = fields.image_shape
    self.dtype, self.bit_depth = train.dtype, train.bit_depth
    self.mean, self.std = contents.mean, contents.std
    self.values = train.values
    self._policy = _make_policy(fields, contents, train.white)
    self._mixup, self._cutmix = fields.mixup, fields.cutmix
    self.mixes = bool(fields.mixup or fields.cutmix)
    self.num_train, self.num_val, self.num_test = sizes
    self.num_unlabeled = 0
    if "unlabeled" in self._subsets:
      self.num_unlabeled = len(self._subsets["unlabeled"].indices)
    self.skipped = contents.skipped
    self.num_eval_rows = len(self._eval_plan.slots(0))
    self.split_hash = splits.split_hash(
      subset.indices for subset in self._subsets.values()
    )
    self.fingerprint = fingerprints.fingerprint(
      {name: _sample(subset) for name, subset in self._subsets.items()}
    )
    self.notes = (*contents.notes, *self._missing_classes())
    self.steps_per_epoch = self.num_train // self._plan.batch_size

  @abc.abstractmethod
  def train_batches(self, epoch: int, start: int = 0) -> Iterator[types.Batch]:
    """Yield the batches of an epoch, in a random order of the epoch's own.

    Args:
      epoch: from 0; with the seed it decides order and augmentation.
      start: number of steps to skip; the others stay the same.

    Yields:
      This process's rows of each global batch.
    """

  @abc.abstractmethod
  def eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    """Yield every image of a split once, in a fixed order.

    Args:
      split: 'val' or 'test'.

    Yields:
      This process's rows of each global batch; padding has mask 0.
    """

  def with_seed(self, seed: int) -> Self:
    """Return the same images and split with another order and augmentation.

    Args:
      seed: the seed that `load` takes.

    Returns:
      What `load` would return; images in memory are shared, not copied.
    """
    dataset = copy.copy(self)
    dataset._seed = seed
    return dataset

  def _draw_mixing(self, epoch: int, step: int) -> types.Mixing | None:
    """Draw how this process's rows of a batch are mixed, if they are."""
    if not self.mixes:
      return None
    drawn = mixing.draw(
      # No other draw has an entropy that ends like this.
      np.random.default_rng((self._seed, epoch, step, 3)),
      self._plan.batch_size,
      self.image_shape[:2],
      mixup=self._mixup,
      cutmix=self._cutmix,
    )
    rows = self._plan.rows
    return types.Mixing(drawn.share[rows], drawn.box[rows])

  def _missing_classes(self) -> Iterator[str]:
    """Yield a note per evaluation split in which classes have no images."""
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


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
  """Return an epoch's permutation of the labelled images, int64 [N]."""
  return _permutation((seed, epoch), num_images)


def unlabeled_positions(
  seed: int, slots: np.ndarray, num_images: int
) -> np.ndarray:
  """Return which images without labels are at some slots of their stream.

  Args:
    seed: seed of the stream.
    slots: consecutive numbers, int64 [u], counted from the start of training;
      possibly more than there are images.
    num_images: N, the length of each of the stream's permutations.

  Returns:
    Positions from 0 to N - 1, int64 [u].
  """
  first, last = slots[0] // num_images, slots[-1] // num_images
  passes = [
    # No other draw has an entropy that ends like this.
    _permutation((seed, number, 0, 1), num_images)
    for number in range(first, last + 1)
  ]
  return np.concatenate(passes)[slots - first * num_images]


# A few seeds that train together use this many at once when an epoch ends.
@functools.lru_cache(maxsize=8)
def _permutation(entropy: tuple[int, ...], num_images: int) -> np.ndarray:
  return np.random.default_rng(entropy).permutation(num_images)


def _sample(subset: Subset) -> tuple[Any, ...]:
  """Return what tells subsets apart: indices, labels and some of the pixels.

  Image files are not read for this.
  """
  sample = (subset.indices, subset.targets)
  if subset.records.pixels is None:
    return sample
  stride = -(-len(subset.indices) // _NUM_FINGERPRINTED) or 1
  return (*sample, subset.records.pixels[subset.indices[::stride]])
