"""RandAugment and colour jitter on the device, as Pillow computes them.

Images are float32 [B, H, W, C] on a scale from 0 to 255, grey or RGB, and stay
on it; they are not rounded. Every image has its own operation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

MAX_MAGNITUDE = 30
# Largest values, those of torchvision.transforms.RandAugment.
_SHEAR = 0.3
_TRANSLATION = 150 / 331  # Share of the side.
_DEGREES = 30.0
_CHANGE = 0.9  # Of what `enhance` multiplies.
_LOST_BITS = 4

# The geometric operations come first; `_matrices` has them in this order.
_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_ENHANCING = ("brightness", "contrast", "color", "sharpness")
OPERATIONS = (
  *_GEOMETRIC,
  *_ENHANCING,
  "posterize",
  "solarize",
  "autocontrast",
  "equalize",
  "identity",
)
# Of ITU-R 601, as Pillow converts RGB to grey.
_LUMA = (0.299, 0.587, 0.114)
# Pillow's ImageFilter.SMOOTH, as how much the middle and the others weigh.
_MIDDLE, _ALL = 5.0, 13.0


def draw_operations(
  key: jax.Array, num_images: int, *, num_ops: int, magnitude: int
) -> tuple[jax.Array, jax.Array]:
  """Draw the operations of RandAugment.

  Args:
    key: PRNG key; consumed.
    num_images: B.
    num_ops: operations per image.
    magnitude: their strength, from 0 to `MAX_MAGNITUDE`.

  Returns:
    Operations and their strengths, [num_ops, B], for `rand_augment`.
  """
  op_key, sign_key = jax.random.split(key)
  shape = (num_ops, num_images)
  ops = jax.random.randint(op_key, shape, 0, len(OPERATIONS))
  signs = jax.random.rademacher(sign_key, shape, jnp.float32)
  return ops, signs * magnitude / MAX_MAGNITUDE


def rand_augment(
  images: jax.Array, ops: jax.Array, strengths: jax.Array
) -> jax.Array:
  """Apply operations to each image, one after the other.

  Cubuk et al., "RandAugment", 2020 (arXiv 1909.13719), with the operations and
  magnitudes of torchvision, but bilinear instead of nearest neighbours, and
  translations that are no whole pixels.

  Args:
    images: [B, H, W, C].
    ops: [num_ops, B]; see `operate`.
    strengths: [num_ops, B].
  """
  return _one_after_the_other(operate, images, ops, strengths)


def draw_jitter(
  key: jax.Array, num_images: int, *, strength: float
) -> tuple[jax.Array, jax.Array]:
  """Draw a colour jitter of brightness, contrast and saturation.

  As torchvision.transforms.ColorJitter with one strength for all three.

  Args:
    key: PRNG key; consumed.
    num_images: B.
    strength: factors are drawn from 1 - strength (not below 0) to 1 + strength.

  Returns:
    Kinds, in a random order for each image, and factors, [3, B], for
    `color_jitter`.
  """
  order_key, factor_key = jax.random.split(key)
  shape = (3, num_images)
  kinds = jnp.argsort(jax.random.uniform(order_key, shape), axis=0)
  lowest, highest = max(0.0, 1 - strength), 1 + strength
  factors = jax.random.uniform(factor_key, shape, jnp.float32, lowest, highest)
  return kinds, factors


def color_jitter(
  images: jax.Array, kinds: jax.Array, factors: jax.Array
) -> jax.Array:
  """Enhance each image several times.

  Args:
    images: [B, H, W, C].
    kinds: [n, B]; see `enhance`.
    factors: [n, B].
  """
  return _one_after_the_other(enhance, images, kinds, factors)


def _one_after_the_other(function, images, *drawn):
  """Apply a function for each entry of what was drawn; compile it once."""
  step = lambda images, one: (function(images, *one), None)
  return jax.lax.scan(step, images, drawn)[0]


def operate(
  images: jax.Array, ops: jax.Array, strengths: jax.Array
) -> jax.Array:
  """Apply an operation to each image.

  Args:
    images: [B, H, W, C].
    ops: indices into `OPERATIONS`, [B].
    strengths: from -1 to 1, [B]. The sign is a direction; operations that have
      none read the size alone.
  """
  warped = _warp(images, _matrices(images.shape, ops, strengths))
  kinds = ops - len(_GEOMETRIC)
  enhanced = enhance(images, kinds, 1 + _CHANGE * strengths)
  size = jnp.abs(strengths)[:, None, None, None]
  step = 2.0 ** jnp.round(_LOST_BITS * size)
  results = {
    "posterize": jnp.floor(images / step) * step,
    "solarize": jnp.where(images < 255 * (1 - size), images, 255 - images),
    "autocontrast": _autocontrast(images),
    "equalize": _equalize(images),
    "identity": images,
  }
  results |= dict.fromkeys(_GEOMETRIC, warped)
  results |= dict.fromkeys(_ENHANCING, enhanced)
  chosen = ops[:, None, None, None]
  return jnp.select(
    [chosen == i for i in range(len(OPERATIONS))],
    [results[name] for name in OPERATIONS],
  )


def enhance(
  images: jax.Array, kinds: jax.Array, factors: jax.Array
) -> jax.Array:
  """Move each image away from a plainer one, as Pillow's ImageEnhance does.

  Args:
    images: [B, H, W, C].
    kinds: 0 for brightness (away from black), 1 for contrast (from the mean),
      2 for color (from grey), 3 for sharpness (from a smoothed image), [B].
    factors: 1 leaves the image, 0 gives the plainer one, [B].
  """
  grey = images
  if images.shape[-1] == 3:
    grey = jnp.sum(images * jnp.array(_LUMA), axis=-1, keepdims=True)
  mean = jnp.mean(grey, axis=(1, 2, 3), keepdims=True)
  plain = jnp.select(
    [kinds[:, None, None, None] == kind for kind in range(4)],
    [
      jnp.zeros_like(images),
      jnp.broadcast_to(mean, images.shape),
      jnp.broadcast_to(grey, images.shape),
      _smooth(images),
    ],
  )
  factors = factors[:, None, None, None]
  return jnp.clip(plain + factors * (images - plain), 0, 255)


def _smooth(images):
  """Average each pixel, but those at the border, with its neighbours."""
  height, width = images.shape[1:3]
  if min(height, width) < 3:
    return images
  window = lambda i, j: images[:, i : height - 2 + i, j : width - 2 + j]
  total = sum(window(i, j) for i in range(3) for j in range(3))
  smooth = (total + (_MIDDLE - 1) * window(1, 1)) / _ALL
  return images.at[:, 1:-1, 1:-1].set(smooth)


def _autocontrast(images):
  """Stretch each channel from 0 to 255, where it varies."""
  lowest = jnp.min(images, axis=(1, 2), keepdims=True)
  extent = jnp.max(images, axis=(1, 2), keepdims=True) - lowest
  stretched = (images - lowest) * 255 / jnp.where(extent > 0, extent, 1)
  return jnp.where(extent > 0, stretched, images)


def _equalize(images):
  """Make the histogram of each channel even, as ImageOps.equalize does."""
  batch_size, height, width, channels = images.shape
  values = jnp.clip(jnp.round(images), 0, 255).astype(jnp.int32)
  rows = jnp.moveaxis(values, -1, 1).reshape(batch_size * channels, -1)
  counts = jax.vmap(functools.partial(jnp.bincount, length=256))(rows)
  brightest = jnp.max(rows, axis=1, keepdims=True)
  of_brightest = jnp.take_along_axis(counts, brightest, axis=1)
  step = (rows.shape[1] - of_brightest) // 255
  below = jnp.cumsum(counts, axis=1) - counts
  table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
  # With few pixels, or one value in nearly all of them, there is no step.
  table = jnp.where(step > 0, table, jnp.arange(256))
  equal = jnp.take_along_axis(table, rows, axis=1).astype(images.dtype)
  return jnp.moveaxis(equal.reshape(batch_size, channels, height, width), 1, -1)


def _matrices(shape, ops, strengths):
  """Return (x, y) of the result -> (x, y) of the image, [B, 2, 3].

  Shears leave the upper left corner where it is, rotations the centre.
  """
  _, height, width, _ = shape
  angle = jnp.deg2rad(_DEGREES * strengths)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x, y = width / 2, height / 2
  zero, one = jnp.zeros_like(strengths), jnp.ones_like(strengths)
  matrices = {
    "shear_x": (one, _SHEAR * strengths, zero, zero, one, zero),
    "shear_y": (one, zero, zero, _SHEAR * strengths, one, zero),
    "translate_x": (
      one,
      zero,
      _TRANSLATION * width * strengths,
      zero,
      one,
      zero,
    ),
    "translate_y": (
      one,
      zero,
      zero,
      zero,
      one,
      _TRANSLATION * height * strengths,
    ),
    "rotate": (
      cos,
      -sin,
      x - x * cos + y * sin,
      sin,
      cos,
      y - x * sin - y * cos,
    ),
  }
  by_op = jnp.stack([jnp.stack(matrices[name]) for name in _GEOMETRIC])
  chosen = jnp.minimum(ops, len(_GEOMETRIC) - 1)
  picked = by_op[chosen, :, jnp.arange(len(ops))]
  return picked.reshape(-1, 2, 3)


def _warp(images, matrices):
  """Read each image at transformed places, bilinearly; black outside."""
  _, height, width, _ = images.shape
  columns, rows = jnp.meshgrid(
    jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
  )
  places = jnp.stack([columns, rows, jnp.ones_like(rows)])

  def warp(image, matrix):
    x, y = jnp.einsum("ij,jhw->ihw", matrix, places, precision="highest")
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    read = functools.partial(
      jax.scipy.ndimage.map_coordinates,
      coordinates=[y - 0.5, x - 0.5],
      order=1,
      mode="nearest",
    )
    channels = jax.vmap(read, in_axes=-1, out_axes=-1)(image)
    return jnp.where(is_inside[..., None], channels, 0)

  return jax.vmap(warp)(images, matrices)
