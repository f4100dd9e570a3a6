"""Learning What and Where to Transfer, in functional JAX."""

import os

# XLA warns in long lines that code from its own cache may not fit this CPU; it
# looks here when jax is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from l2t_jax import lowering  # noqa: F401  (changes how JAX lowers)
