"""The image format that a network expects, and conversion between formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

# Weights of R, G and B in the luminance: ITU-R 601, as in Pillow.
_LUMINANCE = (0.299, 0.587, 0.114)


class ImageFormat(NamedTuple):
  """Size, colours and normalisation of square images."""

  size: int  # Height and width in pixels.
  channels: int
  # One value, or one per channel, for pixels scaled to [0, 1]; for float arrays
  # on their own scale.
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (self.size, self.size, self.channels)

  def select(self, bands: Sequence[int]) -> ImageFormat:
    """Return the format of some channels; () selects all of them."""
    if not bands:
      return self
    pick = lambda values: (
      values if len(values) == 1 else tuple(values[band] for band in bands)
    )
    return ImageFormat(self.size, len(bands), pick(self.mean), pick(self.std))


def fits(
  mean: Sequence[float], std: Sequence[float], values: tuple[float, float]
) -> bool:
  """Return whether a normalisation is plausible for a range of pixel values.

  Args:
    mean: one value, or one per channel.
    std: one value, or one per channel.
    values: smallest and largest pixel value of the images.
  """
  lowest, highest = values
  if lowest > -0.1 and highest < 2:  # From 0 to 1, with some outliers.
    return max(map(abs, mean)) <= 1 and max(std) <= 1
  # On another scale, reject a normalisation made for values from 0 to 1, whose
  # standard deviation is at most 0.5.
  return min(mean) < 0 or max(mean) > 1 or max(std) > 0.5


def convert(
  images: chex.Array, old: ImageFormat, new: ImageFormat
) -> chex.Array:
  """Convert normalised images to another format.

  Resizing is bilinear and antialiased. A grey image becomes three equal
  channels, a colour image becomes its luminance. Images that already have the
  new format are returned unchanged.

  Args:
    images: [B, H, W, C] in the old format.
    old: the format of `images`.
    new: the format of the result.

  Returns:
    [B, H, W, C] in the new format.
  """
  chex.assert_shape(images, (None, *old.shape))
  if old == new:
    return images
  constant = lambda values: jnp.asarray(values, images.dtype)
  images = images * constant(old.std) + constant(old.mean)
  if old.channels > new.channels:
    images = jnp.sum(images * constant(_LUMINANCE), axis=-1, keepdims=True)
  elif old.channels < new.channels:
    images = jnp.repeat(images, new.channels, axis=-1)
  if old.size != new.size:
    images = jax.image.resize(images, (len(images), *new.shape), "bilinear")
  return (images - constant(new.mean)) / constant(new.std)
