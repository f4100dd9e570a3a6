"""Hugging Face data sets, from the hub or from disk."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import io
import pathlib
from typing import Any

import numpy as np

from l2t_jax import errors, imports
from l2t_jax.data import from_folders, records


def open_huggingface(
  name: str, path: str, *, image_column: str = "", label_column: str = ""
) -> records.ImageSet:
  """Open a data set with the `datasets` library.

  Args:
    name: name of a data set on the hub, such as "uoft-cs/cifar100"; "" to read
      `path`.
    path: a folder written by `save_to_disk`, a parquet file, or a folder that
      `datasets.load_dataset` reads; "" to use the hub.
    image_column: the column of images, of type Image or bytes; "" for the only
      one of type Image or, without any, of bytes.
    label_column: the column of classes; "" for the only one of type ClassLabel.

  Returns:
    The splits train, validation and test, which may have any usual names. A
    data set without train must have a single split, which becomes train.

  Raises:
    errors.InputError: there is no such data set, it cannot be reached, or a
      column is missing or ambiguous.
  """
  if bool(name) == bool(path):
    raise errors.InputError(
      "data.source is huggingface; give data.name, such as 'uoft-cs/cifar100',"
      " or data.path, one of the two"
    )
  where = f"Hugging Face {name or path!r}"
  datasets = imports.require("datasets", needed_for=where)
  try:
    loaded = _load(datasets, name, pathlib.Path(path))
  # The library raises errors of many types, from network to file system.
  except Exception as error:
    raise errors.InputError(
      f"{where} cannot be opened ({errors.first_line(error)})"
    ) from error
  if isinstance(loaded, datasets.Dataset):
    loaded = {"train": loaded}
  parts = _parts(where, loaded)
  features = parts["train"].features
  # Other libraries write Parquet files without the types of Hugging Face.
  is_image = lambda one: isinstance(one, datasets.Image)
  if not any(map(is_image, features.values())) or _holds_bytes(
    features.get(image_column)
  ):
    is_image = _holds_bytes
  image = _column(where, features, is_image, image_column, "image")
  is_label = lambda one: isinstance(one, datasets.ClassLabel)
  label = label_column or _column(where, features, is_label, "", "label")
  if label not in features:
    raise errors.InputError(
      f"{where} has no column {label!r}, only {records.listed(features)}"
    )
  class_names = _class_names(where, parts, label)
  encoded = datasets.Image(decode=False)

  def read(part: str) -> records.Records:
    # Images stay encoded until Pillow decodes them, as in every other source.
    rows = parts[part].with_format(None).select_columns([image])
    images = rows.cast_column(image, encoded)
    return records.Records(
      _labels(where, parts[part], label, class_names),
      functools.partial(_file, f"{where} {part}", images, image),
    )

  train, num_val, test = read("train"), 0, None
  if "val" in parts:
    val = read("val")
    num_val = len(val.labels)
    train = records.Records(
      np.concatenate([train.labels, val.labels]),
      functools.partial(
        _file_of_two, train.open_file, val.open_file, len(train.labels)
      ),
    )
  if "test" in parts:
    test = records.unless_secret(read("test"))
  passed_over = {
    f"images in {split}": len(rows)
    for split, rows in loaded.items()
    if not any(rows is used for used in parts.values())
  }
  return records.ImageSet(train, num_val, test, class_names, passed_over)


def _load(datasets, name, path):
  if name:
    return datasets.load_dataset(name)
  if path.is_file():
    return datasets.load_dataset("parquet", data_files=str(path))
  if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
    return datasets.load_from_disk(str(path))
  return datasets.load_dataset(str(path))


def _parts(where, loaded):
  """Return part -> split, for those of train, val and test that exist."""
  parts: dict[str, Any] = {}
  for split, rows in loaded.items():
    part = from_folders.part_of(split)
    if part in parts:
      raise errors.InputError(
        f"{where} has several splits for {part}: {records.listed(loaded)}"
      )
    if part:
      parts[part] = rows
  if "train" not in parts:
    if len(loaded) > 1:
      raise errors.InputError(
        f"{where} has no split train, only {records.listed(loaded)}"
      )
    parts = {"train": next(iter(loaded.values()))}
  return parts


def _holds_bytes(feature):
  """Return whether a column holds encoded images, or dicts of bytes and path.

  `feature` is its type; None if there is no such column.
  """
  kind = feature.get("bytes") if isinstance(feature, dict) else feature
  return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _column(where, features, is_kind, given, what):
  """Return the given column, or else the only one of a kind."""
  found = [name for name, one in features.items() if is_kind(one)]
  kind = {"image": "Image", "label": "ClassLabel"}[what]
  if given:
    if given not in found:
      raise errors.InputError(
        f"{where}: column {given!r} is not of type {kind}, but"
        f" {records.listed(found) or 'none'}"
      )
    return given
  if len(found) != 1:
    raise errors.InputError(
      f"{where} has {len(found)} columns of type {kind}"
      f" ({records.listed(found or features)}); name one as"
      f" config.data.{what}_column"
    )
  return found[0]


def _class_names(where, parts, label):
  """Return the names of a ClassLabel, or else the sorted values in train."""
  names = getattr(parts["train"].features[label], "names", None)
  if names is not None:
    return tuple(names)
  values = [v for v in parts["train"].unique(label) if v is not None]
  if negative := [v for v in values if _is_withheld(v)]:
    raise errors.InputError(
      f"{where}: column {label!r} of train has {negative[0]}; leave out images"
      " without a label, or convert the numbers of classes to text"
    )
  if not all(isinstance(value, (int, str)) for value in values):
    raise errors.InputError(
      f"{where}: column {label!r} holds neither whole numbers nor names"
    )
  return tuple(map(str, sorted(values)))


def _labels(where, rows, label, class_names):
  """Return labels int32 [N]; -1 for withheld labels."""
  # As Python values, whatever format the data set was saved with.
  values = rows.with_format(None)[label][:]
  numbers: dict[str | None, int] = {
    name: number for number, name in enumerate(class_names)
  }
  # Each split numbers its own names.
  names = getattr(rows.features[label], "names", None)
  name_of = (lambda value: names[value]) if names else str
  values = [None if _is_withheld(v) else name_of(v) for v in values]
  numbers[None] = -1
  unknown = sorted(set(values) - numbers.keys())
  if unknown:
    raise errors.InputError(
      f"{where}: column {label!r} has {records.some_of(unknown)}, which train"
      " lacks"
    )
  return np.array([numbers[value] for value in values], np.int32)


def _is_withheld(label):
  """Return whether a label is missing, or a negative number in its place."""
  return label is None or (isinstance(label, int) and label < 0)


def _file(
  where: str, rows: Sequence[dict[str, Any]], column: str, index: int
) -> records.ImageFile:
  name = f"{index} of {where}"
  try:
    found = rows[index][column] or {}
  except Exception as error:  # Damaged files raise many types of errors.
    raise errors.InputError(
      f"image {name} cannot be read ({errors.first_line(error)}); download the"
      " data set again"
    ) from error
  if found.get("bytes") is not None:
    return records.ImageFile(name, io.BytesIO(found["bytes"]))
  path = found.get("path")
  if not path:
    raise errors.InputError(f"image {name} is missing; leave its row out")
  return records.ImageFile(path, pathlib.Path(path))


def _file_of_two(first, second, num_first, index):
  """Open an image of two concatenated splits."""
  return first(index) if index < num_first else second(index - num_first)
