"""Labelled images with random access: the common form of all data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import io
import pathlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from l2t_jax import errors
from l2t_jax.data import image_files

# Fraction of test images that may also be training images. In CIFAR-100 a tenth
# have near-duplicates (Barz and Denzler, 2020), and fewer have exact copies.
MAX_COPIES = 0.1
MIN_COPIES = 5  # Fewer copies are always accepted.


class ImageFile(NamedTuple):
  """An encoded image."""

  name: str  # For messages.
  content: pathlib.Path | io.BytesIO


class Records(NamedTuple):
  """Labelled images that can be read in any order, by index."""

  # [N] int32, 0 .. num_classes - 1; -1 for dropped classes and for test labels
  # that are withheld.
  labels: np.ndarray
  # Index -> encoded image; picklable, for worker processes.
  open_file: Callable[[int], ImageFile] | None = None
  # Or the images themselves, uint8, uint16 or float32 [N, H, W, C].
  pixels: np.ndarray | None = None
  # [N, ...], one target per image if the task is not to predict its class.
  targets: np.ndarray | None = None

  def read_image(self, index: int) -> Image.Image | np.ndarray:
    """Read one image, as `image_files.decode` returns it.

    Raises:
      errors.InputError: its file cannot be read.
    """
    if self.pixels is not None:
      return self.pixels[index]
    assert self.open_file
    name, content = self.open_file(index)
    return image_files.decode(content, name=name)

  def name_of(self, index: int) -> str:
    """Return the name of an image for messages."""
    if self.open_file:
      with contextlib.suppress(errors.InputError):  # A damaged record.
        return self.open_file(index).name
    return f"image {index}"


class ImageSet(NamedTuple):
  """A data set as it was published."""

  train: Records  # The official training images, then the validation images.
  num_official_val: int  # Number of validation images at the end of `train`.
  test: Records | None  # None if there is no official test set.
  class_names: tuple[str, ...]
  # Other files that were found: suffix or folder -> number of files.
  passed_over: Mapping[str, int] = {}
  notes: tuple[str, ...] = ()  # What the user should know, one line each.


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
        f"classes takes indices, and has {label!r}; the classes are {named}"
      )
  if len(set(classes)) < len(classes):
    raise errors.InputError(f"classes {tuple(classes)} has duplicates")
  new_labels = np.full(num_classes, -1, np.int32)
  new_labels[list(classes)] = np.arange(len(classes))

  def relabel(records: Records) -> Records:
    labels = records.labels
    # -1 must stay -1: as an index it would select the last class.
    return records._replace(labels=np.where(labels < 0, -1, new_labels[labels]))

  return images._replace(
    train=relabel(images.train),
    test=None if images.test is None else relabel(images.test),
    class_names=tuple(images.class_names[label] for label in classes),
  )


def unless_secret(test: Records) -> Records | None:
  """Return test images, or None if all of their labels are withheld (-1)."""
  return test if (test.labels >= 0).any() else None


def check_copies(
  where: str, part: str, *, num_copies: int, num_images: int
) -> None:
  """Raise if many validation or test images are also training images.

  A few copies are accepted, because published data sets have some.

  Args:
    where: the data set, for the message.
    part: "val" or "test".
    num_copies: number of images of the part that are also training images.
    num_images: number of images of the part.

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


def counted(counts: Mapping[str, int]) -> str:
  """Format counts for a message: "3 .txt, 1 .csv"."""
  most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  text = some_of([f"{number} {name}" for name, number in most])
  if ".heic" in counts:
    text += " (to read .heic: pip install pillow-heif)"
  return text
