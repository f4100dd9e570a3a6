"""Keeps XLA's warnings off the screen; training imports it before jax.

They are long lines that say that code from XLA's own cache may not fit this
CPU. XLA reads the variable when jax is imported.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
