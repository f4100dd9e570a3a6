"""Saliency maps of the transferred channels."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from l2t_jax.method import transfer


def saliency(
  features_fn: Callable[[chex.Array], chex.Array],
  images: chex.Array,
  channel_weights: chex.Array,
) -> jax.Array:
  """Compute how strongly each pixel affects the weighted channels.

      max over colours of |∂/∂x Σ_c w_c mean over positions of S_c²|

  The sum is the matching loss of a pair, without β and λ, if r(T) is 0.
  Saliency is defined as in Simonyan, Vedaldi and Zisserman, "Deep Inside
  Convolutional Networks", 2014 (arXiv 1312.6034), section 3; the paper shows
  such maps with uniform and with learned weights side by side. The weights
  carry a `stop_gradient`.

  Args:
    features_fn: images -> S, [B, h, w, C].
    images: x, [B, H, W, channels].
    channel_weights: w, [B, C].

  Returns:
    [B, H, W], non-negative.
  """

  def weighted_energy(images):
    features = transfer.at_least_float32(features_fn(images))
    chex.assert_rank(features, 4)
    energy = jnp.mean(jnp.square(features), axis=(1, 2))
    chex.assert_equal_shape([energy, channel_weights])
    return jnp.sum(jax.lax.stop_gradient(channel_weights) * energy)

  return jnp.max(jnp.abs(jax.grad(weighted_energy)(images)), axis=-1)
