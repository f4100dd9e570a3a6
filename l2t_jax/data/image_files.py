"""Read image files as they were meant to be seen, with Pillow."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import pathlib
import sys
import warnings

import numpy as np
from PIL import Image, ImageFile, ImageOps

from l2t_jax import errors, imports

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
      is_animated = _is_animated(stream, image.format)
  # Pillow's decoders raise errors of many types for broken files.
  except Exception as error:
    raise errors.InputError(
      f"image {name} cannot be read ({type(error).__name__}); replace or"
      " remove it"
    ) from error
  if reason:
    raise errors.InputError(f"image {name} has {reason}")
  if is_animated:
    warnings.warn(
      "some images have several pages or frames, of which the first is read",
      stacklevel=2,
    )
  return image if deep is None else deep


def bit_depth(maximum: int) -> int:
  """Return the smallest of BIT_DEPTHS that holds a value up to 65,535."""
  return next(depth for depth in BIT_DEPTHS if maximum < 2**depth)


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
  image.load()
  # A damaged EXIF block is no damage to the image; viewers ignore it, too.
  with contextlib.suppress(Exception):
    ImageOps.exif_transpose(image, in_place=True)
  return image, tiles


def _is_animated(stream, kind):
  """Return whether a file has several pages or frames."""
  if kind not in _WITH_FRAMES:
    return False
  stream.seek(0)
  # Asked of another image, because counting frames moves on to the last. Where
  # the others are damaged, the first may still be read.
  with contextlib.suppress(Exception):
    return getattr(Image.open(stream), "is_animated", False)
  return False


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
  elif image.format == "FITS" and image.mode.startswith("I"):
    how = "as FITS"
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
