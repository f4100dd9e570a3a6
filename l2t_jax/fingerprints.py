"""Digests that tell arrays apart."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from l2t_jax import types


def fingerprint(tree: types.PyTree) -> str:
  """Return 16 hex digits of the paths, shapes, dtypes and bytes of arrays."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    what = (jax.tree_util.keystr(path), array.shape, str(array.dtype))
    digest.update(repr(what).encode() + array.tobytes())
  return digest.hexdigest()[:16]
