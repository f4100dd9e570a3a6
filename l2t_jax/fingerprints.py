"""Digests that are the same in any process and on any machine."""

from __future__ import annotations

import hashlib
import re

import jax
import numpy as np

from l2t_jax import types


def fingerprint(tree: types.PyTree) -> str:
  """Return a digest of the paths, shapes, dtypes and bytes of all arrays.

  Args:
    tree: a PyTree of NumPy or JAX arrays that this process can read; strings
      and other leaves are converted to NumPy arrays.

  Returns:
    16 hex digits of a SHA-256, equal for equal trees.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    header = (jax.tree_util.keystr(path), array.shape, str(array.dtype))
    digest.update(repr(header).encode() + array.tobytes())
  return digest.hexdigest()[:16]


def without_addresses(text: str) -> str:
  """Remove what differs between processes from the repr of functions."""
  return re.sub(r" at 0x[0-9a-f]+", "", text)
