"""A fingerprint depends on each property of each array."""

import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import fingerprints

TREE = {"a": np.arange(6, dtype=np.int32), "b": [np.ones((2, 1), np.float32)]}


def test_equal_trees_have_equal_fingerprints():
  digits = fingerprints.fingerprint(TREE)
  assert len(digits) == 16 and int(digits, 16)
  copied = {"b": [jnp.ones((2, 1))], "a": jnp.arange(6, dtype=jnp.int32)}
  assert fingerprints.fingerprint(copied) == digits


@pytest.mark.parametrize(
  "changes",
  [
    {"a": TREE["a"][::-1]},
    {"a": TREE["a"].reshape(2, 3)},
    {"a": TREE["a"].view(np.uint32)},
    {"b": TREE["b"][0]},
    {"c": np.zeros(0)},
  ],
  ids=["values", "shape", "dtype", "path", "another array"],
)
def test_other_trees_have_other_fingerprints(changes):
  other = fingerprints.fingerprint(TREE | changes)
  assert other != fingerprints.fingerprint(TREE)
