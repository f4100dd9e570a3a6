"""Open a data set, split it and make batches, as its fields specify."""

from __future__ import annotations

import numpy as np

from l2t_jax import errors
from l2t_jax.data import (
  data_fields,
  datasets,
  from_arrays,
  from_folders,
  from_huggingface,
  from_tfds,
  image_formats,
  inspection,
  memory,
  pillow,
  records,
  splits,
  streaming,
)

# Images that `_statistics` converts to float64 at a time, to bound memory.
_FEW_IMAGES = 256

# Images of another part whose values span more than this many times as much as
# those of train are probably scaled differently.
_LARGER_SCALE = 10


def load(
  fields: data_fields.DataFields,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  images: records.ImageSet | None = None,
  has_outer: bool = False,
) -> datasets.Dataset:
  """Open a data set, split it and cut it into batches.

  Args:
    fields: describe the data set and how its images are read.
    batch_size: labelled images per training batch, over all processes.
      Evaluation batches are a multiple of it.
    seed: seed of the order of training images and of their augmentation.
    process_index: index of this process among those that train together.
    process_count: number of processes that train together.
    images: a data set that is already open; by default, the data set that
      `fields` describe is opened.
    has_outer: whether training batches hold as many validation images, for the
      outer loss.

  Returns:
    The data set; each process gets its own rows of the global batches.

  Raises:
    errors.InputError: a value is wrong, or the data set is missing or
      malformed.
  """
  plan = datasets.BatchPlan(batch_size, process_index, process_count)
  plan.check("batch_size")
  unlabeled_plan = plan._replace(
    batch_size=fields.unlabeled_batch_size or batch_size
  )
  unlabeled_plan.check("unlabeled_batch_size")
  if images is None:
    images = open_images(fields)
  images = records.keep_classes(images, fields.classes)
  _check_augment(fields, images)
  _check_channels(fields, images)
  if fields.is_streamed and images.train.pixels is None:
    _check_normalisation(fields)
  # Split before applying per_class, which must not change val and test.
  whole_split = splits.make_split(images, fields)
  split = whole_split
  if fields.per_class:
    split = splits.keep_per_class(
      whole_split, images, per_class=fields.per_class, seed=fields.split_seed
    )
  left_over = np.setdiff1d(whole_split.train, split.train)
  subsets = {
    name: _with_pixels(subset, fields)
    for name, subset in _make_subsets(images, split, left_over, fields).items()
  }
  resize = None
  if not fields.is_streamed:
    resize = data_fields.make_eval_resize(
      fields.image_size, fields.eval_resize, fields.in_memory
    )
  inspected = inspection.inspect(
    subsets,
    resize,
    bad_images=fields.bad_images,
    max_bad_fraction=fields.max_bad_fraction,
  )
  for part, is_official in (
    ("val", images.num_official_val),
    ("test", images.test),
  ):
    if is_official:
      records.check_copies(
        "the images",
        part,
        num_copies=inspected.num_copies[part, "train"],
        num_images=len(inspected.subsets[part].indices),
      )
  train = inspected.subsets["train"]
  if len(train.indices) < batch_size:
    raise errors.InputError(
      f"batch_size is {batch_size}, but there are only {len(train.indices)}"
      " training images"
    )
  lost = splits.without_images(images.class_names, train.labels)
  if inspected.skipped and train.records.targets is None and lost:
    raise errors.InputError(
      f"none of the training images of {records.some_of(lost)} can be used;"
      " repair some, or list the other classes in data.classes"
    )
  mean, std = tuple(fields.mean), tuple(fields.std)
  if not (mean and std):
    own_mean, own_std = _statistics(train)
    mean, std = mean or own_mean, std or own_std
  elif not image_formats.fits(mean, std, train.values):
    lowest, highest = train.values
    raise errors.InputError(
      f"mean {mean} and std {std} are not for images whose values go from"
      f" {lowest:.4g} to {highest:.4g}; set both to those of the images, or to"
      " () to compute them, or scale the images"
    )
  contents = datasets.Contents(
    inspected.subsets,
    images.class_names,
    tuple(_notes(images, inspected)),
    inspected.skipped,
    plan,
    unlabeled_plan,
    has_outer,
    mean,
    std,
    seed,
  )
  if fields.is_streamed:
    return streaming.StreamingDataset(contents, fields)
  return memory.InMemoryDataset(contents, fields)


