"""Training, validation and test splits: read from a file, or drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import hashlib
from typing import NamedTuple

import numpy as np

from l2t_jax import errors
from l2t_jax.data import data_fields, from_arrays, records


class Split(NamedTuple):
  """Sorted indices of the images in use."""

  train: np.ndarray  # [n] int64, into ImageSet.train.
  val: np.ndarray  # [n] int64, into ImageSet.train.
  test: np.ndarray  # [n] int64, into ImageSet.test, or .train if that is None.


def make_split(
  images: records.ImageSet, fields: data_fields.DataFields
) -> Split:
  """Read a published split of all images, or draw one.

  Raises:
    errors.InputError: a value is wrong, or a part that is needed is empty.
  """
  if fields.split_file:
    split = split_from_file(images, fields.split_file, fields.split_prefix)
  else:
    split = seeded_split(
      images,
      val_fraction=fields.val_fraction,
      test_fraction=fields.test_fraction,
      seed=fields.split_seed,
    )
  if not len(split.test):
    raise errors.InputError(
      f"there are no test images: test_fraction={fields.test_fraction} of the"
      " training images; raise it or give a split_file"
    )
  if fields.val_fraction and not len(split.val):
    raise errors.InputError(
      f"there are no validation images: val_fraction={fields.val_fraction}"
      " takes none of any class; raise it"
    )
  if images.train.targets is None:
    check_classes(images.class_names, images.train.labels[split.train])
  return split


def check_classes(class_names: Sequence[str], train: np.ndarray) -> None:
  """Raise if a class has no training images.

  Args:
    class_names: the names of all classes.
    train: the labels of the training images, int [N].

  Raises:
    errors.InputError: some classes have no training images.
  """
  unseen = without_images(class_names, train)
  if unseen:
    raise errors.InputError(
      f"{len(unseen)} of {len(class_names)} classes have no training"
      f" images: {records.some_of(unseen)}; number the labels from 0 without"
      " gaps, or list the classes to keep in data.classes"
    )


def without_images(class_names: Sequence[str], labels: np.ndarray) -> list[str]:
  """Return the names of the classes that do not occur among the labels."""
  missing = np.setdiff1d(np.arange(len(class_names)), labels)
  return [class_names[label] for label in missing]


def seeded_split(
  images: records.ImageSet,
  *,
  val_fraction: float,
  test_fraction: float,
  seed: int,
) -> Split:
  """Draw a stratified split: the same fractions of every class.

  Args:
    images: the data set.
    val_fraction: fraction of the training images used for validation; ignored
      if there is an official validation set.
    test_fraction: fraction of the training images used for testing; ignored if
      there is an official test set.
    seed: seed of the draw.

  Returns:
    The split.

  Raises:
    errors.InputError: the fractions leave no training images.
  """
  fractions = (val_fraction, test_fraction)
  # Written as a negation, so that NaN is rejected too.
  if not (min(fractions) >= 0 and sum(fractions) < 1):
    raise errors.InputError(
      f"val_fraction {val_fraction} and test_fraction {test_fraction} must not"
      " be negative, and their sum must be below 1"
    )
  labels = images.train.labels
  num_drawn = len(labels) - images.num_official_val
  test, val, train = _draw_stratified(
    labels[:num_drawn],
    len(images.class_names),
    (
      test_fraction if images.test is None else 0,
      0 if images.num_official_val else val_fraction,
    ),
    np.random.default_rng(seed),
  )
  # Label -1 marks images of dropped classes and withheld test labels.
  if images.test is not None:
    test = np.flatnonzero(images.test.labels >= 0)
  if images.num_official_val:
    val = num_drawn + np.flatnonzero(labels[num_drawn:] >= 0)
  return Split(train, val, test)


def split_from_file(images: records.ImageSet, path: str, prefix: str) -> Split:
  """Read a published split.

  Args:
    images: the data set whose order the indices refer to.
    path: an npz file with integer arrays {prefix}_train, _val and _test.
    prefix: the name of the split in the file.

  Returns:
    The split, without the images of dropped classes.

  Raises:
    errors.InputError: the file is malformed or does not fit the data set.
  """
  arrays = from_arrays.load_npz(path)
  tests_on_train = images.test is None
  test_labels = (images.test or images.train).labels
  labels = (images.train.labels, images.train.labels, test_labels)
  keys = [f"{prefix}_{part}" for part in Split._fields]
  indices = [
    _read_indices(arrays, key, len(part_labels), path)
    for key, part_labels in zip(keys, labels, strict=True)
  ]
  # Parts that index the same records must not overlap.
  for group in [indices] if tests_on_train else [indices[:2], indices[2:]]:
    numbers, counts = np.unique(np.concatenate(group), return_counts=True)
    repeated = numbers[counts > 1]
    if len(repeated):
      raise errors.InputError(
        f"{path!r} lists index {repeated[0]} more than once; each image belongs"
        f" in only one of {', '.join(keys)}"
      )
  kept = []
  for key, part_indices, part_labels in zip(keys, indices, labels, strict=True):
    kept.append(part_indices[part_labels[part_indices] >= 0])
    if not len(kept[-1]):
      raise errors.InputError(
        f"{path!r}: {key} has no images of the classes that are kept; give it"
        " some"
      )
  return Split(*kept)


def keep_per_class(
  split: Split, images: records.ImageSet, *, per_class: int, seed: int
) -> Split:
  """Keep `per_class` training images of every class.

  A smaller number keeps a subset of what a larger one keeps.

  Args:
    split: the split; val and test do not change.
    images: the data set.
    per_class: number of images to keep per class.
    seed: seed of the draw.

  Returns:
    The split with fewer training images.

  Raises:
    errors.InputError: a class has fewer images.
  """
  rng = np.random.default_rng(seed)
  labels = images.train.labels[split.train]
  kept = []
  for label, name in enumerate(images.class_names):
    members = split.train[labels == label]
    if len(members) < per_class:
      raise errors.InputError(
        f"per_class is {per_class}, but class {name!r} has only"
        f" {len(members)} training images"
      )
    kept.append(rng.permutation(members)[:per_class])
  return split._replace(train=np.sort(np.concatenate(kept)))


def split_hash(parts: Iterable[np.ndarray]) -> str:
  """Return a hash that identifies a split.

  It is stored in `summary.json` and in published tables, so the computation
  must never change.

  Args:
    parts: index arrays of train, val and test.

  Returns:
    16 hex digits of a SHA-256.
  """
  digest = hashlib.sha256()
  for indices in parts:
    # Prefixed with the length: otherwise moving an index from the end of one
    # array to the start of the next would not change the hash.
    digest.update(np.array([len(indices), *indices], "<i8").tobytes())
  return digest.hexdigest()[:16]


def _draw_stratified(
  labels: np.ndarray,
  num_classes: int,
  fractions: tuple[float, float],
  rng: np.random.Generator,
) -> list[np.ndarray]:
  """Split the indices of every class into two fractions and the rest."""
  classes = []
  for label in range(num_classes):
    members = rng.permutation(np.flatnonzero(labels == label))
    sizes = [round(fraction * len(members)) for fraction in fractions]
    classes.append(np.split(members, np.cumsum(sizes)))
  return [np.sort(np.concatenate(part)) for part in zip(*classes, strict=True)]


def _read_indices(
  arrays: dict[str, np.ndarray], key: str, num_records: int, path: str
) -> np.ndarray:
  """Return one checked and sorted index array of a split file, int64 [n]."""
  if key not in arrays:
    raise errors.InputError(
      f"{path!r} lacks {key!r}; its keys are {records.listed(sorted(arrays))}"
    )
  indices = arrays[key]
  if indices.dtype.kind not in "iu" or indices.ndim != 1:
    raise errors.InputError(
      f"{path!r}: {key} is {indices.dtype} {list(indices.shape)}, but must be"
      " integer [N]"
    )
  indices = np.sort(indices.astype(np.int64))
  if len(indices) and not 0 <= indices[0] <= indices[-1] < num_records:
    raise errors.InputError(
      f"{path!r}: {key} goes from {indices[0]} to {indices[-1]}, but the"
      f" data set has the indices 0 to {num_records - 1}"
    )
  return indices
