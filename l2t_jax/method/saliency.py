"""Which pixels the channels that are transferred look at."""

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
  """Weigh pixels by how much they matter to the weighted channels.

      max over colours of |∂/∂x Σ_c w_c mean over positions of S_c²|

  The sum is what the matching loss of a pair asks of a target whose features
  are still 0. Saliency as in Simonyan, Vedaldi and Zisserman, "Deep Inside
  Convolutional Networks", 2014 (arXiv 1312.6034), section 3; the paper shows
  such maps with uniform and with learned weights side by side. The weights
  count as constants.

  Args:
    features_fn: images -> S, [B, h, w, C].
    images: x, [B, H, W, channels].
    channel_weights: w, [B, C].

  Returns:
    [B, H, W], not negative; its scale is that of S².
  """

  def weighted_energy(images):
    features = transfer.at_least_float32(features_fn(images))
    chex.assert_rank(features, 4)
    energy = jnp.mean(jnp.square(features), axis=(1, 2))
    chex.assert_equal_shape([energy, channel_weights])
    return jnp.sum(jax.lax.stop_gradient(channel_weights) * energy)

  return jnp.max(jnp.abs(jax.grad(weighted_energy)(images)), axis=-1)
