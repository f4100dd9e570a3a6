"""A vision transformer for small images.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021
(arXiv 2010.11929), with the width and depth of DeiT-Ti (Touvron et al., ICML
2021, arXiv 2012.12877) and patches of 4x4 pixels: 65 tokens at 32x32.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2t_jax.models import layers

_EPSILON = 1e-6
_NUM_TAPS = 4
_init = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
  """Self-attention and an MLP, each with pre-norm and a shortcut."""

  num_heads: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map tokens [B, N, C] to tokens of the same shape."""
    width = x.shape[-1]
    norm = lambda name: nn.LayerNorm(_EPSILON, self.dtype, name=name)
    dense = lambda size, name: nn.Dense(
      size, dtype=self.dtype, kernel_init=_init, name=name
    )
    attention = nn.MultiHeadDotProductAttention(
      self.num_heads, dtype=self.dtype, kernel_init=_init, name="attention"
    )
    x = x + attention(norm("norm1")(x))
    # The exact GELU, as in PyTorch; Flax approximates it by default.
    hidden = nn.gelu(dense(4 * width, "fc1")(norm("norm2")(x)), False)
    return x + dense(width, "fc2")(hidden)


class ViT(nn.Module):
  """Vision transformer for small images.

  Its taps are the patches after each block: "block1", "block2" and so on.
  """

  num_classes: int
  patch_size: int = 4
  width: int = 192
  depth: int = 12
  num_heads: int = 3
  dtype: Any = None

  # The size it was designed for; other multiples of the patches work too.
  image_size = 32

  @property
  def default_taps(self) -> tuple[str, ...]:
    """Blocks evenly spread over the depth, including the last."""
    number = min(_NUM_TAPS, self.depth)
    return tuple(
      f"block{self.depth * (i + 1) // number}" for i in range(number)
    )

  @nn.compact
  def __call__(
    self, images: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify images [B, H, W, C]; return (logits [B, K], features)."""
    layers.check_multiples(images, self.patch_size)
    sides = (self.patch_size,) * 2
    maps = nn.Conv(
      self.width,
      sides,
      strides=sides,
      padding="VALID",
      dtype=self.dtype,
      kernel_init=_init,
      name="patches",
    )(images)
    x = maps.reshape(maps.shape[0], -1, self.width)
    token = self.param("token", _init, (1, 1, self.width))
    token = jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1))
    x = jnp.concatenate([token, x], axis=1)
    positions = self.param("positions", _init, (1, *x.shape[1:]))
    x = x + positions.astype(x.dtype)
    features: dict[str, jax.Array] = {}
    for number in range(1, self.depth + 1):
      name = f"block{number}"
      x = Block(self.num_heads, self.dtype, name=name)(x)
      features[name] = x[:, 1:].reshape(maps.shape)  # Without the class token.
    x = nn.LayerNorm(_EPSILON, self.dtype, name="norm")(x[:, 0])
    features["penultimate"] = x[:, None, None]
    logits = nn.Dense(
      self.num_classes, dtype=self.dtype, kernel_init=_init, name="head"
    )(x)
    return logits, features