def _make_subsets(images, split, left_over, fields):
  """Return the subsets by name, without reading any images."""
  test = images.test or images.train
  subsets = {
    "train": datasets.Subset(images.train, split.train, fields.channels),
    "val": datasets.Subset(images.train, split.val, fields.channels),
    "test": datasets.Subset(test, split.test, fields.channels),
  }
  if fields.unlabeled:
    subsets["unlabeled"] = _open_unlabeled(fields, images.train, left_over)
  return subsets


def _with_pixels(subset, fields):
  """Add the pixels of a subset if they are arrays of the right size."""
  pixels = subset.records.pixels
  if (
    fields.is_streamed
    or pixels is None
    or pixels.shape[1:] != fields.image_shape
  ):
    return subset
  return subset._replace(pixels=pixels[subset.indices])


def _notes(images, inspected):
  """Yield notes about the images for the user, one line each."""
  yield from images.notes
  if images.passed_over:
    yield f"ignored files: {records.counted(images.passed_over)}"
  if inspected.bit_depth:
    why = "no training image has more than 8 bits"
    if inspected.maximum:
      why = f"the largest training value is {inspected.maximum}"
    white = 2**inspected.bit_depth - 1
    yield f"images with more than 8 bits: {white} is white, since {why}"
    if inspected.num_clipped:
      become = "are white, too"
      if images.train.pixels is not None:
        become = "are more than 1 before normalisation"
      yield (
        f"{inspected.num_clipped} images of other parts have larger values,"
        f" which {become}"
      )
  for (part, other), count in inspected.num_copies.items():
    if count:
      name = {"train": "training", "val": "validation"}[other]
      yield f"{count} {part} images have the same pixels as {name} images"
  yield from _scale_notes(inspected.subsets)
  if inspected.skipped:
    names = records.some_of(inspected.skipped)
    yield f"left out {len(inspected.skipped)} unreadable images: {names}"


def _scale_notes(subsets):
  """Yield a note per part whose float images seem to have another scale."""
  ranges = {}
  for part in ("train", "val", "test"):
    subset = subsets[part]
    if subset.records.pixels is not None and subset.dtype == np.float32:
      values = subset.records.pixels[subset.indices]
      if values.size:
        ranges[part] = (float(values.min()), float(values.max()))
  spans = {part: high - low for part, (low, high) in ranges.items()}
  for part, (low, high) in ranges.items():
    smaller, larger = sorted((spans["train"], spans[part]))
    if larger > _LARGER_SCALE * smaller:
      lowest, highest = ranges["train"]
      yield (
        f"{part} images have values from {low:.4g} to {high:.4g}, but training"
        f" images from {lowest:.4g} to {highest:.4g}: are they scaled alike?"
      )


def open_images(fields: data_fields.DataFields) -> records.ImageSet:
  """Open the data set that the fields describe, without splitting it.

  Raises:
    errors.InputError: there is no such data set, or it is malformed.
  """
  sources = {
    "bundled": lambda: from_arrays.open_bundled(fields.name),
    "npz": lambda: from_arrays.open_npz(fields.path),
    "folder": lambda: from_folders.open_folder(fields.path),
    "tfds": lambda: from_tfds.open_tfds(fields.name, fields.path),
    "huggingface": lambda: from_huggingface.open_huggingface(
      fields.name,
      fields.path,
      image_column=fields.image_column,
      label_column=fields.label_column,
    ),
  }
  if fields.source not in sources:
    raise errors.InputError(
      f"source {fields.source!r} is unknown; possible:"
      f" {records.listed(sources)}"
    )
  return sources[fields.source]()


