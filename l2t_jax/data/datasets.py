"""Assignment of images to batches, shared by in-memory and streamed data sets.

Every random draw depends on (seed, epoch, step) alone: a run can stop anywhere
and resume with the same batches, and each process yields its own rows of the
global batches. Unlabelled images form a single stream over all epochs: one
random permutation after another, cut into one batch per training step.
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

# Smallest and largest evaluation batch. The size does not affect the results,
# but larger batches are faster. In between, a limit on the pixels per batch
# applies.
EVAL_BATCH_SIZES = (128, 512)
_EVAL_PIXELS = 512 * 32**2
# Folded into the seed's PRNG key for unlabelled images, where labelled images
# fold in the epoch: this keeps their augmentations independent. Initialisation
# folds in 2**32 - 1.
NO_EPOCH = 2**32 - 2
# Last numbers of the entropy of NumPy's generators, (seed, _, _, STREAM), which
# keep the streams apart from each other and from the order and the crops of
# labelled images, which have fewer numbers.
UNLABELED, UNLABELED_CROPS, MIXING, OUTER = 1, 2, 3, 4
# Images of a subset, evenly spaced, that enter its fingerprint.
_NUM_FINGERPRINTED = 1_000


class Subset(NamedTuple):
  """The images of one split, or the unlabelled images."""

  records: records.Records
  indices: np.ndarray  # [N] int64, into records.
  channels: int  # Images are converted to grey (1) or RGB (3).
  bit_depth: int = 16  # Significant bits of 16-bit images.
  # [N, H, W, C], resized, in the order of `indices`; None if not in memory.
  pixels: np.ndarray | None = None

  @property
  def dtype(self) -> np.dtype:
    """Pixel type before normalisation: uint8 for files, else the array's."""
    pixels = self.records.pixels
    return np.dtype(np.uint8) if pixels is None else pixels.dtype

  @property
  def white(self) -> int:
    """The pixel value that normalisation scales to 1."""
    return augmentation.white(self.dtype, self.bit_depth)

  @property
  def values(self) -> tuple[float, float]:
    """Range (minimum, maximum) of float arrays; (0, 1) for other types."""
    pixels = self.records.pixels
    if pixels is None or self.dtype != np.float32:
      return (0.0, 1.0)
    return float(pixels.min()), float(pixels.max())

  @property
  def labels(self) -> np.ndarray:
    """Class labels, int32 [N]."""
    return self.records.labels[self.indices]

  @property
  def targets(self) -> np.ndarray:
    """The labels that batches hold, [N, ...]: classes, or other targets."""
    if self.records.targets is None:
      return self.labels
    return self.records.targets[self.indices]

  def read(
    self, position: int, transform: Callable[[Image.Image], Image.Image]
  ) -> np.ndarray:
    """Read and transform the image at a position from 0 to N - 1.

    Returns:
      Pixels of type `dtype`, [H, W, C].
    """
    image = self.records.read_image(int(self.indices[position]))
    return self.to_pixels(image, transform)

  def to_pixels(
    self,
    image: Image.Image | np.ndarray,
    transform: Callable[[Image.Image], Image.Image],
  ) -> np.ndarray:
    """Convert and transform a decoded image; return `dtype` [H, W, C]."""
    pixels = self.records.pixels
    # Pillow has no mode for such arrays: transform each channel on its own.
    if pixels is not None and not pillow.is_grey_or_rgb(pixels):
      return pillow.transform_channels(np.asarray(image), transform)
    converted = pillow.convert(image, self.channels, self.bit_depth)
    return pillow.to_array(transform(converted))


class BatchPlan(NamedTuple):
  """The global batch size, and the rows of a batch that this process holds."""

  batch_size: int  # Of the global batch, over all processes.
  process_index: int
  process_count: int

  def check(self, name: str) -> None:
    """Check that processes can share batches; `name` is the field's name."""
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
    """Return the row numbers, int64 [b], of this process in a step.

    Rows are numbered consecutively over all steps.
    """
    first = step * self.batch_size
    return np.arange(first + self.rows.start, first + self.rows.stop)

  def num_eval_steps(self, num_images: int) -> int:
    """Return the number of batches that cover all images."""
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
  notes: tuple[str, ...]  # Notes about the images for the user.
  skipped: tuple[str, ...]  # Names of unreadable images, which are left out.
  plan: BatchPlan
  unlabeled_plan: BatchPlan
  has_outer: bool  # Whether training batches hold images of the outer loss.
  mean: tuple[float, ...]  # Pixel mean: one value, or one per channel.
  std: tuple[float, ...]  # Pixel standard deviation, in the same form.
  seed: int  # Decides the order of training images and their augmentation.


