"""Decode, convert, crop and resize images on the host, with Pillow.

Resizing is bilinear and antialiased, and the random crop is torchvision's
RandomResizedCrop, so that accuracies compare with published ones.
"""

from __future__ import annotations

import io
import math
import pathlib

import numpy as np
from PIL import Image

from l2t_jax import errors

# Bounds of torchvision's RandomResizedCrop: share of the area, width / height.
CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


def decode(file: pathlib.Path | io.BytesIO, *, name: str) -> Image.Image:
  """Read a whole image.

  Args:
    file: path or content of the image file.
    name: of the image, for error messages.

  Raises:
    errors.InputError: the image is damaged, or its pixels have 32 bits.
  """
  try:
    with Image.open(file) as image:
      image.load()
  # Pillow's decoders raise errors of many types for broken files.
  except Exception as error:
    raise errors.InputError(
      f"image {name} cannot be read ({type(error).__name__}); replace or"
      " remove it"
    ) from error
  if image.mode == "I" and image.format == "PPM":  # 16 bits per pixel.
    return Image.fromarray(np.asarray(image).astype(np.uint16))
  if image.mode in ("I", "F"):
    kind = "integers" if image.mode == "I" else "floats"
    raise errors.InputError(
      f"image {name} has pixels of 32 bits ({kind}), whose values for black and"
      " white are unknown; save it with 8 or 16 bits"
    )
  return image


def convert(image: Image.Image, channels: int) -> Image.Image:
  """Convert an image of any mode to grey (1 channel) or RGB (3)."""
  if image.mode.startswith("I;16"):  # Pillow would clip, not scale.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  return image.convert("L" if channels == 1 else "RGB")


def to_array(image: Image.Image) -> np.ndarray:
  """Return the pixels of a grey or RGB image, uint8 [H, W, C]."""
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
  """Resize with the antialiased bilinear filter."""
  return image.resize((width, height), Image.Resampling.BILINEAR)


def resize_and_center_crop(
  image: Image.Image, *, resized: int, size: int
) -> Image.Image:
  """Resize the short side to `resized`, then crop the central square.

  Args:
    image: of any size.
    resized: length of the short side before the crop, at least `size`.
    size: side of the square.

  Returns:
    An image of size x size.
  """
  # torchvision's Resize rounds the long side down.
  width, height = (side * resized // min(image.size) for side in image.size)
  left, top = round((width - size) / 2), round((height - size) / 2)
  box = (left, top, left + size, top + size)
  return resize(image, width, height).crop(box)


def random_resized_crop_flip(
  image: Image.Image, rng: np.random.Generator, *, size: int
) -> Image.Image:
  """Crop a random box, resize it to size x size, and mirror it or not."""
  box = random_box(*image.size, rng)
  # The crop comes first: resize(box=...) would mix in pixels from outside.
  crop = resize(image.crop(box), size, size)
  if rng.random() < 0.5:
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return crop


def random_box(
  width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Draw (left, top, right, bottom) as RandomResizedCrop.get_params does."""
  for _ in range(10):
    area = width * height * rng.uniform(*CROP_SCALE)
    ratio = math.exp(rng.uniform(*np.log(CROP_RATIO)))
    box_width = round(math.sqrt(area * ratio))
    box_height = round(math.sqrt(area / ratio))
    if 0 < box_width <= width and 0 < box_height <= height:
      left = int(rng.integers(width - box_width + 1))
      top = int(rng.integers(height - box_height + 1))
      return left, top, left + box_width, top + box_height
  # No box fitted: take the largest central one with an allowed ratio.
  box_width = min(width, round(height * CROP_RATIO[1]))
  box_height = min(height, round(width / CROP_RATIO[0]))
  left, top = (width - box_width) // 2, (height - box_height) // 2
  return left, top, left + box_width, top + box_height
