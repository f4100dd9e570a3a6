"""Summarise a data set and find problems with its files."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from l2t_jax import errors
from l2t_jax.data import image_files, inspection, pillow, records


class _Picture(NamedTuple):
  """Properties of an image."""

  size: tuple[int, int]  # Width and height in pixels.
  mode: str  # Pillow's mode, or type and channels of an array.
  format: str  # Pillow's name of the file format, or "".
  maximum: int  # Largest value if it has more than 8 bits; else 0.
  thumbprint: int  # Hash, equal for equal images.


class _Place(NamedTuple):
  """The place of an image in a data set."""

  part: str  # train, val or test.
  records: records.Records
  position: int  # Index into the records.
  class_name: str  # "" without a label.

  @property
  def name(self) -> str:
    """The file name, or the index of an image in an array."""
    return self.records.name_of(self.position)


def look(images: records.ImageSet) -> dict[str, Any]:
  """Read all images of a data set and summarise them.

  Returns:
    A dict of plain values for JSON: "classes", the class names; "parts", for
    each part the number of images in total and per class, size, mode and
    format; "bit_depth" of the training images with more than 8 bits, or 0;
    "unreadable", the unreadable files with the reason; "equal", groups of
    images with the same pixels that span two parts or two classes;
    "passed_over", the numbers of other files; and "notes", a list of lines.
  """
  parts, unreadable = {}, []
  same: dict[int, list[_Place]] = collections.defaultdict(list)
  maximum = 0
  for part, each, indices in _parts(images):
    seen = list(
      inspection.read_all(each, indices, _note, title=f"reading {part}")
    )
    places = [
      _Place(part, each, int(index), _class_of(images, each, index))
      for index in indices
    ]
    good = []
    for place, one in zip(places, seen, strict=True):
      if isinstance(one, errors.InputError):
        reason = str(one).removeprefix(f"image {place.name} ")
        unreadable.append({"part": part, "file": place.name, "reason": reason})
      else:
        good.append(one)
        same[one.thumbprint].append(place)
    parts[part] = _sum_up(places, good)
    if part == "train":
      maximum = max((one.maximum for one in good), default=0)
  return {
    "classes": list(images.class_names),
    "parts": parts,
    "bit_depth": image_files.bit_depth(maximum) if maximum else 0,
    "unreadable": unreadable,
    "equal": [
      [
        {"part": place.part, "class": place.class_name, "file": place.name}
        for place in group
      ]
      for places in same.values()
      for group in _equal_groups(places)
    ],
    "passed_over": dict(images.passed_over),
    "notes": list(images.notes),
  }


def _parts(images):
  """Yield (name, records, indices) of each part."""
  num_train = len(images.train.labels) - images.num_official_val
  numbers = np.arange(len(images.train.labels))
  yield "train", images.train, numbers[:num_train]
  if images.num_official_val:
    yield "val", images.train, numbers[num_train:]
  if images.test is not None:
    yield "test", images.test, np.arange(len(images.test.labels))


def _class_of(images, each, index):
  label = each.labels[index]
  return images.class_names[label] if label >= 0 else ""


def _note(image: Image.Image | np.ndarray) -> _Picture:
  thumbprint = hash(pillow.thumbprint(image))
  if isinstance(image, np.ndarray):
    height, width, channels = image.shape
    is_deep = image.dtype == np.uint16
    return _Picture(
      (width, height),
      f"{image.dtype} of {channels}",
      "",
      int(image.max()) if is_deep else 0,
      thumbprint,
    )
  kind = image.format or ""
  return _Picture(image.size, image.mode, kind, 0, thumbprint)


def _sum_up(
  places: Sequence[_Place], pictures: Sequence[_Picture]
) -> dict[str, Any]:
  """Count the images of a part per class, size, mode and format."""

  def count(values: Iterable[str]) -> dict[str, int]:
    return dict(collections.Counter(values).most_common())

  return {
    "images": len(places),
    "classes": count(place.class_name for place in places),
    "sizes": count("{}x{}".format(*picture.size) for picture in pictures),
    "modes": count(picture.mode for picture in pictures),
    "formats": count(picture.format for picture in pictures if picture.format),
  }


def _equal_groups(places: Iterable[_Place]) -> list[list[_Place]]:
  """Return the groups of equal images that span two parts or two classes."""
  places = list(places)
  if not _is_spread(places):
    return []
  # Equal thumbprints may be a coincidence: compare all pixels.
  groups: dict[bytes, list[_Place]] = collections.defaultdict(list)
  for place in places:
    image = place.records.read_image(place.position)
    groups[pillow.digest(image)].append(place)
  return [group for group in groups.values() if _is_spread(group)]


def _is_spread(places):
  return len({(place.part, place.class_name) for place in places}) > 1
