"""Every field of an experiment: those of l2t_jax/config.py.

An experiment is a file next to this one: the default with some fields changed.
Any field can also be changed on the command line, as in
--config.meta.learning_rate=1e-3.
"""

from l2t_jax.config import get_config, source

__all__ = ["get_config", "source"]
