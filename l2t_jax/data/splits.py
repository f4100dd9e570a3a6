"""Which images train, validate and test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import hashlib
from typing import NamedTuple

import numpy as np

from l2t_jax import errors
from l2t_jax.data import from_arrays, records


class Split(NamedTuple):
  """Sorted indices of the images in use."""

  train: np.ndarray  # [n] int64, into Source.train.
  val: np.ndarray  # [n] int64, into Source.train.
  test: np.ndarray  # [n] int64, into Source.test; into Source.train if None.


def make_split(
  source: records.ImageSet,
  *,
  split_file: str,
  split_prefix: str,
  val_fraction: float,
  test_fraction: float,
  split_seed: int,
) -> Split:
  """Read a published split or draw one.

  Args:
    source: the data set.
    split_file: see split_from_file; '' to draw the split.
    split_prefix: see split_from_file.
    val_fraction: see seeded_split.
    test_fraction: see seeded_split.
    split_seed: of the drawn split.

  Returns:
    The split.

  Raises:
    errors.InputError: a value is wrong, or a part that is needed is empty.
  """
  if split_file:
    split = split_from_file(source, split_file, split_prefix)
  else:
    split = seeded_split(
      source,
      val_fraction=val_fraction,
      test_fraction=test_fraction,
      seed=split_seed,
    )
  empty = [
    part for part, indices in split._asdict().items() if not len(indices)
  ]
  if split_file and empty:
    raise errors.InputError(
      f"{split_file!r}: {split_prefix}_{empty[0]} has no images of the classes"
      " that are kept; give it some"
    )
  if "test" in empty:
    raise errors.InputError(
      f"there are no test images: test_fraction={test_fraction} of the"
      " training images; raise it or give a split_file"
    )
  if "val" in empty and val_fraction:
    raise errors.InputError(
      f"there are no validation images: val_fraction={val_fraction} takes none"
      " of any class; raise it"
    )
  return split


def check_classes(split: Split, source: records.ImageSet) -> None:
  """Raise `errors.InputError` for a class that nothing could be learned of."""
  unseen = without_images(source.class_names, source.train.labels[split.train])
  if unseen:
    raise errors.InputError(
      f"{len(unseen)} of {len(source.class_names)} classes have no training"
      f" images: {records.some_of(unseen)}; number the labels from 0 without"
      " gaps, or name the classes to keep in data.classes"
    )


def without_images(class_names: Sequence[str], labels: np.ndarray) -> list[str]:
  """Name the classes that no image has as its label."""
  missing = np.setdiff1d(np.arange(len(class_names)), labels)
  return [class_names[label] for label in missing]


def seeded_split(
  source: records.ImageSet,
  *,
  val_fraction: float,
  test_fraction: float,
  seed: int,
) -> Split:
  """Draw a split that takes the same share of every class.

  Args:
    source: the data set.
    val_fraction: share of the training images that validate; unused where
      there is an official validation set.
    test_fraction: share of the training images that test; unused where there
      is an official test set.
    seed: of the draw.

  Returns:
    The split.

  Raises:
    errors.InputError: the fractions leave nothing to train on.
  """
  shares = (val_fraction, test_fraction)
  if not (all(share >= 0 for share in shares) and sum(shares) < 1):  # Or NaN.
    raise errors.InputError(
      f"val_fraction {val_fraction} and test_fraction {test_fraction} must not"
      " be negative, and their sum must be below 1"
    )
  labels = source.train.labels
  num_drawn = len(labels) - source.num_official_val
  test, val, train = _draw_stratified(
    labels[:num_drawn],
    len(source.class_names),
    (
      test_fraction if source.test is None else 0,
      0 if source.num_official_val else val_fraction,
    ),
    np.random.default_rng(seed),
  )
  if source.test is not None:
    test = np.flatnonzero(source.test.labels >= 0)
  if source.num_official_val:
    val = num_drawn + np.flatnonzero(labels[num_drawn:] >= 0)
  return Split(train, val, test)


def split_from_file(source: records.ImageSet, path: str, prefix: str) -> Split:
  """Read a published split.

  Args:
    source: the data set; its order of images is what the indices refer to.
    path: an npz file with integer arrays {prefix}_train, _val and _test.
    prefix: the name of the split in the file.

  Returns:
    The split, without the images of classes that are left out.

  Raises:
    errors.InputError: the file is malformed or does not fit the data set.
  """
  arrays = from_arrays.load_npz(path)
  shares_records = source.test is None
  test_labels = (source.test or source.train).labels
  labels = (source.train.labels, source.train.labels, test_labels)
  split = Split(
    *(
      _read_indices(arrays, f"{prefix}_{part}", len(part_labels), path)
      for part, part_labels in zip(Split._fields, labels, strict=True)
    )
  )
  _check_disjoint("train", split.train, "val", split.val)
  if shares_records:
    _check_disjoint("train", split.train, "test", split.test)
    _check_disjoint("val", split.val, "test", split.test)
  return Split(
    *(
      indices[part_labels[indices] >= 0]
      for indices, part_labels in zip(split, labels, strict=True)
    )
  )


def keep_per_class(
  split: Split, source: records.ImageSet, *, per_class: int, seed: int
) -> Split:
  """Keep a few training images of every class.

  A smaller number keeps a subset of what a larger one keeps.

  Args:
    split: the split; val and test stay as they are.
    source: the data set.
    per_class: images to keep of each class.
    seed: of the draw.

  Returns:
    The split with fewer training images.

  Raises:
    errors.InputError: a class has fewer images.
  """
  rng = np.random.default_rng(seed)
  labels = source.train.labels[split.train]
  kept = []
  for label, name in enumerate(source.class_names):
    members = split.train[labels == label]
    if len(members) < per_class:
      raise errors.InputError(
        f"per_class is {per_class}, but class {name!r} has only"
        f" {len(members)} training images"
      )
    kept.append(rng.permutation(members)[:per_class])
  return split._replace(train=np.sort(np.concatenate(kept)))


def split_hash(parts: Iterable[np.ndarray]) -> str:
  """Return 16 hex digits that tell two splits apart.

  Args:
    parts: a Split; where there are images without labels, their indices, too.

  Returns:
    The digits.
  """
  digest = hashlib.sha256()
  for indices in parts:
    # The length first, so that no index can move to the next array unseen.
    digest.update(np.array([len(indices), *indices], "<i8").tobytes())
  return digest.hexdigest()[:16]


def _draw_stratified(
  labels: np.ndarray,
  num_classes: int,
  fractions: tuple[float, float],
  rng: np.random.Generator,
) -> list[np.ndarray]:
  """Divide indices into two shares of every class, and the rest."""
  classes = []
  for label in range(num_classes):
    members = rng.permutation(np.flatnonzero(labels == label))
    sizes = [round(fraction * len(members)) for fraction in fractions]
    classes.append(np.split(members, np.cumsum(sizes)))
  return [np.sort(np.concatenate(part)) for part in zip(*classes, strict=True)]


def _read_indices(
  arrays: dict[str, np.ndarray], key: str, num_records: int, path: str
) -> np.ndarray:
  """Return one checked and sorted index array of a split file."""
  if key not in arrays:
    raise errors.InputError(
      f"{path!r} lacks {key!r}; its keys are {', '.join(sorted(arrays))}"
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
  duplicates = indices[1:][indices[1:] == indices[:-1]]
  if len(duplicates):
    raise errors.InputError(
      f"{path!r}: {key} has index {duplicates[0]} more than once"
    )
  return indices


def _check_disjoint(
  name: str, indices: np.ndarray, other_name: str, other: np.ndarray
) -> None:
  common = np.intersect1d(indices, other)
  if len(common):
    raise errors.InputError(
      f"the split file has {len(common)} images in both {name} and"
      f" {other_name}, the first of them {common[0]}"
    )
