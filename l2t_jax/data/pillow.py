"""Decode, convert, crop and resize images on the host, with Pillow.

Resizing is bilinear and antialiased, and the random crop is torchvision's
RandomResizedCrop, so that accuracies compare with published ones.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import pathlib
import sys

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from l2t_jax import errors, imports

# Bounds of torchvision's RandomResizedCrop: share of the area, width / height.
CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# How many of the 16 bits of a channel cameras and scanners use.
BIT_DEPTHS = (8, 10, 12, 14, 16)

# Vector formats, and formats that Pillow recognises without reading them.
_NOT_RASTER = {"EPS", "MPEG"}
# What reads the other byte of a channel of 16 bits: B is big-endian, L little,
# N native.
_OTHER_BYTE = {
  "16B": "16L",
  "16L": "16B",
  "16N": "16B" if sys.byteorder == "little" else "16L",
}
_NUM_SAMPLES = 16  # Of a row and a column, for a thumbprint.
_BITS_PER_SAMPLE, _PLANAR_CONFIGURATION = 258, 284  # TIFF tags.


@functools.cache
def suffixes() -> tuple[str, ...]:
  """Return how the names of image files end, in lower case, sorted.

  They are those of all raster formats that Pillow reads, and of HEIF (.heic) if
  pillow-heif is installed.
  """
  _register_formats()
  formats = {
    name
    for name, (factory, _) in Image.OPEN.items()
    if name not in _NOT_RASTER
    and not (
      isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    )
  }
  formats.add("MPO")  # Opened as a JPEG; 3D cameras and some phones write it.
  known = Image.registered_extensions()
  return tuple(sorted(s for s, name in known.items() if name in formats))


def decode(
  file: pathlib.Path | io.BytesIO, *, name: str
) -> Image.Image | np.ndarray:
  """Read a whole image, as it was meant to be seen.

  Args:
    file: path or content of the image file.
    name: of the image, for error messages.

  Returns:
    An image of 8 bits per channel, rotated and mirrored as its EXIF orientation
    says; or uint16 [H, W, C] if the file has more bits.

  Raises:
    errors.InputError: the image is damaged, or its pixels have 32 bits.
  """
  if isinstance(file, pathlib.Path) and file.exists() and not file.is_file():
    raise errors.InputError(  # Of a pipe, reading would never end.
      f"image {name} is no regular file; remove it"
    )
  try:
    image, rawmodes = _load(file)
  # Pillow's decoders raise errors of many types for broken files.
  except Exception as error:
    raise errors.InputError(
      f"image {name} cannot be read ({type(error).__name__}); replace or"
      " remove it"
    ) from error
  if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
    kind = "integers" if image.mode == "I" else "floats"
    raise errors.InputError(
      f"image {name} has pixels of 32 bits ({kind}), whose values for black and"
      " white are unknown; save it with 8 or 16 bits"
    )
  if _is_misread(image):
    raise errors.InputError(
      f"image {name} has more than 8 bits per channel, in separate planes,"
      " which Pillow misreads; save it with interleaved channels, or as PNG"
    )
  if image.mode.startswith("I"):
    return np.asarray(image).astype(np.uint16)[..., None]
  if image.mode in ("RGB", "RGBA", "LA") and "16" in "".join(rawmodes):
    return _all_16_bits(file, image)
  return image


def bit_depth(maximum: int) -> int:
  """Return the smallest of BIT_DEPTHS that holds a value up to 65,535."""
  return next(depth for depth in BIT_DEPTHS if maximum < 2**depth)


def convert(
  image: Image.Image | np.ndarray, channels: int, depth: int
) -> Image.Image:
  """Convert an image of any mode to grey (1 channel) or RGB (3) of 8 bits.

  Args:
    image: from `decode`, or uint8 [H, W, C].
    channels: of the result.
    depth: of a uint16 image: 2^depth - 1 becomes white. Larger values do, too.
  """
  if isinstance(image, np.ndarray):
    pixels = image
    if pixels.dtype == np.uint16:
      pixels = np.minimum(pixels >> (depth - 8), 255).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  if image.mode == "LAB":  # `Image.convert` has no way from it to RGB.
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    in_rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert in_rgb
    image = in_rgb
  return image.convert("L" if channels == 1 else "RGB")


def thumbprint(image: Image.Image | np.ndarray) -> tuple[object, ...]:
  """Return what images with equal pixels have in common; few others do.

  Args:
    image: from `decode`, or uint8 [H, W, C].
  """
  if isinstance(image, np.ndarray):
    rows, columns = (
      np.linspace(0, side - 1, _NUM_SAMPLES).astype(int)
      for side in image.shape[:2]
    )
    if image.dtype != np.uint8:
      return (image.shape, image[np.ix_(rows, columns)].tobytes())
    image = convert(image, 3, 8)
  samples = image.resize((_NUM_SAMPLES,) * 2, Image.Resampling.NEAREST)
  return (image.size, convert(samples, 3, 8).tobytes())


def are_equal(
  one: Image.Image | np.ndarray, other: Image.Image | np.ndarray
) -> bool:
  """Return whether two images from `decode` have the same pixels, as RGB."""
  if isinstance(one, np.ndarray) and one.dtype != np.uint8:
    return np.array_equal(one, np.asarray(other))
  first, second = (np.asarray(convert(image, 3, 8)) for image in (one, other))
  return np.array_equal(first, second)


def is_transparent(image: Image.Image | np.ndarray) -> bool:
  """Return whether an image from `decode` has pixels that are not opaque."""
  if isinstance(image, np.ndarray):
    has_alpha = image.shape[-1] in (2, 4)
    return has_alpha and image[..., -1].min() < np.iinfo(image.dtype).max
  if not image.has_transparency_data:
    return False
  return bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)


@functools.cache
def _register_formats():
  Image.init()
  if imports.is_installed("pillow_heif"):
    heif = imports.require("pillow_heif", needed_for="HEIF images")
    heif.register_heif_opener()


def _load(file, swap=False):
  """Return (image, how the bytes of its pixels are read)."""
  _register_formats()
  with Image.open(file) as image:
    rawmodes = []
    for index, (codec, box, offset, args) in enumerate(image.tile):
      first, *rest = args if isinstance(args, tuple) else (args,)
      rawmodes.append(str(first))
      if swap:
        mode, _, order = str(first).partition(";")
        swapped = f"{mode};{_OTHER_BYTE[order]}"
        args = (swapped, *rest) if isinstance(args, tuple) else swapped
        image.tile[index] = ImageFile._Tile(codec, box, offset, args)
    image.load()
  # A damaged EXIF block is no damage to the image; viewers ignore it, too.
  with contextlib.suppress(Exception):
    ImageOps.exif_transpose(image, in_place=True)
  return image, rawmodes


def _is_misread(image):
  """Return whether Pillow mistakes the planes of a TIFF for 8-bit ones."""
  tags = getattr(image, "tag_v2", {})
  is_deep = max(tags.get(_BITS_PER_SAMPLE, (8,))) > 8
  return is_deep and tags.get(_PLANAR_CONFIGURATION) == 2


def _all_16_bits(file, image):
  """Return uint16 [H, W, C], of which Pillow keeps the higher bytes."""
  pixels = np.asarray(image).astype(np.uint16) << 8
  if image.mode != "LA":  # Pillow does not read the other bytes of these.
    if isinstance(file, io.BytesIO):
      file.seek(0)
    pixels |= np.asarray(_load(file, swap=True)[0])
  return pixels


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
