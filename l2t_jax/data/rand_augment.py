"""RandAugment and colour jitter on the device, as Pillow computes them.

Images are float32 [B, H, W, C], grey or RGB, with values from 0 to 255. Results
stay in this range and are not rounded. Each image gets its own operation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

MAX_MAGNITUDE = 30
# Values at the largest magnitude, as in torchvision.transforms.RandAugment.
_SHEAR = 0.3
_TRANSLATION = 150 / 331  # Fraction of the side.
_DEGREES = 30.0
_CHANGE = 0.9  # The factors of `enhance` are 1 ± this.
_LOST_BITS = 4  # Bits that posterize drops.

# Geometric operations come first, so that an index into `OPERATIONS` is also an
# index into the matrices of `_matrices`.
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
# ITU-R 601, as in Pillow's conversion of RGB to grey.
_LUMA = (0.299, 0.587, 0.114)
# Pillow's ImageFilter.SMOOTH: weight of the central pixel, where its neighbours
# have 1, and the sum of all nine weights.
_MIDDLE, _ALL = 5.0, 13.0


def draw_operations(
  key: jax.Array, num_images: int, *, num_ops: int, magnitude: int
) -> tuple[jax.Array, jax.Array]:
  """Draw the operations of RandAugment.

  Args:
    key: PRNG key; consumed.
    num_images: B.
    num_ops: operations per image.
    magnitude: strength of the operations, from 0 to `MAX_MAGNITUDE`.

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
  magnitudes of torchvision, but with bilinear instead of nearest-neighbour
  interpolation, and translations by fractions of a pixel.

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

  Like torchvision.transforms.ColorJitter with the same strength for all three.

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
  """Apply a function once per drawn row; `scan` compiles it only once."""
  step = lambda images, one: (function(images, *one), None)
  return jax.lax.scan(step, images, drawn)[0]


def operate(
  images: jax.Array, ops: jax.Array, strengths: jax.Array
) -> jax.Array:
  """Apply an operation to each image.

  Args:
    images: [B, H, W, C].
    ops: indices into `OPERATIONS`, [B].
    strengths: from -1 to 1, [B]. The sign is the direction; operations without
      a direction use the absolute value.
  """
  # Images of a batch have different operations: compute the results of all
  # operations for every image, then select one.
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
  """Blend each image with a degenerate one, as Pillow's ImageEnhance does.

  Args:
    images: [B, H, W, C].
    kinds: the degenerate image, [B]: 0 for black (brightness), 1 for the mean
      (contrast), 2 for grey (color), 3 for a smoothed image (sharpness).
    factors: [B]; 1 keeps the image, 0 gives the degenerate one, and above 1
      extrapolates away from it.
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
  """Smooth each pixel with its neighbours, except those at the border."""
  height, width = images.shape[1:3]
  if min(height, width) < 3:
    return images
  window = lambda i, j: images[:, i : height - 2 + i, j : width - 2 + j]
  total = sum(window(i, j) for i in range(3) for j in range(3))
  smooth = (total + (_MIDDLE - 1) * window(1, 1)) / _ALL
  return images.at[:, 1:-1, 1:-1].set(smooth)


def _autocontrast(images):
  """Stretch each channel to the range 0 to 255, unless it is constant."""
  lowest = jnp.min(images, axis=(1, 2), keepdims=True)
  extent = jnp.max(images, axis=(1, 2), keepdims=True) - lowest
  stretched = (images - lowest) * 255 / jnp.where(extent > 0, extent, 1)
  return jnp.where(extent > 0, stretched, images)


def _equalize(images):
  """Equalise the histogram of each channel, as ImageOps.equalize does."""
  batch_size, height, width, channels = images.shape
  values = jnp.clip(jnp.round(images), 0, 255).astype(jnp.int32)
  rows = jnp.moveaxis(values, -1, 1).reshape(batch_size * channels, -1)
  counts = jax.vmap(functools.partial(jnp.bincount, length=256))(rows)
  # As in Pillow, pixels of the largest value do not count for the step.
  brightest = jnp.max(rows, axis=1, keepdims=True)
  of_brightest = jnp.take_along_axis(counts, brightest, axis=1)
  step = (rows.shape[1] - of_brightest) // 255
  below = jnp.cumsum(counts, axis=1) - counts
  table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
  # The step is 0 with few pixels, or if nearly all have the largest value: keep
  # the channel.
  table = jnp.where(step > 0, table, jnp.arange(256))
  equal = jnp.take_along_axis(table, rows, axis=1).astype(images.dtype)
  return jnp.moveaxis(equal.reshape(batch_size, channels, height, width), 1, -1)


def _matrices(shape, ops, strengths):
  """Return affine maps from output to input coordinates (x, y), [B, 2, 3].

  Shears fix the upper left corner, rotations fix the centre.
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
  # Other operations get any matrix: `operate` does not select their warp.
  chosen = jnp.minimum(ops, len(_GEOMETRIC) - 1)
  picked = by_op[chosen, :, jnp.arange(len(ops))]
  return picked.reshape(-1, 2, 3)


def _warp(images, matrices):
  """Sample each image at transformed positions, bilinearly; black outside."""
  _, height, width, _ = images.shape
  # Pixel centres lie at half-integers, as in Pillow.
  columns, rows = jnp.meshgrid(
    jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
  )
  places = jnp.stack([columns, rows, jnp.ones_like(rows)])

  def warp(image, matrix):
    # Coordinates lose too many digits in bfloat16 or TF32.
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
