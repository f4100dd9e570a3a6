"""Pure functions that augment and normalise a batch on the device.

Random numbers are drawn for the global batch, and each process takes those of
its own rows: the number of processes does not change the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.data import rand_augment
from l2t_jax.method import mixing

# Folded into the PRNG key of a batch. 0 and 1 are taken: `draw_crops` splits
# the same key in two, which equals folding them in.
_OPERATIONS, _JITTER, _ERASING = 2, 3, 4
# Bounds of torchvision's RandomErasing: area fraction, height / width.
_ERASED_SCALE = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)
_NUM_TRIES = 10  # Attempts to draw a rectangle that fits, as in torchvision.


class Policy(NamedTuple):
  """How training images are augmented and normalised.

  Hashable, since it is a static argument of jitted functions.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  white: int  # The pixel value that is scaled to 1; see `white`.
  padding: int | None = None  # Border for crops, in pixels; None for no crops.
  flips: bool = False
  num_ops: int = 0  # Operations of RandAugment per image.
  magnitude: int = 0  # Magnitude of RandAugment, from 0 to 30.
  color_jitter: float = 0.0  # Strength; see `rand_augment.draw_jitter`.
  random_erasing: float = 0.0  # Probability; see `draw_erased`.


def augment(
  images: jax.Array,
  draw: tuple[jax.Array, Any, Any],
  policy: Policy,
  *,
  num_images: int,
  rows: slice,
) -> jax.Array:
  """Augment and normalise this process's rows of a batch.

  Args:
    images: the rows, [b, H, W, C]; uint8 with 1 or 3 channels for RandAugment
      and colour jitter.
    draw: PRNG key, epoch and step.
    policy: how images are augmented and normalised.
    num_images: size of the global batch.
    rows: the rows of the global batch that `images` holds.

  Returns:
    float32 [b, H, W, C].
  """
  key, epoch, step = draw
  key = jax.random.fold_in(jax.random.fold_in(key, epoch), step)
  key_of = lambda number: jax.random.fold_in(key, number)
  _, height, width, _ = images.shape
  shape = (height, width)
  if policy.padding is not None:
    offsets, flips = draw_crops(key, num_images, padding=policy.padding)
    offsets, flips = offsets[rows], flips[rows] & policy.flips
    images = pad_crop_flip(images, offsets, flips, padding=policy.padding)
  if policy.num_ops:
    ops, strengths = rand_augment.draw_operations(
      key_of(_OPERATIONS),
      num_images,
      num_ops=policy.num_ops,
      magnitude=policy.magnitude,
    )
    images = rand_augment.rand_augment(
      images.astype(jnp.float32), ops[:, rows], strengths[:, rows]
    )
  if policy.color_jitter:
    kinds, factors = rand_augment.draw_jitter(
      key_of(_JITTER), num_images, strength=policy.color_jitter
    )
    images = rand_augment.color_jitter(
      images.astype(jnp.float32), kinds[:, rows], factors[:, rows]
    )
  images = normalise(images, policy.mean, policy.std, white=policy.white)
  if policy.random_erasing:
    boxes = draw_erased(
      key_of(_ERASING), num_images, shape, probability=policy.random_erasing
    )
    erased = mixing.in_boxes(boxes[rows], shape)
    images = jnp.where(erased[..., None], 0, images)
  return images


def draw_crops(
  key: jax.Array, num_images: int, *, padding: int
) -> tuple[jax.Array, jax.Array]:
  """Draw a crop and a flip per image.

  Args:
    key: PRNG key; consumed.
    num_images: size of the global batch.
    padding: width of the border added before the crop, in pixels.

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

  Applied before normalisation, as in torchvision's RandomCrop(padding=...), so
  that the border is black and not the mean colour.

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


def draw_erased(
  key: jax.Array,
  num_images: int,
  shape: tuple[int, int],
  *,
  probability: float,
) -> jax.Array:
  """Draw a rectangle to erase from some of the images.

  Zhong et al., "Random Erasing Data Augmentation", 2020 (arXiv 1708.04896),
  with torchvision's bounds. Pixels are set to 0 after normalisation, which is
  the mean colour.

  Args:
    key: PRNG key; consumed.
    num_images: B.
    shape: (H, W).
    probability: probability that an image loses a rectangle.

  Returns:
    Boxes int32 [B, 4] as in `types.Mixing`; empty where nothing is erased.
  """
  # All attempts are drawn at once, and the first that fits is taken.
  keys = jax.random.split(key, 4)
  tries = (num_images, _NUM_TRIES)
  sides = np.array(shape)
  area = sides.prod() * jax.random.uniform(
    keys[0], tries, jnp.float32, *_ERASED_SCALE
  )
  ratio = jnp.exp(
    jax.random.uniform(keys[1], tries, jnp.float32, *np.log(_ERASED_RATIO))
  )
  sizes = jnp.sqrt(jnp.stack([area * ratio, area / ratio], axis=-1))
  sizes = jnp.round(sizes).astype(jnp.int32)
  fits = jnp.all(sizes < sides, axis=-1)
  first = jnp.argmax(fits, axis=1)
  sizes = sizes[jnp.arange(num_images), first]
  erased = jax.random.bernoulli(keys[2], probability, (num_images,))
  erased &= jnp.any(fits, axis=1)
  sizes = jnp.where(erased[:, None], sizes, 0)
  corners = jax.random.randint(
    keys[3], sizes.shape, 0, jnp.maximum(sides - sizes + 1, 1)
  )
  return jnp.concatenate([corners, corners + sizes], axis=-1)


def white(dtype: np.dtype, bit_depth: int) -> int:
  """Return the pixel value that normalisation scales to 1.

  Args:
    dtype: type of the pixels; floats are not scaled.
    bit_depth: significant bits of uint16 pixels.
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
    mean: one value, or one per channel, on the scale where `white` is 1.
    std: one value, or one per channel, on the same scale.
    white: the pixel value that is scaled to 1; see `white`.

  Returns:
    float32 [B, H, W, C].
  """
  scaled = images.astype(jnp.float32) / white
  return (scaled - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)
