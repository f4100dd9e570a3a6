"""Learning What and Where to Transfer, in functional JAX.

The public names are listed in `__init__.pyi`. Each is imported when it is first
used, so that importing the package is fast and has no side effects.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