def _eval_batch_size(plan, num_images, image_shape):
  """Return one size for val and test, so that they share a compiled program."""
  height, width, _ = image_shape
  smallest, largest = EVAL_BATCH_SIZES
  size = min(largest, max(smallest, _EVAL_PIXELS // (height * width)))
  size = min(size, max(num_images, 1))
  # A multiple of the training batch, so that it can be sharded over the same
  # number of devices.
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

  Training batches may hold unlabelled images and validation images for the
  outer loss in addition to the labelled ones.

  Attributes:
    class_names: one name per class.
    dtype: NumPy type of the pixels before normalisation.
    bit_depth: significant bits of 16-bit images.
    mean: pixel mean for normalisation; one value, or one per channel.
    std: pixel standard deviation, in the same form.
    values: range (minimum, maximum) of float arrays; (0, 1) for other types.
    mixes: whether mixup or CutMix applies to training batches.
    num_classes: number of classes.
    num_labels: num_classes; for other targets, their maximum + 1.
    label_shape: shape of the label of one image; () for a class.
    label_dtype: NumPy type of the labels.
    image_shape: (H, W, C).
    num_train: number of labelled training images.
    num_val: number of validation images; 0 without a validation set.
    num_test: number of test images.
    num_unlabeled: number of unlabelled images; 0 without any.
    skipped: names of unreadable images, which are left out.
    num_eval_rows: rows of an evaluation batch per process.
    split_hash: 16 hex digits of the indices of the labelled images.
    fingerprint: 16 hex digits of the indices, labels and images in use.
    notes: notes about the images and the split for the user.
    steps_per_epoch: full training batches per epoch; an incomplete last batch
      is dropped.
  """

  def __init__(self, contents: Contents, fields: data_fields.DataFields):
    """Set the attributes that do not depend on how images are read."""
    self._subsets = contents.subsets
    train, val, test = (
      self._subsets[name] for name in ("train", "val", "test")
    )
    sizes = [len(subset.indices) for subset in (train, val, test)]
    self._seed = contents.seed
    self._plan = contents.plan
    self._unlabeled_plan = contents.unlabeled_plan
    self._has_outer = contents.has_outer
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
    # Without the unlabelled images, which some methods do not read.
    self.split_hash = splits.split_hash(
      self._subsets[name].indices for name in ("train", "val", "test")
    )
    self.fingerprint = fingerprints.fingerprint(
      {name: _sample(subset) for name, subset in self._subsets.items()}
    )
    self.notes = (*contents.notes, *self._missing_classes())
    self.steps_per_epoch = self.num_train // self._plan.batch_size

  @abc.abstractmethod
  def train_batches(self, epoch: int, start: int = 0) -> Iterator[types.Batch]:
    """Yield the training batches of an epoch, in a new random order per epoch.

    Args:
      epoch: counted from 0; with the seed, it determines the order and the
        augmentation.
      start: number of steps to skip, to resume; later batches do not change.

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
      The data set that `load` would return for this seed; images in memory are
      shared, not copied.
    """
    dataset = copy.copy(self)
    dataset._seed = seed
    return dataset

  def _draw_mixing(self, epoch: int, step: int) -> types.Mixing | None:
    """Draw the mixing of this process's rows of a batch, or return None."""
    if not self.mixes:
      return None
    # Drawn for the global batch, so that the number of processes has no effect.
    drawn = mixing.draw(
      np.random.default_rng((self._seed, epoch, step, MIXING)),
      self._plan.batch_size,
      self.image_shape[:2],
      mixup=self._mixup,
      cutmix=self._cutmix,
    )
    rows = self._plan.rows
    return types.Mixing(drawn.share[rows], drawn.box[rows])

  def _missing_classes(self) -> Iterator[str]:
    """Yield a note for each evaluation split that lacks images of a class."""
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


def stream_positions(
  seed: int, slots: np.ndarray, num_images: int, *, stream: int
) -> np.ndarray:
  """Return the images at the given slots of a stream of permutations.

  Args:
    seed: seed of the stream.
    slots: consecutive numbers, int64 [u], counted from the start of training;
      u may exceed the number of images.
    num_images: N, the length of each of the stream's permutations.
    stream: `UNLABELED` or `OUTER`.

  Returns:
    Positions from 0 to N - 1, int64 [u].
  """
  first, last = slots[0] // num_images, slots[-1] // num_images
  passes = [
    _permutation((seed, number, 0, stream), num_images)
    for number in range(first, last + 1)
  ]
  return np.concatenate(passes)[slots - first * num_images]


# Cached, because streamed batches look up the permutation in every step. The
# size suffices for a few seeds that train together, at the end of an epoch.
@functools.lru_cache(maxsize=8)
def _permutation(entropy: tuple[int, ...], num_images: int) -> np.ndarray:
  return np.random.default_rng(entropy).permutation(num_images)


def _sample(subset: Subset) -> tuple[Any, ...]:
  """Return what enters a subset's fingerprint: indices, labels, some pixels.

  Image files are not read for this.
  """
  sample = (subset.indices, subset.targets)
  if subset.records.pixels is None:
    return sample
  stride = -(-len(subset.indices) // _NUM_FINGERPRINTED) or 1
  return (*sample, subset.records.pixels[subset.indices[::stride]])
