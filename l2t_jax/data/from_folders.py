"""Data sets that are folders of image files."""

from __future__ import annotations

import collections
from collections.abc import Sequence
import functools
import hashlib
import itertools
import os
import pathlib
import re
import unicodedata

import numpy as np

from l2t_jax import errors
from l2t_jax.data import image_files, records

# Regular expressions for the folder names of each part, matched without case.
_PART_NAMES = {
  "train": "train|training|train[ _-]?val",
  "val": "val|valid|validation|dev",
  "test": "test|testing",
}
# Further words in the names of parts, but seldom in those of classes.
_LIKE_PART = "fold|split|holdout"
# Files and folders of operating systems, apart from hidden ones (`._1.jpg`).
_DEBRIS = (
  "__macosx",
  "thumbs.db",
  "desktop.ini",
  "@eadir",
  "#recycle",
  "$recycle.bin",
  "system volume information",
  "lost+found",
)

# Suffixes of the files of a Hugging Face data set.
_TABLES = (".arrow", ".parquet")

# (path, label) of each image.
_Files = list[tuple[pathlib.Path, int]]


def open_folder(path: str) -> records.ImageSet:
  """Open PATH/CLASS/*, or PATH/train/CLASS/* with optional val and test.

  The parts may have any usual name, such as `Training` and `valid`. Classes are
  sorted by name as strings: "10" comes before "2".

  Raises:
    errors.InputError: there is no such folder, a class has no images, or the
      folders of the parts are ambiguous.
  """
  root = _existing_folder(path)
  passed_over: collections.Counter[str] = collections.Counter()
  parts = _find_parts(root, passed_over)
  class_names = tuple(_class_folders(parts["train"]))
  files = {
    part: _list_classes(folder, class_names, passed_over, root)
    for part, folder in parts.items()
  }
  notes: tuple[str, ...] = ()
  if all(
    path.parent.parent != parts[part]
    for part, each in files.items()
    for path, _ in each
  ):
    notes = (
      "all images are in subfolders of the folders"
      f" {records.listed(class_names)}, which are taken for the classes",
    )
  val = files.get("val", [])
  test = file_records(files["test"]) if "test" in files else None
  return records.ImageSet(
    file_records(files["train"] + val),
    len(val),
    test,
    class_names,
    passed_over,
    notes,
  )


def open_unlabeled(path: str) -> records.Records:
  """Open a folder of unlabelled images, including its subfolders.

  Returns:
    The records, sorted by path; their labels are -1.

  Raises:
    errors.InputError: there is no such folder, or it has no images.
  """
  files, _ = list_images(_existing_folder(path))
  return file_records([(file, -1) for file in files])


def list_images(
  folder: pathlib.Path, root: pathlib.Path | None = None
) -> tuple[list[pathlib.Path], collections.Counter[str]]:
  """List the images in a folder and its subfolders, sorted by path.

  Hidden files and folders, and those of operating systems, are ignored. Links
  to folders are followed if they lead out of `root`, the whole data set.

  Returns:
    The images, and the number of other files per suffix.

  Raises:
    errors.InputError: there are no images.
  """
  files, others = _walk(folder, root=root)
  if not files:
    beside = f", only {records.counted(others)}" if others else ""
    raise errors.InputError(
      f"folder {str(folder)!r} has no images{beside}; their names end in .jpg,"
      " .png, .tif or another suffix of an image format that Pillow reads"
    )
  return sorted(files), others


def digest(path: str) -> str:
  """Return a digest of a file's bytes, or of a folder's images and tables.

  For a folder, the digest covers the relative names and sizes of the files, not
  their contents. It does not change when the folder moves.

  Returns:
    16 hex digits of a SHA-256; "" if there is no such file or folder.
  """
  if os.path.isfile(path):
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()[:16]
  if not os.path.isdir(path):
    return ""
  folder, sha = pathlib.Path(path), hashlib.sha256()
  for file in sorted(_walk(folder, _TABLES)[0]):
    name = file.relative_to(folder).as_posix()
    size = os.path.getsize(file) if file.exists() else 0  # A broken link.
    sha.update(os.fsencode(f"{name}\0{size}\0"))
  return sha.hexdigest()[:16]


def _walk(folder, more_suffixes=(), *, root=None):
  """Return the images below a folder, and the number of other files per suffix.

  Links to folders are followed only if they lead out of the data set, `root`:
  links within it would add images to a second class or part.
  """
  suffixes = (*image_files.suffixes(), *more_suffixes)
  files: list[pathlib.Path] = []
  others: collections.Counter[str] = collections.Counter()
  inside = os.path.realpath(root or folder)
  been_in = set()
  for where, subfolders, names in os.walk(
    folder, onerror=_refuse, followlinks=True
  ):
    kept = []
    for name in sorted(subfolders):
      path = os.path.join(where, name)
      real = os.path.realpath(path)
      if _is_debris(name):
        continue
      # A link to a parent of the data set would be followed endlessly.
      if os.path.islink(path) and (
        real in been_in or os.path.commonpath((real, inside)) in (real, inside)
      ):
        others["links to folders of this data set"] += 1
        continue
      been_in.add(real)
      kept.append(name)
    subfolders[:] = kept  # In place: `os.walk` descends into this list.
    for name in names:
      if _is_debris(name):
        continue
      if name.lower().endswith(suffixes):
        files.append(pathlib.Path(where, name))
      else:
        others[_suffix(name)] += 1
  return files, others


