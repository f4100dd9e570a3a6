"""Networks: the bundled ones by name, and any other Flax network.

`models.networks` defines what a network is and what its taps are.
"""

from l2t_jax.models.bundled import MODELS, create, find
from l2t_jax.models.networks import (
  as_apply_fn,
  attributes,
  fold_in,
  init,
  trace,
  training_notes,
)
from l2t_jax.models.pure_functions import Functions, Network
from l2t_jax.models.tapping import Layout, last_tap, select_taps

__all__ = [
  "MODELS",
  "Functions",
  "Layout",
  "Network",
  "as_apply_fn",
  "attributes",
  "create",
  "find",
  "fold_in",
  "init",
  "last_tap",
  "select_taps",
  "trace",
  "training_notes",
]
