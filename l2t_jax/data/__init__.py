"""Images as batches: `load` opens a data set and splits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from l2t_jax import errors
from l2t_jax.data import (
  bundled,
  datasets,
  formats,
  from_arrays,
  from_folders,
  from_tfds,
  memory,
  pillow,
  records,
  splits,
  streaming,
)
from l2t_jax.data.datasets import Dataset

ImageSet = records.ImageSet


class DataFields(NamedTuple):
  source: str
  name: str
  path: str
  classes: tuple
  image_size: int
  channels: int
  mean: tuple
  std: tuple
  augment: str
  crop_padding: int
  eval_resize: int
  split_file: str
  split_prefix: str
  val_fraction: float
  test_fraction: float
  split_seed: int
  per_class: int
  unlabeled: bool
  unlabeled_path: str
  unlabeled_batch_size: int
  num_workers: int


def open_images(fields):
  return open_source(fields.source, name=fields.name, path=fields.path)


def load(fields, *, images=None, **options):
  values = fields._asdict()
  return load_(values.pop("source"), **values, **options, opened=images)


# Larger images are streamed unless the caller says otherwise.
MAX_IN_MEMORY_SIZE = 96


def load_(
  source: str,
  *,
  name: str,
  path: str,
  classes: Sequence[int],
  image_size: int,
  channels: int,
  mean: Sequence[float],
  std: Sequence[float],
  augment: str,
  crop_padding: int = 4,
  eval_resize: int,
  split_file: str,
  split_prefix: str,
  val_fraction: float,
  test_fraction: float,
  split_seed: int,
  per_class: int,
  unlabeled: bool,
  unlabeled_path: str,
  unlabeled_batch_size: int,
  batch_size: int,
  seed: int,
  num_workers: int,
  in_memory: bool | None = None,
  process_index: int = 0,
  process_count: int = 1,
  opened: records.ImageSet | None = None,
) -> Dataset:
  """Open a data set.

  Args:
    source: 'bundled', 'npz', 'folder' or 'tfds'.
    name: of the bundled set ('mnist', 'digits') or the tfds set; else unused.
    path: the npz file, the folder, or tfds's data directory ('' for its own
      default); unused by bundled sets.
    classes: published labels to keep, renumbered in this order; () for all.
    image_size: side of the square images.
    channels: 1 for grey, 3 for RGB; images are converted.
    mean: one value or one per channel, subtracted on the scale from 0 to 1.
    std: likewise, what images are divided by.
    augment: in memory 'none', 'crop' or 'crop_flip'; streaming 'none' or
      'random_resized_crop_flip'.
    crop_padding: black border around images before 'crop' and 'crop_flip'.
    eval_resize: length of the short side before the central crop, 0 for 8/7 of
      image_size; streaming only (in memory the whole image is resized to the
      square).
    split_file: npz file with {split_prefix}_train, _val and _test: indices into
      this source's own order, which for tfds is not the official one, since it
      shuffles; '' to draw the split.
    split_prefix: see split_file.
    val_fraction: share of the training images that validate; used where there
      is neither a split file nor an official validation set.
    test_fraction: the same for the test.
    split_seed: of the drawn split and of the choice of per_class images.
    per_class: training images to keep of each class; 0 for all. Validation and
      test images do not depend on it.
    unlabeled: whether batches also hold images without labels: training images
      of the kept classes that per_class left over, never one of val or test.
      Labelled images and the length of an epoch do not depend on it.
    unlabeled_path: a folder of images to take instead, in any subfolders; ''
      for the images left over. Nothing compares them with val and test.
    unlabeled_batch_size: of images without labels in a batch, over all
      processes; 0 for batch_size.
    batch_size: of labelled images, over all processes; evaluation batches are
      the smallest multiple that is at least datasets.MIN_EVAL_BATCH_SIZE.
    seed: of the order of training images and their augmentation.
    num_workers: processes that read training images when streaming; 0 for
      threads of this process.
    in_memory: whether to keep all images on the device; by default, if they
      are small.
    process_index: of this process among those that train together.
    process_count: how many of them there are.
    opened: images and labels that are there already, in the place of what
      source, name and path say.

  Returns:
    The data set; each process gets its own rows of the global batches.

  Raises:
    errors.InputError: a value is wrong, or the data set is missing or
      malformed.
  """
  if in_memory is None:
    in_memory = image_size <= MAX_IN_MEMORY_SIZE
  mean, std = tuple(mean), tuple(std)
  eval_resize = resized_for_evaluation(image_size, eval_resize, in_memory)
  _check_images(image_size, channels, mean, std)
  _check_reading(in_memory, augment, image_size, eval_resize, crop_padding)
  datasets.check_counts(
    seed=seed,
    split_seed=split_seed,
    per_class=per_class,
    num_workers=num_workers,
    unlabeled_batch_size=unlabeled_batch_size,
  )
  _check_batches(batch_size, process_index, process_count)
  _check_unlabeled(
    unlabeled, unlabeled_path, unlabeled_batch_size, per_class, process_count
  )
  if opened is None:
    opened = open_source(source, name=name, path=path)
  opened = records.keep_classes(opened, classes)
  full_split = splits.make_split(
    opened,
    split_file=split_file,
    split_prefix=split_prefix,
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
  )
  _check_targets(opened, augment)
  if opened.train.targets is None:
    splits.check_classes(full_split, opened)
  split = full_split
  if per_class:
    split = splits.keep_per_class(
      full_split, opened, per_class=per_class, seed=split_seed
    )
  if len(split.train) < batch_size:
    raise errors.InputError(
      f"batch_size is {batch_size}, but there are only {len(split.train)}"
      " training images"
    )
  subset = None
  if unlabeled_path:
    folder = from_folders.open_unlabeled(unlabeled_path)
    subset = datasets.Subset(folder, np.arange(len(folder.labels)))
  elif unlabeled:
    left_over = np.setdiff1d(full_split.train, split.train)
    if not len(left_over):
      raise errors.InputError(
        f"per_class is {per_class} and leaves no images over for unlabeled;"
        " lower it or give an unlabeled_path"
      )
    subset = datasets.Subset(opened.train, left_over)
  build = (
    functools.partial(memory.InMemoryDataset, crop_padding=crop_padding)
    if in_memory
    else functools.partial(
      streaming.StreamingDataset,
      eval_resize=eval_resize,
      num_workers=num_workers,
    )
  )
  plan = datasets.BatchPlan(batch_size, process_index, process_count)
  return build(
    datasets.Contents(
      opened,
      split,
      subset,
      plan,
      plan._replace(batch_size=unlabeled_batch_size or batch_size),
      seed,
      (image_size, image_size, channels),
    ),
    mean=mean,
    std=std,
    augment=augment,
  )


def make_eval_resize(
  image_size: int, eval_resize: int, in_memory: bool | None = None
) -> Callable[[Image.Image], Image.Image]:
  """Return what gives an image the size that evaluation sees; see `load`."""
  resized = resized_for_evaluation(image_size, eval_resize, in_memory)
  if not resized:
    return functools.partial(pillow.resize, width=image_size, height=image_size)
  return functools.partial(
    pillow.resize_and_center_crop, resized=resized, size=image_size
  )


def resized_for_evaluation(
  image_size: int, eval_resize: int, in_memory: bool | None = None
) -> int:
  """Return the short side before the central crop, 0 for none; see `load`."""
  if in_memory is None:
    in_memory = image_size <= MAX_IN_MEMORY_SIZE
  return 0 if in_memory else eval_resize or round(image_size * 8 / 7)


def _check_images(
  image_size: int,
  channels: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> None:
  if image_size < 1:
    raise errors.InputError(f"image_size is {image_size}, but must be positive")
  if channels not in (1, 3):
    raise errors.InputError(
      f"channels is {channels}, but must be 1 (grey) or 3 (RGB)"
    )
  for what, values in (("mean", mean), ("std", std)):
    if len(values) not in (1, channels):
      raise errors.InputError(
        f"{what} {values} must have 1 or channels={channels} values"
      )
  formats.check_normalisation("", mean, std)


def _check_reading(
  in_memory: bool,
  augment: str,
  image_size: int,
  eval_resize: int,
  crop_padding: int,
) -> None:
  possible = memory.AUGMENTS if in_memory else streaming.AUGMENTS
  if augment not in possible:
    raise errors.InputError(
      f"augment {augment!r} is not possible when images are"
      f" {'in memory' if in_memory else 'streamed'}; possible:"
      f" {', '.join(possible)}"
    )
  if crop_padding < 0:
    raise errors.InputError(f"crop_padding is {crop_padding}, below 0")
  if not in_memory and eval_resize < image_size:
    raise errors.InputError(
      f"eval_resize is {eval_resize}, but must be at least"
      f" image_size={image_size}"
    )


def _check_targets(source: records.ImageSet, augment: str) -> None:
  targets = source.train.targets
  if targets is None:
    return
  if source.test is not None and (
    source.test.targets is None
    or source.test.targets.shape[1:] != targets.shape[1:]
  ):
    raise errors.InputError(
      f"the training images have targets of shape {list(targets.shape[1:])},"
      " but the test images do not"
    )
  if targets.ndim > 2 and augment != "none":
    raise errors.InputError(
      f"augment is {augment!r} and would move the images, but not their targets"
      f" of shape {list(targets.shape[1:])}; use 'none'"
    )


def _check_batches(
  batch_size: int, process_index: int, process_count: int
) -> None:
  if batch_size < 1 or batch_size % process_count:
    raise errors.InputError(
      f"batch_size is {batch_size}, but must be a positive multiple of the"
      f" number of processes, {process_count}"
    )
  if not 0 <= process_index < process_count:
    raise errors.InputError(
      f"process_index is {process_index}, but must be from 0 to"
      f" {process_count - 1}"
    )


def _check_unlabeled(
  unlabeled: bool,
  path: str,
  batch_size: int,
  per_class: int,
  process_count: int,
) -> None:
  if path and not unlabeled:
    raise errors.InputError(
      f"unlabeled_path is {path!r}, but unlabeled is False; set it to True or"
      " the path to ''"
    )
  if unlabeled and not path and not per_class:
    raise errors.InputError(
      "unlabeled is True, but per_class is 0 and leaves no images over; set it"
      " or give an unlabeled_path"
    )
  if batch_size % process_count:
    raise errors.InputError(
      f"unlabeled_batch_size is {batch_size}, but must be a multiple of the"
      f" number of processes, {process_count}"
    )


_OPENED_BY_PATH = ("npz", "folder")


def open_source(source: str, *, name: str, path: str) -> records.ImageSet:
  """Open a data set by its kind.

  Args:
    source: 'bundled', 'npz', 'folder' or 'tfds'.
    name: the bundled set or the tfds name; unused by the others.
    path: the npz file, the folder, or the data directory of tfds ('' for its
      own default); unused by bundled sets.

  Returns:
    The records, with labels as published.

  Raises:
    errors.InputError: there is no such data set, or it is malformed.
  """
  openers = {
    "bundled": lambda: bundled.open_bundled(name),
    "npz": lambda: from_arrays.image_set(
      from_arrays.load_npz(path), repr(path)
    ),
    "folder": lambda: from_folders.open_folder(
      from_folders.existing_folder(path)
    ),
    "tfds": lambda: from_tfds.open_tfds(name, path),
  }
  if source not in openers:
    raise errors.InputError(
      f"source {source!r} is unknown; possible: {records.listed(openers)}"
    )
  field, value = ("path", path) if source in _OPENED_BY_PATH else ("name", name)
  if not value:
    raise errors.InputError(f"source {source!r} needs data.{field}")
  return openers[source]()