def _refuse(error):
  raise errors.InputError(
    f"folder {error.filename!r} cannot be read ({error.strerror})"
  ) from error


def _suffix(name):
  return pathlib.PurePath(name).suffix.lower() or "no suffix"


def _is_debris(name):
  return name.startswith(".") or name.lower() in _DEBRIS


# Not a closure in `file_records`, because worker processes must unpickle it.
def _file_by_index(
  paths: Sequence[pathlib.Path], index: int
) -> records.ImageFile:
  return records.ImageFile(str(paths[index]), paths[index])


def file_records(
  files: Sequence[tuple[pathlib.Path, int]],
) -> records.Records:
  """Create records from pairs (path, label); files are read on demand."""
  paths, labels = zip(*files, strict=True)
  return records.Records(
    np.array(labels, np.int32), functools.partial(_file_by_index, paths)
  )


def _existing_folder(path: str) -> pathlib.Path:
  if not os.path.isdir(path):
    raise errors.InputError(f"there is no folder {path!r}")
  return pathlib.Path(path)


def _scan(folder: pathlib.Path) -> tuple[list[str], list[str]]:
  """Return the names of folders and files in a folder, without ignored ones."""
  found: tuple[list[str], list[str]] = ([], [])
  try:
    with os.scandir(folder) as entries:
      for entry in entries:
        if not _is_debris(entry.name):
          found[not entry.is_dir()].append(entry.name)
  except OSError as error:
    _refuse(error)
  return found