def _check_augment(
  fields: data_fields.DataFields, images: records.ImageSet
) -> None:
  """Raise if an augmentation is impossible or wrong for the images."""
  targets, pixels = images.train.targets, images.train.pixels
  # Targets of two or more axes per image, such as masks, would have to move
  # with the image.
  for name, nothing in (("augment", "none"), ("rand_augment", 0)):
    value = getattr(fields, name)
    if targets is not None and targets.ndim > 2 and value != nothing:
      raise errors.InputError(
        f"{name} is {value!r} and would move the images, but not their targets"
        f" of shape {list(targets.shape[1:])}; use {nothing!r}"
      )
  if pixels is None or pillow.is_grey_or_rgb(pixels):
    return
  for name in ("rand_augment", "color_jitter"):
    if value := getattr(fields, name):
      raise errors.InputError(
        f"{name} is {value} and needs uint8 images with 1 or 3 channels, but"
        f" these are {pixels.dtype} with {pixels.shape[-1]}; set it to 0"
      )


def _check_channels(
  fields: data_fields.DataFields, images: records.ImageSet
) -> None:
  """Raise if images neither have `channels` nor can be converted to them."""
  for each in filter(None, (images.train, images.test)):
    if each.pixels is None or pillow.is_grey_or_rgb(each.pixels):
      if fields.channels not in (1, 3):
        raise errors.InputError(
          f"channels is {fields.channels}, but the images are grey or RGB; set"
          " it to 1 or 3"
        )
    elif each.pixels.shape[-1] != fields.channels:
      raise errors.InputError(
        f"channels is {fields.channels}, but the images are"
        f" {each.pixels.dtype} with {each.pixels.shape[-1]} channels, which are"
        " not converted; set it to that, or choose channels of the arrays"
      )
    elif fields.unlabeled_path:
      raise errors.InputError(
        f"the images are {each.pixels.dtype} with {fields.channels} channels,"
        f" which no files in unlabeled_path {fields.unlabeled_path!r} hold; use"
        " per_class and unlabeled alone"
      )


def _check_normalisation(fields):
  """Raise if mean or std would have to be computed from streamed images."""
  if not (fields.mean and fields.std):
    raise errors.InputError(
      "mean or std is (), but the images are read from files when they are"
      " needed; give numbers, such as those of ImageNet, (0.485, 0.456, 0.406)"
      " and (0.229, 0.224, 0.225)"
    )


def _statistics(
  train: datasets.Subset,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Return mean and standard deviation per channel of the training images."""
  if train.pixels is not None:
    read = lambda some: train.pixels[some]
  else:
    read = lambda some: np.stack([train.read(i, lambda x: x) for i in some])
  count = len(train.indices)

  def average(function):
    total = sum(
      function(read(some).astype(np.float64)).mean(axis=(1, 2)).sum(axis=0)
      for some in np.split(
        np.arange(count), range(_FEW_IMAGES, count, _FEW_IMAGES)
      )
    )
    return total / count

  # In two passes: mean(x²) - mean(x)² loses a small variance around a large
  # mean.
  mean = average(lambda x: x)
  std = np.sqrt(average(lambda x: (x - mean) ** 2))
  # 1 for constant channels, which vary by rounding errors at most.
  varies = std > np.maximum(1e-6 * np.abs(mean), 1e-30)
  std = np.where(varies, std / train.white, 1)
  rounded = lambda values: tuple(float(f"{value:.9g}") for value in values)
  return rounded(mean / train.white), rounded(std)


def _open_unlabeled(
  fields: data_fields.DataFields, train: records.Records, left_over: np.ndarray
) -> datasets.Subset:
  """Return the unlabelled images: of a folder, or left out by per_class."""
  if fields.unlabeled_path:
    folder = from_folders.open_unlabeled(fields.unlabeled_path)
    every = np.arange(len(folder.labels))
    return datasets.Subset(folder, every, fields.channels)
  if not len(left_over):
    raise errors.InputError(
      f"unlabeled is True, but per_class={fields.per_class} keeps all images;"
      " let per_class leave some over, or give an unlabeled_path"
    )
  return datasets.Subset(train, left_over, fields.channels)
