"""Decode image files with Pillow, as image viewers show them."""

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

# Bits per channel that cameras and scanners use in 16-bit files.
BIT_DEPTHS = (8, 10, 12, 14, 16)

# Vector formats, and formats that Pillow identifies but cannot read.
_NOT_RASTER = {"EPS", "MPEG"}
# Byte order in a raw mode of Pillow -> the one that reads the other byte of a
# 16-bit channel: B is big-endian, L little-endian, N native.
_OTHER_BYTE = {
  "16B": "16L",
  "16L": "16B",
  "16N": "16B" if sys.byteorder == "little" else "16L",
}
# Raw modes of images with 16 bits per channel that are not grey.
_DEEP_COLOUR = ("RGB;16", "RGBA;16", "RGBX;16", "LA;16")
# TIFF tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR_CONFIGURATION = 258, 262, 284
# Formats with several pages or frames. MPO is not listed, because its further
# frames are previews.
_WITH_FRAMES = {"TIFF", "GIF", "WEBP", "PNG", "AVIF"}
_JPEG2000_START = b"\xff\x4f\xff\x51"  # The markers SOC and SIZ.


@functools.cache
def suffixes() -> tuple[str, ...]:
  """Return the suffixes of image files, in lower case, sorted.

  They include those of all raster formats that Pillow reads, and of HEIF
  (.heic) if pillow-heif is installed.
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
  # Written by 3D cameras and some phones; Pillow opens it as JPEG and does not
  # list it in OPEN.
  formats.add("MPO")
  known = Image.registered_extensions()
  return tuple(sorted(s for s, name in known.items() if name in formats))


def decode(
  file: pathlib.Path | io.BytesIO, *, name: str
) -> Image.Image | np.ndarray:
  """Decode an image as viewers show it.

  Args:
    file: path or content of the image file.
    name: name of the image, for error messages.

  Returns:
    An image with 8 bits per channel, or uint16 [H, W, C] if the file has more;
    rotated and mirrored according to its EXIF orientation.

  Raises:
    errors.InputError: the image is damaged, or of a kind that Pillow misreads.
  """
  if isinstance(file, pathlib.Path) and file.exists() and not file.is_file():
    raise errors.InputError(  # Reading from a pipe would block forever.
      f"image {name} is not a regular file; remove it"
    )
  try:
    # Opened here, because Pillow memory-maps a file that it opens itself and
    # then mixes up the rows of rotated TIFFs.
    with (
      contextlib.nullcontext(file)
      if isinstance(file, io.BytesIO)
      else file.open("rb")
    ) as stream:
      image, tiles = _load(stream)
      reason = _why_misread(stream, image, tiles)
      deep = None if reason else _read_deep(stream, image, tiles)
      is_animated = _is_animated(stream, image.format)
  # Pillow's decoders raise errors of many types for damaged files.
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
  """Return the smallest of BIT_DEPTHS that holds `maximum` (at most 65,535)."""
  return next(depth for depth in BIT_DEPTHS if maximum < 2**depth)


@functools.cache
def _register_formats():
  Image.init()
  if imports.is_installed("pillow_heif"):
    heif = imports.require("pillow_heif", needed_for="HEIF images")
    heif.register_heif_opener()


def _load(stream, rawmode=""):
  """Return (image, tiles); the tiles tell how Pillow decodes the bytes.

  Args:
    stream: the open file.
    rawmode: raw mode to decode with in place of the file's own.
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
  # A damaged EXIF block does not affect the pixels; viewers ignore it too.
  with contextlib.suppress(Exception):
    ImageOps.exif_transpose(image, in_place=True)
  return image, tiles


def _is_animated(stream, kind):
  """Return whether a file has several pages or frames."""
  if kind not in _WITH_FRAMES:
    return False
  stream.seek(0)
  # Opened again, because counting frames seeks to the last one. Damage in later
  # frames is ignored: only the first frame is used.
  with contextlib.suppress(Exception):
    return getattr(Image.open(stream), "is_animated", False)
  return False


def _rawmode(tiles):
  """Return the raw mode that Pillow decodes with: RGB, I;16B, ..."""
  args = tiles[0].args if tiles else ""
  return str(args[0] if isinstance(args, tuple) else args)


def _why_misread(stream, image, tiles):
  """Return why Pillow misreads an image, with advice; "" if it does not."""
  # Mode I of a PPM file is grey with up to 16 bits.
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
  """Return the bits per channel in the header of a JPEG 2000 codestream."""
  stream.seek(0)
  content = stream.read()
  start = content.index(_JPEG2000_START)
  # Byte 42 is Ssiz of the first component: the sign bit, and the depth - 1.
  return (content[start + 42] & 0x7F) + 1


def _read_deep(stream, image, tiles):
  """Return uint16 [H, W, C] if an image has more than 8 bits, else None."""
  if image.mode.startswith("I"):
    values = np.asarray(image)[..., None]
    tags = getattr(image, "tag_v2", {})
    # WhiteIsZero, which Pillow does not invert in images with 16 bits.
    if tags.get(_PHOTOMETRIC) == 0:
      values = 2 ** tags[_BITS_PER_SAMPLE][0] - 1 - values
    return values.astype(np.uint16)
  if image.format == "PPM" and tiles[0].codec_name == "ppm":
    maximum = tiles[0].args[1]
    if image.mode == "L" or maximum < 256:
      return None
    # Pillow reduces 16-bit colours to 8 bits: read the bytes directly.
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
  # Pillow keeps the high byte of each channel: decode again for the low byte.
  lower, _ = _load(stream, f"{mode};{_OTHER_BYTE[order]}")
  return np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
