"""Labelled images in random access: the common form of all sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from l2t_jax import errors

# Share of test images that may also be training images. In CIFAR-100 a tenth
# have near copies (Barz and Denzler, 2020), and fewer have exact ones.
MAX_COPIES = 0.1
MIN_COPIES = 5  # Fewer copies are accepted, whatever their share.


class Records(NamedTuple):
  """Labelled images that can be read in any order, by index."""

  # Reads one image, of any size and mode; picklable, for worker processes.
  read_image: Callable[[int], Image.Image]
  # [N] int32, 0 .. num_classes - 1; -1 for classes that are left out and for
  # test labels that are kept secret.
  labels: np.ndarray
  # The same images, uint8 [N, H, W, C], if they are in memory.
  pixels: np.ndarray | None = None
  # [N, ...], what is learned from each image if that is not its class.
  targets: np.ndarray | None = None


class ImageSet(NamedTuple):
  """A data set as it was published."""

  train: Records  # The official training images, then the validation images.
  num_official_val: int  # Number of validation images at the end of `train`.
  test: Records | None  # None if there is no official test set.
  class_names: tuple[str, ...]


def keep_classes(images: ImageSet, classes: Sequence[int]) -> ImageSet:
  """Keep some classes and number them 0, 1, ... in the order given.

  Images of the other classes stay where they are, with label -1, so that
  indices into the official order keep their meaning.

  Args:
    images: the data set with labels as published.
    classes: published labels to keep; empty for all.

  Returns:
    The same images with new labels and class names.

  Raises:
    errors.InputError: a class does not exist or is listed twice.
  """
  if not classes:
    return images
  num_classes = len(images.class_names)
  for label in classes:
    if label not in range(num_classes):
      named = listed(f"{i}: {n}" for i, n in enumerate(images.class_names))
      raise errors.InputError(
        f"classes has {label}, but the classes are {named}"
      )
  if len(set(classes)) < len(classes):
    raise errors.InputError(f"classes {tuple(classes)} has duplicates")
  new_labels = np.full(num_classes, -1, np.int32)
  new_labels[list(classes)] = np.arange(len(classes))

  def relabel(records: Records) -> Records:
    labels = records.labels
    return records._replace(labels=np.where(labels < 0, -1, new_labels[labels]))

  return images._replace(
    train=relabel(images.train),
    test=None if images.test is None else relabel(images.test),
    class_names=tuple(images.class_names[label] for label in classes),
  )


def check_copies(
  where: str, part: str, *, num_copies: int, num_images: int
) -> None:
  """Refuse validation or test images of which many are training images.

  A few copies are accepted, because published data sets have some.

  Args:
    where: the data set, for the message.
    part: "val" or "test".
    num_copies: how many images of the part are training images, too.
    num_images: how many images the part has.

  Raises:
    errors.InputError: more than a few are copies.
  """
  if num_copies >= MIN_COPIES and num_copies > MAX_COPIES * num_images:
    raise errors.InputError(
      f"{where}: {num_copies} of {num_images} images of {part} are in train,"
      " too; each image belongs in only one of them"
    )


def some_of(names: Sequence[str]) -> str:
  """Return the first few of many names, for a message."""
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return listed(names[:5]) + more


def listed(items: Iterable[Any]) -> str:
  """Join items with commas, for a message."""
  return ", ".join(map(str, items))
