"""Learning What and Where to Transfer, in functional JAX.

The public names are listed in `__init__.pyi`. Each is imported when it is first
used, so that importing the package is fast.
"""

import os

import lazy_loader

# XLA prints pages of errors about each program that it loads from its own
# cache, though nothing is wrong. It reads this when jax is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