def _list_folder(
  folder: pathlib.Path,
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """Return the folders and files in a folder, sorted, without ignored ones."""
  folders, files = (
    sorted(folder / name for name in names) for names in _scan(folder)
  )
  return folders, files


def part_of(name: str) -> str:
  """Return the part that a folder name stands for: train, val, test or ""."""
  for part, names in _PART_NAMES.items():
    if re.fullmatch(
      rf"({names})([ _-]?(set|data|images|\d{{4}}))?", name, re.I
    ):
      return part
  return ""


def _parts_by_name(
  folders: Sequence[pathlib.Path],
) -> dict[str, list[pathlib.Path]]:
  """Return part -> the folders named after it, such as train or pets_train."""
  words = {folder: [folder.name] for folder in folders}
  if not any(part_of(folder.name) for folder in folders):
    words = {folder: re.split("[ _.-]+", folder.name) for folder in folders}
    # A class may be called test_tube. Names of parts, such as pets_train and
    # pets_test, share all other words.
    others = {
      tuple(w for w in each if not part_of(w)) for each in words.values()
    }
    are_single = all(
      len(list(filter(part_of, each))) == 1 for each in words.values()
    )
    if (
      len(others) > 1
      or not are_single
      or len(folders) < 2
      or not all(_list_folder(folder)[0] for folder in folders)
    ):
      return {}
  found: dict[str, list[pathlib.Path]] = {}
  for folder, each in words.items():
    for part in filter(None, map(part_of, each)):
      found.setdefault(part, []).append(folder)
  return found


def _find_parts(
  root: pathlib.Path, passed_over: collections.Counter[str]
) -> dict[str, pathlib.Path]:
  """Return the folder of each part: train, and val and test if they exist."""
  folders, files = _list_folder(root)
  found = _parts_by_name(folders)
  others = [each for each in folders if [each] not in found.values()]
  for part, same in found.items():
    if len(same) > 1:
      raise errors.InputError(
        f"folder {str(root)!r} has {len(same)} folders for {part}:"
        f" {records.listed(each.name for each in same)}; move all but one"
        " elsewhere"
      )
  if not others and found and "train" not in found:
    raise errors.InputError(
      f"folder {str(root)!r} has {records.listed(f.name for f in folders)}, but"
      " no folder train"
    )
  # A class may be called train, next to bus and car; it has no subfolders.
  if "train" not in found or (
    len(found) == 1 and others and not _list_folder(found["train"][0])[0]
  ):
    if folders:
      _check_classes(root, folders)
    return {"train": root}
  for other in others:
    images, _ = _walk(other)
    if images:
      passed_over[f"images in {other.name}"] += len(images)
  _pass_over(files, passed_over)
  return {part: same[0] for part, same in found.items()}


def _check_classes(root, folders):
  """Raise if some folders are parts under other names, or contain parts."""
  if len(folders) == 1:
    raise errors.InputError(
      f"folder {str(root)!r} has a single subfolder, but at least two classes"
      f" are needed; if these are in {folders[0].name!r}, give"
      f" {str(folders[0])!r} as the path"
    )
  names_in = {folder: set(_scan(folder)[0]) for folder in folders}
  parts_in = lambda folder: {part_of(name) for name in names_in[folder]} - {""}
  divided = [folder for folder in folders if {"train"} < parts_in(folder)]
  if len(divided) > 1:
    raise errors.InputError(
      f"folder {str(root)!r} has the parts in the classes"
      f" ({divided[0].name}/train); they must be around them"
      f" (train/{divided[0].name})"
    )
  for folder in folders:
    beside = {other.name for other in folders} - {folder.name}
    if part_of(folder.name) and (repeated := sorted(names_in[folder] & beside)):
      raise errors.InputError(
        f"folder {str(root)!r} has {records.some_of(repeated)}, and so does its"
        f" folder {folder.name}; move those outside of it into a folder train"
      )
  _check_names(root, names_in)


def _is_like_part(name):
  """Return whether a word in the name of a folder stands for a part."""
  words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
  return any(
    part_of(word) or re.fullmatch(_LIKE_PART, word, re.I) for word in words
  )


def _check_names(root, names_in):
  """Raise if the names of folders are like those of parts.

  Args:
    root: the data set.
    names_in: folder -> names of its subfolders.
  """
  unnumbered = (re.sub(r"[ _-]?\d+$", "", folder.name) for folder in names_in)
  if {"train"} < {part_of(name) for name in unnumbered} - {""}:
    names = records.some_of([folder.name for folder in names_in])
    raise errors.InputError(
      f"folder {str(root)!r} has {names}; call the parts of a data set train,"
      " val and test, with one subfolder per class"
    )
  like = [folder for folder in names_in if _is_like_part(folder.name)]
  is_repeated = len(like) > 1 and all(
    names_in[folder] == {folder.name} for folder in like
  )
  share = any(
    names_in[one] & names_in[other]
    for one, other in itertools.combinations(like, 2)
  )
  first, *others = names_in.values()
  are_alike = len(first) > 1 and all(other == first for other in others)
  if is_repeated or share or (like and are_alike):
    inside = sorted(set().union(*(names_in[folder] for folder in like)))
    raise errors.InputError(
      f"the folders {records.some_of([folder.name for folder in like])} in"
      f" {str(root)!r} have the folders {records.some_of(inside)}; if they are"
      " parts of a data set, call those with the classes train, val and test"
    )


def _pass_over(files, passed_over):
  """Count files next to the folders of parts or classes."""
  for file in files:
    passed_over[f"{_suffix(file.name)} outside the classes"] += 1


def _class_folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Return class name -> folder, sorted by name as strings.

  Names are normalised to composed Unicode (NFC), because macOS decomposes them.
  """
  classes: dict[str, pathlib.Path] = {}
  for child in _list_folder(folder)[0]:
    name = unicodedata.normalize("NFC", child.name)
    if name in classes:
      raise errors.InputError(
        f"folder {str(folder)!r} has two folders {name!r}, which differ only in"
        " how accents are encoded; put their images into one"
      )
    classes[name] = child
  if not classes:
    raise errors.InputError(
      f"folder {str(folder)!r} has no subfolders; one per class is needed"
    )
  return dict(sorted(classes.items()))


def _check_links(folder, classes):
  """Raise if classes are links to one folder, or to one around them."""
  around = os.path.realpath(folder)
  name_of: dict[str, str] = {}
  for name, place in classes.items():
    real = os.path.realpath(place)
    if os.path.commonpath((real, around)) == real:
      raise errors.InputError(f"{place} is a link to {real}, which it is in")
    if real in name_of:
      raise errors.InputError(
        f"the classes {name_of[real]} and {name} in {str(folder)!r} are one"
        f" folder, {real}; remove the link"
      )
    name_of[real] = name


def _list_classes(
  folder: pathlib.Path,
  class_names: tuple[str, ...],
  passed_over: collections.Counter[str],
  root: pathlib.Path,
) -> _Files:
  """List all images in and below folder/CLASS, and count the other files."""
  classes = _class_folders(folder)
  different = classes.keys() ^ set(class_names)
  if different:
    raise errors.InputError(
      f"folder {str(folder)!r} must have the same classes as train; only one"
      f" of the two has {records.listed(sorted(different))}"
    )
  _pass_over(_list_folder(folder)[1], passed_over)
  _check_links(folder, classes)
  files = []
  for label, name in enumerate(class_names):
    paths, others = list_images(classes[name], root)
    files += [(path, label) for path in paths]
    passed_over.update(others)
  return files
