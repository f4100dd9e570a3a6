"""Data sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
import difflib
import functools
import io
from types import ModuleType
from typing import Any

import numpy as np

from l2t_jax import errors, imports
from l2t_jax.data import records


def open_tfds(name: str, path: str) -> records.ImageSet:
  """Open a prepared tfds data set.

  Args:
    name: name of the data set for tfds.builder.
    path: tfds's data_dir; "" for its default.

  Raises:
    errors.InputError: there is no such data set, it is not prepared for random
      access, or it lacks the split train or the features image and label.
  """
  tfds = imports.require(
    "tensorflow_datasets",
    needed_for=f"tfds {name!r}",
    package="tensorflow-datasets",
  )
  if not name:
    raise errors.InputError(
      "data.source is tfds, but data.name is ''; name a data set, such as"
      " 'cifar10'"
    )
  builder = _prepared_builder(tfds, name, path)
  features, official = builder.info.features, builder.info.splits
  if not {"image", "label"} <= set(features) or not isinstance(
    features["label"], tfds.features.ClassLabel
  ):
    raise errors.InputError(
      f"tfds {name!r} needs the features image and label (a ClassLabel), but"
      f" has {records.listed(features)}"
    )

  def read(part: str) -> records.Records:
    # Images stay encoded until Pillow decodes them, as in every other source.
    # This also makes it fast to list the labels.
    examples = builder.as_data_source(
      split=part, decoders={"image": tfds.decode.SkipDecoding()}
    )
    try:
      labels = np.array([example["label"] for example in examples], np.int32)
    # array_record and protobuf raise many types of errors for damaged files.
    except Exception as error:
      raise errors.InputError(
        f"tfds {name!r} cannot be read ({errors.first_line(error)}); remove"
        f" {builder.data_dir} and prepare it again"
      ) from error
    return records.Records(
      labels, functools.partial(_file_from_tfds, name, examples)
    )

  try:
    has_val = "validation" in official
    return records.ImageSet(
      read("train+validation" if has_val else "train"),
      official["validation"].num_examples if has_val else 0,
      records.unless_secret(read("test")) if "test" in official else None,
      tuple(features["label"].names),
    )
  except NotImplementedError as error:
    raise errors.InputError(
      f"tfds {name!r} is prepared as {builder.info.file_format.value}, which"
      " has no random access; prepare it as array_record in another directory"
      " and give that as path"
    ) from error


def _file_from_tfds(
  name: str, examples: Sequence[dict[str, Any]], index: int
) -> records.ImageFile:
  try:
    content = examples[index]["image"]
  except Exception as error:  # A damaged file, as above.
    raise errors.InputError(
      f"image {index} of tfds {name} cannot be read"
      f" ({errors.first_line(error)}); prepare the data set again"
    ) from error
  return records.ImageFile(f"{index} of tfds {name}", io.BytesIO(content))


def _prepared_builder(tfds: ModuleType, name: str, path: str) -> Any:
  """Return the builder of a prepared data set that has a train split."""
  try:
    builder = tfds.builder(name, data_dir=path or None)
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    similar = difflib.get_close_matches(name, known) or ["none"]
    raise errors.InputError(
      f"tfds has no data set {name!r}; similar names: {records.listed(similar)}"
    ) from error
  except (ImportError, ValueError) as error:
    raise errors.InputError(
      f"tfds {name!r} cannot be opened: {str(error).splitlines()[0]}"
    ) from error
  found = builder.info.splits
  if found and "train" not in found:
    raise errors.InputError(
      f"tfds {name!r} has no split 'train', only {records.listed(found)}"
    )
  if not found:
    where = f", data_dir={path!r}" if path else ""
    raise errors.InputError(
      f"tfds {name!r} is not prepared for random access; run once: pip install"
      ' tensorflow && python -c "import tensorflow_datasets as tfds;'
      f" tfds.builder({name!r}{where}).download_and_prepare("
      "file_format='array_record')\""
    )
  return builder
