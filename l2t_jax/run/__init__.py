"""From an experiment to a trained target."""

from l2t_jax import quiet  # noqa: F401
