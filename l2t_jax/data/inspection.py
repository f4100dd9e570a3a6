"""Read every image once before training, and tell which cannot be read."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import functools
import itertools
import math
import os
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
import rich.console
import rich.progress

from l2t_jax import errors
from l2t_jax.data import datasets, image_files, pillow, records

# More threads only wait for Python's lock.
_MAX_THREADS = 16
# Images that a thread reads before it takes others.
_CHUNK = 32
# How many images an error names.
_MAX_NAMED = 20

_T = TypeVar("_T")


class Inspected(NamedTuple):
  """Subsets whose images can all be read."""

  subsets: dict[str, datasets.Subset]
  skipped: tuple[str, ...]  # Names of the images that cannot be read.
  bit_depth: int  # Of the images with more than 8 bits; 0 if there are none.
  maximum: int  # Of the training images with more than 8 bits; 0 without.
  num_clipped: int  # Images with values above what the bit depth holds.
  # How many images of val and test, read from files, have an equal in train.
  num_copies: dict[str, int]


class _Seen(NamedTuple):
  """What reading an image has shown."""

  maximum: int = 0  # Of an image with more than 8 bits; else 0.
  thumbprint: int = 0  # Equal for equal images; 0 for images in memory.
  pixels: np.ndarray | None = None  # [H, W, C] as in batches, if kept.


def read_all(
  images: records.Records,
  indices: np.ndarray,
  function: Callable[[Image.Image | np.ndarray], _T],
  *,
  title: str,
) -> Iterator[_T | errors.InputError]:
  """Read images in parallel, with a progress bar in a terminal.

  Args:
    images: where they are read from.
    indices: which images, int64 [N].
    function: computes something from each image.
    title: of the progress bar.

  Yields:
    The result for each image, in order, or the error that reading it raised.
  """

  def read(chunk):
    results: list[_T | errors.InputError] = []
    for index in chunk:
      try:
        results.append(function(images.read_image(int(index))))
      except errors.InputError as error:
        results.append(error)
    return results

  chunks = np.split(indices, range(_CHUNK, len(indices), _CHUNK))
  console = rich.console.Console(stderr=True)
  num_threads = min(os.cpu_count() or 1, _MAX_THREADS)
  with futures.ThreadPoolExecutor(num_threads) as pool:
    yield from rich.progress.track(
      itertools.chain.from_iterable(pool.map(read, chunks)),
      title,
      total=len(indices),
      console=console,
      transient=True,
      disable=not console.is_terminal,
    )


def inspect(
  subsets: Mapping[str, datasets.Subset],
  resize: Callable[[Image.Image], Image.Image] | None,
  *,
  bad_images: str,
  max_bad_fraction: float,
) -> Inspected:
  """Read all images of some subsets.

  Args:
    subsets: by name; the images of "train" say which bit depth all have.
    resize: makes images that are kept in memory; None to keep none.
    bad_images: what to do about images that cannot be read: stop or skip.
    max_bad_fraction: share of the images that may be skipped.

  Raises:
    errors.InputError: images cannot be read, or more than may be skipped.
  """
  seen = {
    name: _read_subset(subset, resize, name) for name, subset in subsets.items()
  }
  bad = [
    (subsets[name], position, one)
    for name, each in seen.items()
    for position, one in enumerate(each)
    if isinstance(one, errors.InputError)
  ]
  num_images = sum(len(subset.indices) for subset in subsets.values())
  are_many = len(bad) > max_bad_fraction * num_images
  if bad and (bad_images == "stop" or are_many):
    skip = "config.data.bad_images to 'skip'"
    if are_many:
      # Rounded up.
      share = math.ceil(1000 * len(bad) / num_images) / 1000
      skip += f" and config.data.max_bad_fraction to {share}"
    raise errors.InputError(
      f"{_listed_errors(bad, num_images)}; replace or remove them, or set"
      f" {skip}"
    )
  maxima = {}
  for name, each in seen.items():
    maxima[name] = [one.maximum for one in each if isinstance(one, _Seen)]
    if each and not maxima[name]:
      raise errors.InputError(
        f"none of the {len(each)} images of {name} can be used:"
        f" {_listed_errors(bad, num_images)}"
      )
  maximum, depth = max(maxima["train"], default=0), 0
  if any(map(any, maxima.values())):
    # Without such images in train, all of their 16 bits count.
    depth = image_files.bit_depth(maximum or 2**16 - 1)
  return Inspected(
    {
      name: _keep(subset, seen[name], resize, depth)
      for name, subset in subsets.items()
    },
    tuple(
      subset.records.name_of(int(subset.indices[position]))
      for subset, position, _ in bad
    ),
    depth,
    maximum,
    sum(one >= 2**depth for each in maxima.values() for one in each if one),
    {name: _count_copies(name, subsets, seen) for name in ("val", "test")},
  )


def _read_subset(subset, resize, name):
  """Return what was seen of each image, or the error that reading it raised."""
  if subset.pixels is not None or (
    resize is None and subset.records.open_file is None
  ):  # They are in memory.
    if subset.dtype != np.uint16:
      return [_Seen()] * len(subset.indices)
    pixels = subset.records.pixels
    return [_Seen(int(pixels[index].max())) for index in subset.indices]

  def look(image):
    thumbprint = hash(pillow.thumbprint(image))
    if isinstance(image, np.ndarray) and image.dtype == np.uint16:
      # How bright white is depends on images that may not be read yet.
      return _Seen(int(image.max()), thumbprint)
    if resize is None:
      return _Seen(0, thumbprint)
    return _Seen(0, thumbprint, subset.to_pixels(image, resize))

  return list(
    read_all(subset.records, subset.indices, look, title=f"reading {name}")
  )


def _count_copies(name, subsets, seen):
  """Return how many images of a part have the pixels of a training image."""

  def digest(part, position):
    subset = subsets[part]
    return pillow.digest(
      subset.records.read_image(int(subset.indices[position]))
    )

  similar = collections.defaultdict(list)
  for position, one in enumerate(seen["train"]):
    if isinstance(one, _Seen) and one.thumbprint:
      similar[one.thumbprint].append(position)
  digests = functools.cache(
    lambda thumbprint: {digest("train", p) for p in similar[thumbprint]}
  )
  return sum(
    isinstance(one, _Seen)
    and one.thumbprint in similar
    and digest(name, position) in digests(one.thumbprint)
    for position, one in enumerate(seen[name])
  )


def _keep(subset, seen, resize, depth):
  """Return a subset without the images that cannot be read."""
  good = [position for position, one in enumerate(seen) if type(one) is _Seen]
  subset = subset._replace(indices=subset.indices[good], bit_depth=depth or 16)
  if resize is None or subset.pixels is not None or not good:
    return subset
  pixels = [
    subset.read(position, resize) if one.pixels is None else one.pixels
    for position, one in enumerate(seen[index] for index in good)
  ]
  return subset._replace(pixels=np.stack(pixels))


def _listed_errors(bad, num_images):
  """Say which images cannot be read, and why."""
  # Each message ends in what to do about its image.
  named = [str(error).rpartition("; ")[0] for *_, error in bad[:_MAX_NAMED]]
  more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
  names = f"{records.listed(named)}{more}"
  return f"{len(bad)} of {num_images} images cannot be used: {names}"
