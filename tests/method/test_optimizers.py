"""Optimizers: where they differ from optax."""

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.method import optimizers


def test_clipping(x64):
  """As in optax if gradients are large, and differentiable at 0."""
  clip = optimizers.clip_by_global_norm(2.0)
  apply = lambda grads: clip.update(grads, clip.init(grads))[0]
  grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
  np.testing.assert_allclose(apply(grads)["a"], [1.2, 0.0])
  np.testing.assert_allclose(apply(grads)["b"], 1.6)
  small = {"a": jnp.array([0.3, 0.0]), "b": jnp.array(0.4)}
  jax.tree.map(np.testing.assert_array_equal, apply(small), small)
  zero = jnp.zeros(3)
  np.testing.assert_array_equal(jax.jacobian(apply)(zero), np.eye(3))
