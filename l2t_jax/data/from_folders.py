"""Data sets that are folders of image files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import filecmp
import functools
import os
import pathlib

import numpy as np
from PIL import Image

from l2t_jax import errors
from l2t_jax.data import pillow, records

IMAGE_SUFFIXES = (
  ".bmp",
  ".gif",
  ".jfif",
  ".jpeg",
  ".jpg",
  ".pgm",
  ".png",
  ".ppm",
  ".tif",
  ".tiff",
  ".webp",
)

_PARTS = ("train", "val", "test")
# Other common names of the folder that must be called `val` here.
_VAL_NAMES = ("dev", "valid", "validation")

# (path, label) of each image.
_Files = list[tuple[pathlib.Path, int]]


def open_folder(path: str) -> records.ImageSet:
  """Open PATH/CLASS/*, or PATH/train/CLASS/* with optional val and test.

  Raises:
    errors.InputError: there is no such folder, a class has no images, or
      validation or test images are images of train.
  """
  root = _existing_folder(path)
  names = _subfolders(root)
  # A class of images may be called train, too.
  has_parts = "train" in names and (
    _subfolders(root / "train") or {*names} <= {*_PARTS, *_VAL_NAMES}
  )
  if not has_parts:
    class_names = _class_names(root)
    return records.ImageSet(
      _file_records(_list_classes(root, class_names)), 0, None, class_names
    )
  for name in names:
    if name in _VAL_NAMES:
      raise errors.InputError(
        f"folder {str(root / name)!r} would be left out: beside train,"
        " validation images are those of val; call it so, or move it elsewhere"
      )
  class_names = _class_names(root / "train")
  files = {
    part: _list_classes(root / part, class_names)
    for part in _PARTS
    if part in names
  }
  _check_copies(root, files)
  val = files.get("val", [])
  test = _file_records(files["test"]) if "test" in files else None
  return records.ImageSet(
    _file_records(files["train"] + val), len(val), test, class_names
  )


def open_unlabeled(path: str) -> records.Records:
  """Open a folder of images without labels, in any subfolders.

  Returns:
    The records, sorted by path; their labels are -1.

  Raises:
    errors.InputError: there is no such folder, or it has no images.
  """
  return _file_records(
    [(file, -1) for file in list_images(_existing_folder(path))]
  )


def list_images(folder: pathlib.Path) -> list[pathlib.Path]:
  """List the images in a folder and its subfolders, sorted by path.

  Hidden subfolders are passed over: programs keep previews there.

  Raises:
    errors.InputError: there are no images.
  """
  files = []
  for where, subfolders, names in os.walk(folder):
    subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    files += [
      pathlib.Path(where, name)
      for name in names
      if name.lower().endswith(IMAGE_SUFFIXES)
    ]
  if not files:
    raise errors.InputError(
      f"folder {str(folder)!r} has no images; their names end in"
      f" {records.listed(IMAGE_SUFFIXES)}"
    )
  return sorted(files)


def _image_from_file(paths: Sequence[pathlib.Path], index: int) -> Image.Image:
  return pillow.decode(paths[index], name=str(paths[index]))


def _file_records(files: _Files) -> records.Records:
  """Wrap files as records, which read each image when it is asked for."""
  paths, labels = zip(*files, strict=True)
  read_image = functools.partial(_image_from_file, paths)
  return records.Records(read_image, np.array(labels, np.int32))


def _check_copies(root: pathlib.Path, files: Mapping[str, _Files]) -> None:
  """Refuse validation or test images of which many are training images, too.

  Found are links to training images and equal files of the same name.
  Stores that keep equal files once make a few links.
  """
  training = {_identity(path) for path, _ in files["train"]}
  for part in files.keys() - {"train"}:
    paths = [path for path, _ in files[part]]
    copies = [
      path
      for path in paths
      if _identity(path) in training
      or _are_equal(path, root / "train" / path.relative_to(root / part))
    ]
    if records.are_many(len(copies), len(paths)):
      raise errors.InputError(
        f"{len(copies)} of {len(paths)} images of {part} are images of train,"
        f" too, such as {copies[0]}; each image belongs into one of them"
      )


def _identity(path: pathlib.Path) -> tuple[object, ...]:
  """Return what all links to a file have in common."""
  try:
    status = path.stat()
  except OSError:  # A broken link, which reading will report.
    return (path,)
  # Some file systems number no files.
  return (status.st_dev, status.st_ino or path)


def _are_equal(path: pathlib.Path, other: pathlib.Path) -> bool:
  try:
    return filecmp.cmp(path, other, shallow=False)  # Compares sizes first.
  except OSError:
    return False


def _existing_folder(path: str) -> pathlib.Path:
  if not pathlib.Path(path).is_dir():
    raise errors.InputError(f"there is no folder {path!r}")
  return pathlib.Path(path)


def _subfolders(folder: pathlib.Path) -> tuple[str, ...]:
  names = (
    child.name
    for child in folder.iterdir()
    if child.is_dir() and not child.name.startswith(".")
  )
  return tuple(sorted(names))


def _class_names(folder: pathlib.Path) -> tuple[str, ...]:
  names = _subfolders(folder)
  if not names:
    raise errors.InputError(
      f"folder {str(folder)!r} has no subfolders; one per class is needed"
    )
  return names


def _list_classes(folder: pathlib.Path, class_names: tuple[str, ...]) -> _Files:
  """List every image in folder/CLASS and below."""
  different = set(_class_names(folder)) ^ set(class_names)
  if different:
    raise errors.InputError(
      f"folder {str(folder)!r} must have the same classes as train; only one"
      f" of the two has {records.listed(sorted(different))}"
    )
  return [
    (path, label)
    for label, name in enumerate(class_names)
    for path in list_images(folder / name)
  ]
