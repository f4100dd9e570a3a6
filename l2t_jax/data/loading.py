"""From the fields of a data set to its batches."""

from __future__ import annotations

import numpy as np

from l2t_jax import errors
from l2t_jax.data import (
  bundled,
  data_fields,
  datasets,
  from_arrays,
  from_folders,
  from_tfds,
  memory,
  records,
  splits,
  streaming,
)


def load(
  fields: data_fields.DataFields,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  images: records.ImageSet | None = None,
) -> datasets.Dataset:
  """Open a data set, split it and cut it into batches.

  Args:
    fields: which images, and how they are read.
    batch_size: labelled images per training batch, over all processes.
      Evaluation batches are the smallest multiple that is at least
      datasets.MIN_EVAL_BATCH_SIZE.
    seed: decides the order of training images and their augmentation.
    process_index: of this process among those that train together.
    process_count: how many processes train together.
    images: a data set that is open already; by default, `fields` say which to
      open.

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
  _check_augment(fields.augment, images)
  every = splits.make_split(images, fields)
  split = every
  if fields.per_class:
    split = splits.keep_per_class(
      every, images, per_class=fields.per_class, seed=fields.split_seed
    )
  if len(split.train) < batch_size:
    raise errors.InputError(
      f"batch_size is {batch_size}, but there are only {len(split.train)}"
      " training images"
    )
  unlabeled = None
  if fields.unlabeled:
    left_over = np.setdiff1d(every.train, split.train)
    unlabeled = _open_unlabeled(fields, images.train, left_over)
  contents = datasets.Contents(
    images, split, unlabeled, plan, unlabeled_plan, seed
  )
  if fields.is_streamed:
    return streaming.StreamingDataset(contents, fields)
  return memory.InMemoryDataset(contents, fields)


def open_images(fields: data_fields.DataFields) -> records.ImageSet:
  """Open the images that `source`, `name` and `path` say, as published.

  Raises:
    errors.InputError: there is no such data set, or it is malformed.
  """
  name, path = fields.name, fields.path
  # Of each source: the field that it cannot do without, and how to open it.
  sources = {
    "bundled": ("name", lambda: bundled.open_bundled(name)),
    "npz": ("path", lambda: from_arrays.open_npz(path)),
    "folder": ("path", lambda: from_folders.open_folder(path)),
    "tfds": ("name", lambda: from_tfds.open_tfds(name, path)),
  }
  if fields.source not in sources:
    raise errors.InputError(
      f"source {fields.source!r} is unknown; possible:"
      f" {records.listed(sources)}"
    )
  needed, open_source = sources[fields.source]
  if not getattr(fields, needed):
    raise errors.InputError(f"source {fields.source!r} needs data.{needed}")
  return open_source()


def _check_augment(augment: str, images: records.ImageSet) -> None:
  """Refuse to move images whose targets would stay where they are."""
  targets = images.train.targets
  if targets is not None and targets.ndim > 2 and augment != "none":
    raise errors.InputError(
      f"augment is {augment!r} and would move the images, but not their targets"
      f" of shape {list(targets.shape[1:])}; use 'none'"
    )


def _open_unlabeled(
  fields: data_fields.DataFields, train: records.Records, left_over: np.ndarray
) -> datasets.Subset:
  """Return the images without labels: a folder's, or those left over."""
  if fields.unlabeled_path:
    folder = from_folders.open_unlabeled(fields.unlabeled_path)
    return datasets.Subset(folder, np.arange(len(folder.labels)))
  if not len(left_over):
    raise errors.InputError(
      f"per_class is {fields.per_class} and leaves no images over for"
      " unlabeled; lower it or give an unlabeled_path"
    )
  return datasets.Subset(train, left_over)
