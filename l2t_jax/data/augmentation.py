"""Augmentation and normalisation of a batch on the device: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np


def draw_crops(
  key: jax.Array, num_images: int, *, padding: int
) -> tuple[jax.Array, jax.Array]:
  """Draw a crop and a flip per image.

  Args:
    key: PRNG key; consumed.
    num_images: size of the global batch.
    padding: width of the border that images get before the crop, in pixels.

  Returns:
    Offsets (top, left) int32 [num_images, 2], each from 0 to 2 * padding, and
    flips bool [num_images].
  """
  offset_key, flip_key = jax.random.split(key)
  offsets = jax.random.randint(offset_key, (num_images, 2), 0, 2 * padding + 1)
  return offsets, jax.random.bernoulli(flip_key, shape=(num_images,))


def pad_crop_flip(
  images: jax.Array, offsets: jax.Array, flips: jax.Array, *, padding: int
) -> jax.Array:
  """Pad with 0 (black), crop to the original size at an offset, and mirror.

  This comes before normalisation, as in torchvision's RandomCrop(padding=...),
  so that the border is black and not the mean colour.

  Args:
    images: [B, H, W, C].
    offsets: (top, left) of the crop in the padded image, int32 [B, 2].
    flips: whether to mirror left and right, bool [B].
    padding: width of the border, in pixels.

  Returns:
    [B, H, W, C] of the same type.
  """
  chex.assert_rank([images, offsets, flips], [4, 2, 1])
  batch_size, height, width, _ = images.shape
  border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded = jnp.pad(images, border)
  rows = offsets[:, :1] + jnp.arange(height)
  columns = jnp.arange(width)
  columns = jnp.where(flips[:, None], columns[::-1], columns)
  columns = offsets[:, 1:] + columns
  batch = jnp.arange(batch_size)
  return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def white(dtype: np.dtype, bit_depth: int) -> int:
  """Return the value of a pixel that is 1 for normalisation.

  Args:
    dtype: of the pixels. The values of floats are left as they are.
    bit_depth: of pixels that are uint16.
  """
  if dtype == np.uint16:
    return 2**bit_depth - 1
  return 255 if dtype == np.uint8 else 1


def normalise(
  images: jax.Array,
  mean: Sequence[float],
  std: Sequence[float],
  *,
  white: int,
) -> jax.Array:
  """Return (images / white - mean) / std as float32.

  Args:
    images: uint8, uint16 or float32 [B, H, W, C].
    mean: one value, or one per channel, on a scale where `white` is 1.
    std: one value, or one per channel, on the same scale.
    white: see `white`.

  Returns:
    float32 [B, H, W, C].
  """
  scaled = images.astype(jnp.float32) / white
  return (scaled - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)
