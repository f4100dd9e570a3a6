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

# Other common names of the folder that must be called `val` here.
_VAL_NAMES = ("dev", "valid", "validation")

# (path, label) of each image.
_Files = list[tuple[pathlib.Path, int]]


def open_folder(path: str) -> records.ImageSet:
  """Open PATH/CLASS/*, or PATH/train/CLASS/* with optional val and test.

  Raises:
    errors.InputError: there is no such folder, a class has no images, or many
      validation or test images are copies of training images.
  """
  root = _existing_folder(path)
  parts = {
    part: root / part
    for part in ("train", "val", "test")
    if (root / part).is_dir()
  }
  if "train" not in parts:
    parts = {"train": root}
  elif unused := [name for name in _VAL_NAMES if (root / name).is_dir()]:
    raise errors.InputError(
      f"folder {str(root / unused[0])!r} would be ignored; rename it to val,"
      " where validation images belong, or move it elsewhere"
    )
  class_names = _subfolders(parts["train"])
  files = {
    part: _list_classes(folder, class_names) for part, folder in parts.items()
  }
  _check_copies(parts, files)
  val = files.get("val", [])
  test = file_records(files["test"]) if "test" in files else None
  return records.ImageSet(
    file_records(files["train"] + val), len(val), test, class_names
  )


def open_unlabeled(path: str) -> records.Records:
  """Open a folder of images without labels, in any subfolders.

  Returns:
    The records, sorted by path; their labels are -1.

  Raises:
    errors.InputError: there is no such folder, or it has no images.
  """
  return file_records(
    [(file, -1) for file in list_images(_existing_folder(path))]
  )


def list_images(folder: pathlib.Path) -> list[pathlib.Path]:
  """List the images in a folder and its subfolders, sorted by path.

  Hidden subfolders are skipped, because programs keep previews there.

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


def file_records(
  files: Sequence[tuple[pathlib.Path, int]],
) -> records.Records:
  """Wrap (path, label) of image files; each is read when it is asked for."""
  paths, labels = zip(*files, strict=True)
  read_image = functools.partial(_image_from_file, paths)
  return records.Records(read_image, np.array(labels, np.int32))


def _check_copies(
  parts: Mapping[str, pathlib.Path], files: Mapping[str, _Files]
) -> None:
  """Compare files of val and test with those of train.

  Links to the same file are found whatever their names, and equal files if
  they have the same name.
  """
  training = {_identity(path) for path, _ in files["train"]}
  for part in files.keys() - {"train"}:
    copies = []
    for path, _ in files[part]:
      other = parts["train"] / path.relative_to(parts[part])
      are_files = path.is_file() and other.is_file()
      if _identity(path) in training or (
        are_files and filecmp.cmp(path, other, shallow=False)
      ):
        copies.append(path)
    records.check_copies(
      f"folder {str(parts[part].parent)!r}",
      part,
      num_copies=len(copies),
      num_images=len(files[part]),
    )


def _identity(path: pathlib.Path) -> tuple[object, ...]:
  """Return what all links to a file have in common."""
  if not path.is_file():  # A broken link, which reading will report.
    return (path,)
  status = path.stat()
  # Some file systems number no files.
  return (status.st_dev, status.st_ino or path)


def _existing_folder(path: str) -> pathlib.Path:
  if not os.path.isdir(path):
    raise errors.InputError(f"there is no folder {path!r}")
  return pathlib.Path(path)


def _subfolders(folder: pathlib.Path) -> tuple[str, ...]:
  """Return the names of the classes in a folder, sorted."""
  names = sorted(
    child.name
    for child in folder.iterdir()
    if child.is_dir() and not child.name.startswith(".")
  )
  if not names:
    raise errors.InputError(
      f"folder {str(folder)!r} has no subfolders; one per class is needed"
    )
  return tuple(names)


def _list_classes(folder: pathlib.Path, class_names: tuple[str, ...]) -> _Files:
  """List every image in folder/CLASS and below."""
  different = set(_subfolders(folder)) ^ set(class_names)
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
