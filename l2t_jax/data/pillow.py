"""Convert, crop and resize images on the host, with Pillow.

Resizing is bilinear and antialiased, and the random crop is torchvision's
RandomResizedCrop, so that accuracies are comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Callable
import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

# Bounds of torchvision's RandomResizedCrop: area fraction, width / height.
CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
_NUM_SAMPLES = 16  # Pixels per row and per column in a thumbprint.


def convert(
  image: Image.Image | np.ndarray, channels: int, depth: int
) -> Image.Image:
  """Convert an image of any mode to 8-bit grey (1 channel) or RGB (3).

  Args:
    image: from `decode`, or uint8 [H, W, C].
    channels: channels of the result.
    depth: bit depth of uint16 images: 2^depth - 1 and above become white.
  """
  if isinstance(image, np.ndarray):
    pixels = image
    if pixels.dtype == np.uint16:
      pixels = np.minimum(pixels >> (depth - 8), 255).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  if image.mode == "P" and image.has_transparency_data:
    image = image.convert("RGBA")  # Otherwise Pillow warns.
  if image.mode == "LAB":  # `Image.convert` cannot convert it to RGB.
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    in_rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert in_rgb
    image = in_rgb
  return image.convert("L" if channels == 1 else "RGB")


def is_grey_or_rgb(pixels: np.ndarray) -> bool:
  """Return whether an array [..., C] of a data set is 8-bit grey or RGB.

  Only such arrays are converted; others keep their type and channels.
  """
  return pixels.dtype == np.uint8 and pixels.shape[-1] in (1, 3)


def transform_channels(
  pixels: np.ndarray, transform: Callable[[Any], Any]
) -> np.ndarray:
  """Transform each channel of an image as if it were a grey image.

  Args:
    pixels: uint8, uint16 or float32 [H, W, C].
    transform: resizes, crops and mirrors an image.

  Returns:
    The transformed channels [h, w, C], of the same type.
  """
  channels = transform(_Channels.of(pixels)).images
  values = np.stack([np.asarray(each) for each in channels], axis=-1)
  if pixels.dtype == np.uint16:
    values = np.rint(values)
  return values.astype(pixels.dtype)


class _Channels(NamedTuple):
  """The channels of an image as grey images, with the methods of one `Image`.

  A transform that draws random numbers thus treats all channels the same way.
  """

  images: tuple[Image.Image, ...]

  @classmethod
  def of(cls, pixels):
    # 16-bit channels are resized as float32, which holds them exactly.
    kind = np.uint8 if pixels.dtype == np.uint8 else np.float32
    planes = np.moveaxis(pixels, -1, 0).astype(kind, order="C")
    return cls(tuple(map(Image.fromarray, planes)))

  @property
  def size(self):
    return self.images[0].size

  def resize(self, *args):
    return _Channels(tuple(each.resize(*args) for each in self.images))

  def crop(self, box):
    return _Channels(tuple(each.crop(box) for each in self.images))

  def transpose(self, method):
    return _Channels(tuple(each.transpose(method) for each in self.images))


def thumbprint(image: Image.Image | np.ndarray) -> tuple[object, ...]:
  """Return a cheap key, equal for images with equal pixels and few others.

  Args:
    image: from `decode`, or an array [H, W, C].
  """
  if isinstance(image, np.ndarray):
    rows, columns = (
      np.linspace(0, side - 1, _NUM_SAMPLES).astype(int)
      for side in image.shape[:2]
    )
    if not is_grey_or_rgb(image):
      return (image.shape, image[np.ix_(rows, columns)].tobytes())
    image = convert(image, 3, 8)
  samples = image.resize((_NUM_SAMPLES,) * 2, Image.Resampling.NEAREST)
  return (image.size, convert(samples, 3, 8).tobytes())


def thumbprints(images: np.ndarray, indices: np.ndarray) -> list[int]:
  """Return a hash for each of some images in an array [N, H, W, C].

  As for `thumbprint`, equal images have equal hashes, but those of grey images
  differ from those of RGB images.
  """
  rows, columns = (
    np.linspace(0, side - 1, _NUM_SAMPLES).astype(int)
    for side in images.shape[1:3]
  )
  samples = images[np.ix_(indices, rows, columns)]
  return [hash((images.shape[1:], one.tobytes())) for one in samples]


def digest(image: Image.Image | np.ndarray) -> bytes:
  """Return a digest of all pixels; images with 8 bits are compared as RGB.

  Args:
    image: from `decode`, or an array [H, W, C].
  """
  if not isinstance(image, np.ndarray) or is_grey_or_rgb(image):
    image = np.asarray(convert(image, 3, 8))
  header = f"{image.dtype} {image.shape} ".encode()
  return hashlib.blake2b(header + image.tobytes(), digest_size=16).digest()


def is_transparent(image: Image.Image | np.ndarray) -> bool:
  """Return whether an image from `decode` has pixels that are not opaque."""
  if isinstance(image, np.ndarray):
    has_alpha = image.shape[-1] in (2, 4)
    return has_alpha and image[..., -1].min() < np.iinfo(image.dtype).max
  if not image.has_transparency_data:
    return False
  return bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)


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
  """Crop a random box, resize it, and mirror it with probability 1/2."""
  box = random_box(*image.size, rng)
  # Crop before resizing: resize(box=...) would mix in pixels from outside.
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
