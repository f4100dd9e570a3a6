"""Data sets that are arrays in memory or in an npz file."""

from __future__ import annotations

from collections.abc import Mapping
import functools
import hashlib
import pathlib
import zipfile

import numpy as np
from PIL import Image

from l2t_jax import errors
from l2t_jax.data import records


def load_npz(path: str) -> dict[str, np.ndarray]:
  """Read every array of an npz file, or raise an InputError."""
  if not pathlib.Path(path).is_file():
    raise errors.InputError(
      f"there is no file {path!r}; an .npz file is needed"
    )
  try:
    with np.load(path) as arrays:
      return dict(arrays)
  except (OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
    raise errors.InputError(
      f"{path!r} is no npz file of plain arrays"
    ) from error


def open_npz(path: str) -> records.ImageSet:
  """Open an npz file; see `image_set`."""
  return image_set(load_npz(path), repr(path))


def _image_from_array(images: np.ndarray, index: int) -> Image.Image:
  image = images[index]
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def array_records(
  images: np.ndarray, labels: np.ndarray, targets: np.ndarray | None = None
) -> records.Records:
  """Wrap images uint8 [N, H, W, C], labels [N] and targets [N, ...]."""
  read_image = functools.partial(_image_from_array, images)
  if targets is not None:
    is_float = targets.dtype.kind == "f"
    targets = targets.astype(np.float32 if is_float else np.int32)
  return records.Records(read_image, labels.astype(np.int32), images, targets)


def image_set(arrays: Mapping[str, np.ndarray], where: str) -> records.ImageSet:
  """Make a data set of arrays.

  Args:
    arrays: "x_train", uint8 images [N, H, W] or [N, H, W, 1 or 3], and
      "y_train", their classes [N], or "t_train", [N, ...], what else is to be
      learned of them; the same with "_val" and "_test" if there is such a
      split; and "class_names".
    where: they come from, for messages.

  Raises:
    errors.InputError: an array is missing or malformed.
  """
  needed = ("x_train",) if "t_train" in arrays else ("x_train", "y_train")
  for key in needed:
    if key not in arrays:
      raise errors.InputError(
        f"{where} lacks {key!r}; its keys are {records.listed(sorted(arrays))}"
      )
  is_given = lambda part: any(f"{kind}_{part}" in arrays for kind in "xyt")
  train, num_val = _checked_records(where, arrays, "train"), 0
  if is_given("val"):
    validation = _checked_records(where, arrays, "val")
    num_val = len(validation.labels)
    train = _joined(where, train, validation)
  test = _checked_records(where, arrays, "test") if is_given("test") else None
  _check_targets(train, test)
  num_seen = 1 + max(
    part.labels.max(initial=0) for part in (train, test) if part
  )
  _check_copies(where, arrays)
  class_names = tuple(
    str(name) for name in arrays.get("class_names", np.arange(num_seen))
  )
  if num_seen > len(class_names):
    raise errors.InputError(
      f"{where} has label {num_seen - 1}, but class_names has only"
      f" {len(class_names)} entries"
    )
  return records.ImageSet(train, num_val, test, class_names)


def _check_targets(
  train: records.Records, test: records.Records | None
) -> None:
  """Refuse test images whose targets are not those that are learned."""
  if train.targets is None or test is None:
    return
  shape = train.targets.shape[1:]
  if test.targets is None or test.targets.shape[1:] != shape:
    raise errors.InputError(
      f"the training images have targets of shape {list(shape)}, but the test"
      " images do not"
    )


def _check_copies(where: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Refuse val and test images of which many train, too, by their pixels.

  Published data sets have a few such images.
  """
  digests = {
    part: {
      hashlib.blake2b(image.tobytes(), digest_size=16).digest()
      for image in arrays[f"x_{part}"]
    }
    for part in ("train", "val", "test")
    if f"x_{part}" in arrays
  }
  for part in digests.keys() - {"train"}:
    copies = len(digests["train"] & digests[part])
    if records.are_many(copies, len(digests[part])):
      raise errors.InputError(
        f"{where}: {copies} of {len(digests[part])} images of x_{part} are in"
        " x_train, too; each image belongs into one of them"
      )


def _joined(
  where: str, first: records.Records, second: records.Records
) -> records.Records:
  """Put the images of `second`, in memory, behind those of `first`."""
  parts = [
    [array for array in part[1:] if array is not None]
    for part in (first, second)
  ]
  shapes = [[array.shape[1:] for array in arrays] for arrays in parts]
  if shapes[0] != shapes[1]:
    raise errors.InputError(
      f"{where}: the images of train and val, or what is to be learned of them,"
      f" differ in shape: {shapes[0]}, {shapes[1]}"
    )
  labels, images, *targets = map(np.concatenate, zip(*parts, strict=True))
  return array_records(images, labels, *targets)


def _checked_records(
  where: str, arrays: Mapping[str, np.ndarray], part: str
) -> records.Records:
  """Check and wrap x_{part}, y_{part} and, if it is there, t_{part}."""
  targets = arrays.get(f"t_{part}")
  if targets is not None and f"x_{part}" in arrays:
    # The classes then only serve to draw the split.
    arrays = {f"y_{part}": np.zeros(len(targets), np.int32), **arrays}
  for key in (f"x_{part}", f"y_{part}"):
    if key not in arrays:
      raise errors.InputError(f"{where} lacks {key!r} beside its other half")
  images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
  if images.ndim == 3:
    images = images[..., None]
  if (
    images.dtype != np.uint8
    or images.ndim != 4
    or images.shape[-1] not in (1, 3)
  ):
    raise errors.InputError(
      f"{where}: x_{part} is {arrays[f'x_{part}'].dtype}"
      f" {list(arrays[f'x_{part}'].shape)}, but must be uint8 [N, H, W] or"
      " [N, H, W, 1 or 3]"
    )
  if not images.size:
    raise errors.InputError(
      f"{where}: x_{part} is empty, {list(images.shape)}; give it images"
    )
  if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
    raise errors.InputError(
      f"{where}: y_{part} is {labels.dtype} {list(labels.shape)}, but must"
      f" be integer [{len(images)}], one label per image of x_{part}"
    )
  if labels.min(initial=0) < 0:
    raise errors.InputError(
      f"{where}: y_{part} has label {labels.min()}, but labels start at 0"
    )
  if targets is not None and (
    targets.dtype.kind not in "fiub" or len(targets) != len(images)
  ):
    raise errors.InputError(
      f"{where}: t_{part} is {targets.dtype} {list(targets.shape)}, but must"
      f" be numbers [{len(images)}, ...], something for each image of x_{part}"
    )
  if targets is not None and not np.isfinite(targets).all():
    raise errors.InputError(
      f"{where}: t_{part} has {np.sum(~np.isfinite(targets))} values that are"
      " NaN or infinite; leave these images out"
    )
  return array_records(images, labels, targets)
