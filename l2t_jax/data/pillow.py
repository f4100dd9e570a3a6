"""Decode, convert, crop and resize images on the host, with Pillow.

Resizing is bilinear and antialiased, and the random crop is torchvision's
RandomResizedCrop, so that accuracies compare with published ones.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import hashlib
import io
import math
import pathlib
import sys
from typing import Any, NamedTuple
import warnings

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
# How bytes of 16 bits per channel are read, of images that are not grey.
_DEEP_COLOUR = ("RGB;16", "RGBA;16", "RGBX;16", "LA;16")
_NUM_SAMPLES = 16  # Of a row and a column, for a thumbprint.
# TIFF tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR_CONFIGURATION = 258, 262, 284
# Formats of several pages or frames; the others of an MPO are previews.
_WITH_FRAMES = {"TIFF", "GIF", "WEBP", "PNG", "AVIF"}
_JPEG2000_START = b"\xff\x4f\xff\x51"  # SOC and SIZ.


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
    errors.InputError: the image is damaged, or of a kind that Pillow misreads.
  """
  if isinstance(file, pathlib.Path) and file.exists() and not file.is_file():
    raise errors.InputError(  # Of a pipe, reading would never end.
      f"image {name} is no regular file; remove it"
    )
  try:
    # Of a file that it opens itself, Pillow maps the memory, and mixes up the
    # rows of a TIFF that lies on its side.
    with (
      contextlib.nullcontext(file)
      if isinstance(file, io.BytesIO)
      else file.open("rb")
    ) as stream:
      image, tiles = _load(stream)
      reason = _why_misread(stream, image, tiles)
      deep = None if reason else _read_deep(stream, image, tiles)
  # Pillow's decoders raise errors of many types for broken files.
  except Exception as error:
    raise errors.InputError(
      f"image {name} cannot be read ({type(error).__name__}); replace or"
      " remove it"
    ) from error
  if reason:
    raise errors.InputError(f"image {name} has {reason}")
  return image if deep is None else deep


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
  if image.mode == "P" and image.has_transparency_data:
    image = image.convert("RGBA")  # Otherwise Pillow warns.
  if image.mode == "LAB":  # `Image.convert` has no way from it to RGB.
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    in_rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert in_rgb
    image = in_rgb
  return image.convert("L" if channels == 1 else "RGB")


def is_grey_or_rgb(pixels: np.ndarray) -> bool:
  """Return whether `convert` takes an array [..., C] that is no file's."""
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
  """Grey images of one size, used as if they were one `Image`."""

  images: tuple[Image.Image, ...]

  @classmethod
  def of(cls, pixels):
    # Pillow resizes 16 bits as floats, which hold them exactly.
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
  """Return what images with equal pixels have in common; few others do.

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


def digest(image: Image.Image | np.ndarray) -> bytes:
  """Return a digest of the pixels: equal for equal images, as RGB.

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


@functools.cache
def _register_formats():
  Image.init()
  if imports.is_installed("pillow_heif"):
    heif = imports.require("pillow_heif", needed_for="HEIF images")
    heif.register_heif_opener()


def _load(stream, rawmode=""):
  """Return the image, and the tiles that say how its bytes are read.

  Args:
    stream: the file.
    rawmode: how they are read instead.
  """
  _register_formats()
  stream.seek(0)
  image = Image.open(stream)
  tiles = list(image.tile)
  if rawmode:
    for index, (codec, box, offset, args) in enumerate(tiles):
      args = (rawmode, *args[1:]) if isinstance(args, tuple) else rawmode
      image.tile[index] = ImageFile._Tile(codec, box, offset, args)
  is_animated = image.format in _WITH_FRAMES and getattr(
    image, "is_animated", False
  )
  if is_animated and not rawmode:
    warnings.warn(
      "some images have several pages or frames, of which the first is read",
      stacklevel=2,
    )
    image.seek(0)
  image.load()
  # A damaged EXIF block is no damage to the image; viewers ignore it, too.
  with contextlib.suppress(Exception):
    ImageOps.exif_transpose(image, in_place=True)
  return image, tiles


def _rawmode(tiles):
  """Return how the bytes of an image's pixels are read: RGB, I;16B, ..."""
  args = tiles[0].args if tiles else ""
  return str(args[0] if isinstance(args, tuple) else args)


def _why_misread(stream, image, tiles):
  """Return what is wrong with an image that Pillow reads, and what to do."""
  if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
    kind = "32-bit integers" if image.mode == "I" else "floats"
    if _rawmode(tiles).endswith("S"):
      kind = "signed integers"
    return (
      f"pixels that are {kind}, whose values for black and white are unknown;"
      " save it with 8 or 16 unsigned bits"
    )
  tags = getattr(image, "tag_v2", {})
  is_deep = max(tags.get(_BITS_PER_SAMPLE, (8,))) > 8
  if is_deep and tags.get(_PLANAR_CONFIGURATION) == 2:
    how = "in separate planes"
  elif is_deep and not (
    image.mode.startswith("I") or _rawmode(tiles).startswith(_DEEP_COLOUR)
  ):
    how = f"as {_rawmode(tiles).partition(';')[0]}"
  elif (
    image.format == "JPEG2000"
    and image.mode != "I;16"
    and _jpeg2000_depth(stream) > 8
  ):
    how = "as JPEG 2000"
  elif (
    image.format == "PPM"
    and image.mode == "RGB"
    and tiles[0].codec_name == "ppm_plain"
    and tiles[0].args[1] > 255
  ):
    how = "as text"
  else:
    return ""
  return (
    f"more than 8 bits per channel, {how}, which Pillow misreads; save it as"
    " PNG, or as TIFF with interleaved channels"
  )


def _jpeg2000_depth(stream):
  """Return the bits per channel that the header of a codestream says."""
  stream.seek(0)
  content = stream.read()
  start = content.index(_JPEG2000_START)
  return (content[start + 42] & 0x7F) + 1


def _read_deep(stream, image, tiles):
  """Return the uint16 [H, W, C] of more than 8 bits; None for other images."""
  if image.mode.startswith("I"):
    values = np.asarray(image)[..., None]
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == 0:  # White is 0, which Pillow leaves so.
      values = 2 ** tags[_BITS_PER_SAMPLE][0] - 1 - values
    return values.astype(np.uint16)
  if image.format == "PPM" and tiles[0].codec_name == "ppm":
    maximum = tiles[0].args[1]
    if image.mode == "L" or maximum < 256:
      return None
    stream.seek(tiles[0].offset)
    pixels = np.frombuffer(stream.read(), ">u2", math.prod(image.size) * 3)
    pixels = pixels.reshape(image.height, image.width, 3).astype(np.uint32)
    return (pixels * (2**16 - 1) // maximum).astype(np.uint16)
  mode, _, order = _rawmode(tiles).partition(";")
  if not _rawmode(tiles).startswith(_DEEP_COLOUR):
    return None
  if mode == "LA":  # Read the two bytes of both channels as four channels.
    both = np.ascontiguousarray(_load(stream, "RGBA")[0])
    return both.view(">u2").astype(np.uint16)
  # Pillow keeps the higher byte of each channel.
  lower, _ = _load(stream, f"{mode};{_OTHER_BYTE[order]}")
  return np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)


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
