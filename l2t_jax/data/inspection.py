"""Read every image once before training, to find all unreadable ones."""

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

# More threads would only wait for Python's GIL.
_MAX_THREADS = 16
# Images per task of the thread pool.
_CHUNK = 32
# Images that an error message names.
_MAX_NAMED = 20

_T = TypeVar("_T")


class Inspected(NamedTuple):
  """Subsets whose images can all be read."""

  subsets: dict[str, datasets.Subset]
  skipped: tuple[str, ...]  # Names of unreadable images.
  bit_depth: int  # Of the images with more than 8 bits; 0 without any.
  maximum: int  # Largest value in training images with more than 8 bits, or 0.
  num_clipped: int  # Number of images with values beyond the bit depth.
  # (part, other part) -> number of the part's images with the pixels of an
  # image of the other: of val and test in train, and of test in val. The left
  # over images of train count as train if they are used without labels.
  num_copies: dict[tuple[str, str], int]


class _Seen(NamedTuple):
  """Properties of an image that was read."""

  maximum: int = 0  # Largest value if it has more than 8 bits; else 0.
  thumbprint: int = 0  # Hash, equal for equal images.
  pixels: np.ndarray | None = None  # Resized, [H, W, C], if kept in memory.


def read_all(
  images: records.Records,
  indices: np.ndarray,
  function: Callable[[Image.Image | np.ndarray], _T],
  *,
  title: str,
) -> Iterator[_T | errors.InputError]:
  """Read images in parallel, with a progress bar in a terminal.

  Args:
    images: the records to read from.
    indices: indices of the images to read, int64 [N].
    function: computes the result from an image.
    title: title of the progress bar.

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
  """Read all images of several subsets.

  Args:
    subsets: name -> subset; "train" determines the bit depth of all of them.
    resize: resizes the images that are kept in memory; None to keep none.
    bad_images: how to handle unreadable images: stop or skip.
    max_bad_fraction: largest fraction of the images that may be skipped.

  Raises:
    errors.InputError: images are unreadable, and may not be skipped or are too
      many.
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
      # Rounded up, so that this fraction is enough.
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
    # If train has no such images, assume that all 16 bits are used.
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
    {
      (part, other): _count_copies(part, other, subsets, seen)
      for part, other in (("val", "train"), ("test", "train"), ("test", "val"))
    },
  )


def _read_subset(subset, resize, name):
  """Return what was found per image, or the error that reading it raised."""
  if subset.pixels is not None or (
    resize is None and subset.records.open_file is None
  ):  # They are in memory.
    thumbprints = pillow.thumbprints(subset.records.pixels, subset.indices)
    if subset.dtype != np.uint16:
      return [_Seen(0, thumbprint) for thumbprint in thumbprints]
    pixels = subset.records.pixels
    maxima = (int(pixels[index].max()) for index in subset.indices)
    return list(map(_Seen, maxima, thumbprints))

  def look(image):
    thumbprint = hash(pillow.thumbprint(image))
    if isinstance(image, np.ndarray) and image.dtype == np.uint16:
      # Not kept: the value of white is known only after all images were read.
      # `_keep` reads this one again.
      return _Seen(int(image.max()), thumbprint)
    if resize is None:
      return _Seen(0, thumbprint)
    return _Seen(0, thumbprint, subset.to_pixels(image, resize))

  return list(
    read_all(subset.records, subset.indices, look, title=f"reading {name}")
  )


def _count_copies(part, other, subsets, seen):
  """Return the number of images of a part with pixels of one of another part.

  Thumbprints select candidates; only these are read again and compared in full.
  """

  def digest(name, position):
    subset = subsets[name]
    return pillow.digest(
      subset.records.read_image(int(subset.indices[position]))
    )

  names = [other]
  if other == "train" and "unlabeled" in subsets:
    is_left_over = subsets["unlabeled"].records is subsets["train"].records
    names += ["unlabeled"] if is_left_over else []
  similar = collections.defaultdict(list)
  for name in names:
    for position, one in enumerate(seen[name]):
      if isinstance(one, _Seen):
        similar[one.thumbprint].append((name, position))
  digests = functools.cache(
    lambda thumbprint: {digest(*place) for place in similar[thumbprint]}
  )
  return sum(
    isinstance(one, _Seen)
    and one.thumbprint in similar
    and digest(part, position) in digests(one.thumbprint)
    for position, one in enumerate(seen[part])
  )


def _keep(subset, seen, resize, depth):
  """Return a subset without its unreadable images."""
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
  """Return a message that lists the unreadable images with reasons."""
  # Drop the advice that ends each message: the caller gives it once for all.
  named = [str(error).rpartition("; ")[0] for *_, error in bad[:_MAX_NAMED]]
  more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
  names = f"{records.listed(named)}{more}"
  return f"{len(bad)} of {num_images} images cannot be used: {names}"
