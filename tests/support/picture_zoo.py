"""Pictures of many formats, depths and orientations, and a second reader.

Most files are written, and read again, by tifffile, OpenCV and imagecodecs;
some are put together by hand, so that no error of Pillow's cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
import io
import itertools
import pathlib
import struct
from typing import Any, NamedTuple
import zlib

import cv2
import imagecodecs
import numpy as np
from PIL import Image
import tifffile

# EXIF orientation -> how a viewer shows the stored pixels [H, W, C].
SHOWN = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
  8: lambda x: np.rot90(x),
}
PARTS = {"train": "Train", "val": "valid", "test": "Testing"}
# Classes, and where the waves in their pictures go: down, to the right.
CLASSES = {"a [1]": (0,), "bébé chat": (1,), "dog": (0, 1)}
# Names as cameras and people make them; a class has images in subfolders.
_NAMES = ("{}", "été/{} (1)", "2024 06/[raw]/{}", "{}.final", "IMG {} 東京")
# First pixels and steps of the seven passes of an interlaced PNG: y, x, dy, dx.
_ADAM7 = (
  (0, 0, 8, 8),
  (0, 4, 8, 8),
  (4, 0, 8, 4),
  (0, 2, 4, 4),
  (2, 0, 4, 2),
  (0, 1, 2, 2),
  (1, 0, 2, 1),
)
_COLOUR_TYPES = {1: 0, 3: 2, 2: 4, 4: 6}  # Of a PNG, by its channels.
_READ_AS_STORED = (".tif", ".jp2", ".j2k")
# Two decoders of one library may scale chroma in other ways, by a few steps;
# what is lost in writing is less than what a wrong orientation changes.
_LOSSY = {"tolerance": 3, "loss": 12}


class Kind(NamedTuple):
  """A way to write pictures."""

  name: str
  suffix: str
  write: Callable[[np.ndarray], bytes]  # From stored values [H, W, C].
  channels: int = 3  # That are stored; 2 and 4 have opacity, or are CMYK.
  bits: int = 8  # Of the stored values.
  orientation: int = 1
  meaning: str = ""  # Of the values; see `_meant`.
  # How far two correct readers may differ, of 255; and the written pixels from
  # the read ones on average. Both are 0 for lossless formats.
  tolerance: int = 0
  loss: float = 0
  # Pillow has no way to read it, so an error is right, too.
  may_be_refused: bool = False
  is_misread: bool = False  # By the second reader.

  @property
  def depth(self) -> int:
    """Return how many bits the largest value that is read may have."""
    return 16 if self.meaning == "16 bits" else max(self.bits, 8)


class Picture(NamedTuple):
  """A file, and what it shows."""

  kind: Kind
  path: pathlib.Path
  pixels: np.ndarray  # As viewers show it, [H, W, 1..4], uint8 or uint16.

  @property
  def name(self) -> str:
    """What messages call it."""
    return f"{self.kind.name} ({self.path.name})"


def save(root: pathlib.Path) -> list[Picture]:
  """Write root/PART/CLASS/... with all kinds that Pillow reads."""
  kinds = [kind for kind in all_kinds() if not kind.may_be_refused]
  places = itertools.cycle(itertools.product(CLASSES, PARTS.values()))
  names = itertools.cycle(_NAMES)
  pictures = []
  for index, (kind, (label, part)) in enumerate(
    zip(kinds, places, strict=False)
  ):
    name = next(names).format(f"{index:03}")
    path = root / part / label / f"{name}{kind.suffix}"
    if index % 4 == 1:
      path = path.with_name(name.rpartition("/")[2] + kind.suffix.upper())
    pictures.append(_save_picture(kind, path, index, CLASSES[label]))
  return pictures


def save_refusable(root: pathlib.Path) -> list[Picture]:
  """Write root/* with what Pillow may refuse, but must not misread."""
  kinds = [kind for kind in all_kinds() if kind.may_be_refused]
  return [
    _save_picture(kind, root / f"{index}{kind.suffix}", index)
    for index, kind in enumerate(kinds)
  ]


def add_debris(root: pathlib.Path) -> dict[str, int]:
  """Write what lies beside pictures; return what should be counted of it."""
  folder = root / "Train" / "a [1]"
  for name in ("._000.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
    (folder / name).write_bytes(b"\0\5\x16\7")
  for where in ("__MACOSX/Train", "Train/__MACOSX/dog", "Testing/dog/@eaDir"):
    (root / where).mkdir(parents=True)
    (root / where / "000.png").write_bytes(b"\0\5\x16\7")
  (folder / "notes.TXT").write_text("")
  (root / "valid" / "dog" / "notes.txt").write_text("")
  (root / "Testing" / "dog" / "README").write_text("")
  return {".txt": 2, "no suffix": 1}


def read_second(picture: Picture) -> np.ndarray:
  """Read a picture without Pillow; return what viewers show, [H, W, 1..4].

  Of the few formats that only Pillow reads, it is what was written.
  """
  kind, content = picture.kind, picture.path.read_bytes()
  read = _READERS.get(kind.suffix)
  if not read or kind.is_misread:
    return picture.pixels
  pixels = _with_channels(read(content))
  if kind.suffix in _READ_AS_STORED or kind.meaning == "high":
    pixels = _meant(kind, pixels)
  return SHOWN[kind.orientation](pixels)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
  """Return RGB of [H, W, 1..4] without opacity."""
  colours = pixels[..., : 1 if pixels.shape[-1] < 3 else 3]
  return np.broadcast_to(colours, (*pixels.shape[:2], 3))


def as_8_bits(pixels: np.ndarray, channels: int, depth: int) -> np.ndarray:
  """Return grey or RGB of [H, W, 1..4] without opacity, [H, W, channels]."""
  if pixels.dtype == np.uint16:
    pixels = np.minimum(pixels >> (depth - 8), 255).astype(np.uint8)
  pixels = as_rgb(pixels)
  if channels == 3:
    return pixels
  # ITU-R 601-2, in 16 bits after the point.
  luma = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
  return ((luma + 2**15) >> 16).astype(np.uint8)[..., None]


@functools.cache
def all_kinds() -> tuple[Kind, ...]:
  """Return all kinds; the files of each differ in their pixels."""
  return (
    *_png_kinds(),
    *_jpeg_kinds(),
    *_tiff_kinds(),
    *_bmp_kinds(),
    *_netpbm_kinds(),
    *_tga_and_sgi_kinds(),
    *_webp_kinds(),
    *_avif_kinds(),
    *_jpeg2000_kinds(),
    *_other_kinds(),
  )


def _save_picture(kind, path, seed, directions=(0, 1)):
  """Write smooth random values, so that formats with losses lose little."""
  rng = np.random.default_rng(seed)
  shape = rng.integers(12, 31), rng.integers(17, 41)
  shown = _smooth(rng, shape, kind.channels, kind.bits, directions)
  if kind.meaning == "opacity":
    shown[..., 3] |= 2 ** (kind.bits - 1)
    shown[..., :3] //= 2
  back = {6: 8, 8: 6}.get(kind.orientation, kind.orientation)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(kind.write(np.ascontiguousarray(SHOWN[back](shown))))
  return Picture(kind, path, _meant(kind, shown))


def _smooth(rng, shape, channels, bits, directions):
  """Add waves that go down (0) or to the right (1)."""
  grid = np.mgrid[: shape[0], : shape[1]] / max(shape)
  waves = np.zeros((*shape, channels))
  for channel, direction in itertools.product(range(channels), directions):
    for _ in range(2):
      turns, phase = rng.uniform((0.5, 0), (1.5, 1))
      waves[..., channel] += np.cos(
        2 * np.pi * (turns * grid[direction] + phase)
      )
  low, high = waves.min((0, 1)), waves.max((0, 1))
  values = (waves - low) / (high - low) * (2**bits - 1)
  return np.rint(values).astype(np.uint8 if bits <= 8 else np.uint16)


def _palette(bits):
  rng = np.random.default_rng(bits)
  return rng.integers(0, 256, (2**bits, 3), np.uint8)


def _meant(kind, values):
  """Return the pixels [H, W, C] that stored values mean, brighter for more."""
  white = 2**kind.bits - 1
  match kind.meaning:
    case "palette":
      return _palette(kind.bits)[values[..., 0]]
    case "cmyk":
      light = 255 - values.astype(int)
      return np.rint(light[..., :3] * light[..., 3:] / 255).astype(np.uint8)
    case "opacity":  # Colours are multiplied with it.
      pixels = values.copy()
      colours = np.rint(values[..., :3] * (white / values[..., 3:]))
      pixels[..., :3] = np.minimum(colours, white)
      return pixels
    case "16 bits":  # Are made of fewer.
      return (values.astype(int) * (2**16 - 1) // white).astype(np.uint16)
    case "8 bits":  # Are made of fewer.
      return np.rint(values / white * 255).astype(np.uint8)
    case "565":
      return np.rint(values / (31, 63, 31) * 255).astype(np.uint8)
    case "high":  # Pillow reads the higher 8 bits.
      return (values >> (kind.bits - 8)).astype(np.uint8)
    case "0 is white":
      values = white - values
  if kind.bits < 8:
    return (values * (255 // white)).astype(np.uint8)
  return values


def _with_channels(pixels):
  if pixels.dtype == bool:
    pixels = pixels.astype(np.uint8)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _swap_rgb(pixels):
  """Swap red and blue, of what OpenCV reads or writes."""
  if pixels.ndim == 2 or pixels.shape[-1] < 3:
    return pixels
  return pixels[..., [2, 1, 0, *range(3, pixels.shape[-1])]]


def _read_cv2(content):
  pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
  assert pixels is not None
  return _swap_rgb(pixels)


def _read_tifffile(content):
  with tifffile.TiffFile(io.BytesIO(content)) as file:
    page = file.pages.first
    pixels = page.asarray()
  is_in_planes = page.samplesperpixel > 1 and page.planarconfig == 2
  return pixels.transpose(1, 2, 0) if is_in_planes else pixels


_READERS: dict[str, Callable[[bytes], np.ndarray]] = {
  **dict.fromkeys((".png", ".jpg", ".bmp", ".webp"), _read_cv2),
  **dict.fromkeys((".pbm", ".pgm", ".ppm", ".mpo"), _read_cv2),
  ".tif": _read_tifffile,
  ".avif": imagecodecs.avif_decode,
  ".jp2": imagecodecs.jpeg2k_decode,
  ".j2k": imagecodecs.jpeg2k_decode,
  ".gif": lambda content: imagecodecs.gif_decode(content, 0),
  ".qoi": imagecodecs.qoi_decode,
}


def _exif(orientation):
  """Return a TIFF header with one entry."""
  entry = struct.pack(">HHIHH", 274, 3, 1, orientation, 0)
  return b"MM\0*\0\0\0\x08" + b"\0\1" + entry + bytes(4)


def _save_pillow(suffix, values, mode="", **options):
  pixels = values[..., 0] if values.shape[-1] == 1 else values
  image = Image.fromarray(pixels)
  file = io.BytesIO()
  (image.convert(mode) if mode else image).save(file, suffix, **options)
  return file.getvalue()


def _pillow_kind(name, suffix, form, channels=3, *, bits=8, **options):
  fields = {key: options.pop(key) for key in Kind._fields if key in options}
  if orientation := fields.get("orientation"):
    options["exif"] = b"Exif\0\0" + _exif(orientation)
  write = functools.partial(_save_pillow, form, **options)
  return Kind(name, suffix, write, channels, bits, **fields)


def _save_cv2(suffix, values, **options):
  flags = [
    (getattr(cv2, f"IMWRITE_{key}"), int(v)) for key, v in options.items()
  ]
  good, content = cv2.imencode(
    suffix, _swap_rgb(values), list(itertools.chain(*flags))
  )
  assert good
  return content.tobytes()


# PNG, by hand.


def _packed(values, bits):
  """Return rows of samples as bytes, uint8 [H, ...]."""
  rows = values.reshape(len(values), -1)
  if bits == 16:
    return rows.astype(">u2").view(np.uint8)
  if bits == 8:
    return rows
  each = (rows[..., None] >> np.arange(bits)[::-1]) & 1
  return np.packbits(each.reshape(len(rows), -1).astype(np.uint8), axis=1)


def _png_chunk(name, content):
  check = zlib.crc32(name + content)
  return struct.pack(">I", len(content)) + name + content + check.to_bytes(4)


def _save_png(
  values,
  *,
  bits,
  palette=False,
  interlaced=False,
  chunks=(),
  orientation=0,
  is_exif_late=False,
):
  height, width, channels = values.shape
  colour_type = 3 if palette else _COLOUR_TYPES[channels]
  header = struct.pack(
    ">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced
  )
  passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
  data = b""
  for y, x, dy, dx in passes:
    part = values[y::dy, x::dx]
    if part.size:
      data += np.pad(_packed(part, bits), ((0, 0), (1, 0))).tobytes()
  exif = _png_chunk(b"eXIf", _exif(orientation)) if orientation else b""
  content = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header)
  if palette:
    content += _png_chunk(b"PLTE", _palette(bits).tobytes())
  if not is_exif_late:
    content += exif
  for chunk in chunks:
    content += _png_chunk(*chunk)
  return (
    content
    + _png_chunk(b"IDAT", zlib.compress(data))
    + (exif if is_exif_late else b"")
    + _png_chunk(b"IEND", b"")
  )


def _png_kind(name, channels, bits, *, significant=0, **options):
  """Return a kind of PNG with some channels, of 16 bits all or fewer used."""
  meaning = "palette" if options.get("palette") else ""
  write = functools.partial(_save_png, bits=bits, **options)
  return Kind(
    f"PNG {name}",
    ".png",
    write,
    channels,
    significant or bits,
    options.get("orientation") or 1,
    meaning,
  )


def _png_kinds() -> Iterator[Kind]:
  for interlaced in (False, True):
    how = "interlaced" if interlaced else ""
    for bits in (1, 2, 4, 8):
      for palette in (False, True):
        name = f"{'palette' if palette else 'grey'} of {bits} bits {how}"
        yield _png_kind(name, 1, bits, palette=palette, interlaced=interlaced)
    for channels, bits in itertools.product((1, 2, 3, 4), (8, 16)):
      if (channels, bits) != (1, 8):
        name = f"{channels}x{bits} bits {how}"
        yield _png_kind(name, channels, bits, interlaced=interlaced)
  for channels, bits in itertools.product((1, 2, 3, 4), (10, 12, 14)):
    name = f"{channels}x16 bits, {bits} used"
    yield _png_kind(name, channels, 16, significant=bits)
  for orientation in SHOWN:
    for channels, bits in ((1, 8), (3, 8), (1, 16), (3, 16), (2, 16)):
      name = f"{channels}x{bits} bits, orientation {orientation}"
      yield _png_kind(name, channels, bits, orientation=orientation)
  late = functools.partial(_save_png, bits=8, orientation=8, is_exif_late=True)
  yield Kind("PNG with EXIF after pixels", ".png", late, orientation=8)
  clear = (b"tRNS", bytes((0, 99, 255)))
  yield _png_kind("clear palette entries", 1, 8, palette=True, chunks=(clear,))
  for channels, bits in itertools.product((1, 3), (8, 16)):
    chunk = (b"tRNS", bytes(2 * channels))
    name = f"clear colour of {channels}x{bits} bits"
    yield _png_kind(name, channels, bits, chunks=(chunk,))


# JPEG.


def _with_jpeg_exif(values, orientation, **options):
  content = _save_cv2(".jpg", values, **options)
  exif = b"Exif\0\0" + _exif(orientation)
  return (
    content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
  ) + content[2:]


def _jpeg_kinds() -> Iterator[Kind]:
  for name, options in {
    "baseline": {},
    "progressive": {"JPEG_PROGRESSIVE": 1},
    "optimised, restarts": {"JPEG_OPTIMIZE": 1, "JPEG_RST_INTERVAL": 2},
    "4:4:4": {"JPEG_SAMPLING_FACTOR": 0x111111},
    "4:2:2": {"JPEG_SAMPLING_FACTOR": 0x211111},
    "4:4:0": {"JPEG_SAMPLING_FACTOR": 0x121111},
    "quality 60": {"JPEG_QUALITY": 60},
  }.items():
    for channels in (1, 3):
      write = functools.partial(_save_cv2, ".jpg", **options)
      yield Kind(f"JPEG {name} x{channels}", ".jpg", write, channels, **_LOSSY)
  for orientation, channels in itertools.product(SHOWN, (1, 3)):
    write = functools.partial(
      _with_jpeg_exif, orientation=orientation, JPEG_PROGRESSIVE=channels == 1
    )
    name = f"JPEG x{channels}, orientation {orientation}"
    yield Kind(name, ".jpg", write, channels, orientation=orientation, **_LOSSY)
  for orientation in (0, 9):  # There are none.
    write = functools.partial(_with_jpeg_exif, orientation=orientation)
    yield Kind(f"JPEG, orientation {orientation}", ".jpg", write, **_LOSSY)
  rgb = functools.partial(
    imagecodecs.jpeg8_encode, level=95, colorspace="RGB", outcolorspace="RGB"
  )
  yield Kind("JPEG without YCbCr", ".jpg", rgb, **_LOSSY)
  cmyk = {"meaning": "cmyk", **_LOSSY}
  yield Kind("JPEG CMYK", ".jpg", _save_adobe_cmyk, 4, **cmyk)
  yield Kind("JPEG YCCK", ".jpg", _save_adobe_ycck, 4, **cmyk)


def _save_adobe_ycck(values):
  """Store the inverse, as Adobe does."""
  return imagecodecs.jpeg8_encode(
    255 - values,
    level=95,
    colorspace="CMYK",
    outcolorspace="YCCK",
    subsampling="444",
  )


def _save_adobe_cmyk(values):
  file = io.BytesIO()
  image = Image.frombytes("CMYK", values.shape[1::-1], values.tobytes())
  image.save(file, "JPEG", quality=95)
  return file.getvalue()


# TIFF, by tifffile.


def _save_tiff(values, *, orientation=1, byteorder="<", **options):
  file = io.BytesIO()
  pixels = values[..., 0] if values.shape[-1] == 1 else values
  if options.get("planarconfig") == "separate":
    pixels = values.transpose(2, 0, 1)
  if options.get("bitspersample") == 1:
    pixels = pixels.astype(bool)
  tifffile.imwrite(
    file,
    pixels,
    byteorder=byteorder,
    metadata=None,
    extratags=[(274, "H", 1, orientation, True)],
    **options,
  )
  return file.getvalue()


def _tiff_kind(name, channels=3, bits=8, **options):
  fields = {key: options.pop(key) for key in Kind._fields if key in options}
  options.setdefault("photometric", "rgb" if channels > 2 else "minisblack")
  if channels in (2, 4) and "cmyk" not in fields.values():
    options.setdefault("extrasamples", ["unassalpha"])
  orientation = fields.get("orientation", 1)
  write = functools.partial(_save_tiff, orientation=orientation, **options)
  return Kind(f"TIFF {name}", ".tif", write, channels, bits, **fields)


def _tiff_kinds() -> Iterator[Kind]:
  layouts: dict[str, dict[str, Any]] = {
    "plain": {},
    "big-endian": {"byteorder": ">"},
    "strips": {"rowsperstrip": 5},
    "tiles": {"tile": (16, 16)},
    "LZW": {"compression": "lzw"},
    "LZW, predictor": {"compression": "lzw", "predictor": 2},
    "Deflate": {"compression": "zlib", "byteorder": ">", "rowsperstrip": 7},
    "Deflate, predictor, tiles": {
      "compression": "zlib",
      "predictor": 2,
      "tile": (16, 32),
      "byteorder": ">",
    },
    "PackBits": {"compression": "packbits"},
    "BigTIFF": {"bigtiff": True},
  }
  for (name, layout), channels, bits in itertools.product(
    layouts.items(), (1, 3), (8, 16)
  ):
    yield _tiff_kind(f"{name} {channels}x{bits}", channels, bits, **layout)
  for orientation, (name, layout), channels, bits in itertools.product(
    SHOWN, [*layouts.items()][:6:5], (1, 3), (8, 16)
  ):
    yield _tiff_kind(
      f"{name} {channels}x{bits}, orientation {orientation}",
      channels,
      bits,
      orientation=orientation,
      **layout,
    )
  white = {"photometric": "miniswhite", "meaning": "0 is white"}
  for name in ("plain", "big-endian", "LZW", "tiles"):
    for bits in (8, 16):
      yield _tiff_kind(
        f"{name} {bits}, 0 is white",
        1,
        bits,
        may_be_refused=(name, bits) == ("big-endian", 16),
        **white,
        **layouts[name],
      )
  for bits, channels in itertools.product((10, 12, 14), (1, 3)):
    yield _tiff_kind(f"{channels}x16, {bits} used", channels, bits)
  for bits in (1, 2, 4):  # tifffile packs them if it does not compress them.
    packed = {"bitspersample": bits}
    yield _tiff_kind(f"{bits} bits", 1, bits, **packed)
    yield _tiff_kind(f"{bits} bits, 0 is white", 1, bits, **white, **packed)
  yield _tiff_kind("12 bits", 1, 12, bitspersample=12, may_be_refused=True)
  for name in ("plain", "Deflate"):
    yield _tiff_kind(f"{name} 2x8", 2, 8, **layouts[name])
    yield _tiff_kind(f"{name} 4x16", 4, 16, **layouts[name])
    for orientation in (1, 3, 6, 7):
      turned = {"orientation": orientation, **layouts[name]}
      yield _tiff_kind(
        f"{name} palette, {orientation=}",
        1,
        8,
        meaning="palette",
        photometric="palette",
        colormap=_palette(8).T.astype(np.uint16) * 257,
        **turned,
      )
      yield _tiff_kind(
        f"{name} CMYK, {orientation=}",
        4,
        meaning="cmyk",
        photometric="separated",
        tolerance=1,  # The product of two inks is rounded.
        **turned,
      )
      yield _tiff_kind(f"{name} 4x8, {orientation=}", 4, 8, **turned)
    yield _tiff_kind(
      f"{name} planes of 3x8", planarconfig="separate", **layouts[name]
    )
    yield _tiff_kind(
      f"{name} planes of 3x16",
      bits=16,
      planarconfig="separate",
      may_be_refused=True,
      **layouts[name],
    )
    for bits in (12, 16):
      yield _tiff_kind(
        f"{name} 2x16, {bits} used",
        2,
        bits,
        may_be_refused=True,
        **layouts[name],
      )
  for bits, byteorder in itertools.product((8, 16), "<>"):
    yield _tiff_kind(
      f"4x{bits} {byteorder}, colours times opacity",
      4,
      bits,
      meaning="opacity",
      extrasamples=["assocalpha"],
      byteorder=byteorder,
      tolerance=1,  # Quotients are rounded.
      may_be_refused=bits == 16,
    )
  yield _tiff_kind("JPEG x1", 1, compression="jpeg", **_LOSSY)
  yield _tiff_kind("JPEG x3", compression="jpeg", **_LOSSY)
  for name, options in {
    "tiles of 4:2:0": {"tile": (16, 16), "subsampling": (2, 2)},
    "on its side": {"orientation": 6},
    "RGB": {"compressionargs": {"outcolorspace": "RGB"}},
  }.items():
    yield _tiff_kind(f"JPEG {name}", compression="jpeg", **_LOSSY, **options)


# BMP and Netpbm.


def _save_bmp(rows, *, width, height, bits, masks=b"", compression=0):
  """Put headers before padded rows, of which the lowest comes first."""
  start = 14 + 40 + len(masks)
  return (
    struct.pack("<2sIII", b"BM", start + len(rows), 0, start)
    + struct.pack("<IiiHHI", 40, width, height, 1, bits, compression)
    + struct.pack("<IiiII", len(rows), 2835, 2835, 0, 0)
    + masks
    + rows
  )


def _padded_rows(values):
  rows = values.reshape(len(values), -1)
  return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).tobytes()


def _save_bmp_top_down(values):
  height, width, _ = values.shape
  rows = _padded_rows(values[..., ::-1])
  return _save_bmp(rows, width=width, height=-height, bits=24)


def _save_bmp_palette(values, *, bits, run_length=False):
  height, width, _ = values.shape
  rows = _padded_rows(_packed(values[::-1], bits))
  if run_length:
    rows = b"".join(
      b"".join(bytes((1, value)) for value in row) + b"\0\0"
      for row in values[::-1, :, 0]
    )
    rows += b"\0\1"
  colours = np.pad(_palette(bits)[:, ::-1], ((0, 0), (0, 1))).tobytes()
  return _save_bmp(
    rows,
    width=width,
    height=height,
    bits=bits,
    masks=colours,
    compression=int(run_length),
  )


def _save_bmp_16(values, *, shares):
  """Store pixels in 16 bits; a channel has 5 or 6 of them."""
  height, width, _ = values.shape
  words, masks = np.zeros((height, width), "<u2"), []
  for channel, share in enumerate(shares):
    words = words << share | values[::-1, :, channel]
    masks.append((2**share - 1) << sum(shares[channel + 1 :]))
  rows = _padded_rows(words.astype("<u2").view(np.uint8))
  is_usual = shares == (5, 5, 5)
  return _save_bmp(
    rows,
    width=width,
    height=height,
    bits=16,
    masks=b"" if is_usual else struct.pack("<III", *masks),
    compression=0 if is_usual else 3,
  )


def _bmp_kinds() -> Iterator[Kind]:
  for channels in (1, 3, 4):
    write = functools.partial(_save_cv2, ".bmp")
    yield Kind(f"BMP {8 * channels} bits", ".bmp", write, channels)
  yield Kind("BMP top-down", ".bmp", _save_bmp_top_down)
  for bits in (1, 4, 8):
    write = functools.partial(_save_bmp_palette, bits=bits)
    name = f"BMP palette of {bits} bits"
    yield Kind(name, ".bmp", write, 1, bits, meaning="palette")
  for shares in ((5, 5, 5), (5, 6, 5)):
    write = functools.partial(_save_bmp_16, shares=shares)
    yield Kind(
      f"BMP 16 bits as {shares}",
      ".bmp",
      write,
      bits=5,
      meaning="8 bits" if shares[1] == 5 else "565",
      is_misread=True,  # With a white of 248.
      tolerance=1,  # Readers round in different ways.
    )
  write = functools.partial(_save_bmp_palette, bits=8, run_length=True)
  yield Kind("BMP run lengths", ".bmp", write, 1, meaning="palette")


def _save_netpbm(values, *, number, maximum=0):
  height, width, _ = values.shape
  header = f"P{number}\n# by hand\n{width} {height}\n"
  if maximum:
    header += f"{maximum}\n"
  if number < 4:
    rows = (" ".join(map(str, row.flat)) + "\n" for row in values)
    body = "".join(rows).encode()
  else:
    body = _packed(values, 16 if maximum > 255 else 8 if maximum else 1)
    body = body.tobytes()
  return header.encode() + body


def _netpbm_kinds() -> Iterator[Kind]:
  for number, suffix, channels in (
    (1, ".pbm", 1),
    (4, ".pbm", 1),
    (2, ".pgm", 1),
    (5, ".pgm", 1),
    (3, ".ppm", 3),
    (6, ".ppm", 3),
  ):
    if suffix == ".pbm":
      write = functools.partial(_save_netpbm, number=number)
      yield Kind(
        f"Netpbm P{number}", suffix, write, 1, bits=1, meaning="0 is white"
      )
      continue
    for bits in (3, 8, 12, 16):
      write = functools.partial(
        _save_netpbm, number=number, maximum=2**bits - 1
      )
      yield Kind(
        f"Netpbm P{number} of {bits} bits",
        suffix,
        write,
        channels,
        bits,
        meaning={3: "8 bits", 12: "16 bits"}.get(bits, ""),
        is_misread=bits in (3, 12),  # What the header says is white is not.
        tolerance=int(bits in (3, 12)),  # Readers round in different ways.
        may_be_refused=number == 3 and bits > 8,
      )


# Others.


def _tga(kind, bits, values, data, *, origin=0x20, palette=b""):
  height, width = values.shape[:2]
  header = struct.pack("<BBBHHB", 0, bool(palette), kind, 0, 256, 24)
  header += struct.pack("<HHHHBB", 0, 0, width, height, bits, origin)
  return header + palette + data


def _save_tga(values, *, origin, run_length=False):
  """Put the first pixel at the lower left (0), or where bits of origin say."""
  channels = values.shape[-1]
  pixels = _swap_rgb(values)
  if not origin & 0x20:
    pixels = pixels[::-1]
  if origin & 0x10:
    pixels = pixels[:, ::-1]
  data = [pixel.tobytes() for pixel in pixels.reshape(-1, channels)]
  if run_length:  # Packets of one pixel, as a run and as it is in turn.
    data = [bytes((128 * (i % 2),)) + pixel for i, pixel in enumerate(data)]
  kind = (3 if channels == 1 else 2) + 8 * run_length
  origin |= 8 * (channels == 4)  # Bits of opacity.
  return _tga(kind, 8 * channels, values, b"".join(data), origin=origin)


def _save_tga_palette(values):
  palette = _palette(8)[:, ::-1].tobytes()
  return _tga(1, 8, values, values.tobytes(), palette=palette)


def _save_tga_16(values):
  red, green, blue = values.astype("<u2").transpose(2, 0, 1)
  return _tga(2, 16, values, (red << 10 | green << 5 | blue).tobytes())


def _save_sgi_16(values):
  height, width, channels = values.shape
  header = struct.pack(
    ">HBBHHHHii",
    474,
    0,
    2,
    min(channels + 1, 3),
    width,
    height,
    channels,
    0,
    2**16 - 1,
  )
  planes = values[::-1].transpose(2, 0, 1).astype(">u2")
  return header.ljust(512, b"\0") + planes.tobytes()


def _save_palette(values, *, form, **options):
  file = io.BytesIO()
  image = Image.fromarray(values[..., 0])
  image.putpalette(_palette(8).tobytes())
  image.save(file, form, **options)
  return file.getvalue()


def _save_frames(values, *, form):
  images = [Image.fromarray(v[..., 0]) for v in (values, 255 - values)]
  file = io.BytesIO()
  options = {"lossless": True} if form == "WEBP" else {}
  images[0].save(file, form, save_all=True, append_images=images[1:], **options)
  return file.getvalue()


def _webp_with_exif(values, orientation, lossless):
  good, content = cv2.imencodeWithMetadata(
    ".webp",
    _swap_rgb(values),
    [cv2.IMAGE_METADATA_EXIF],
    [np.frombuffer(_exif(orientation), np.uint8)[None]],
    [cv2.IMWRITE_WEBP_QUALITY, 101 if lossless else 95],
  )
  assert good
  return content.tobytes()


def _tga_and_sgi_kinds() -> Iterator[Kind]:
  for origin, channels, run_length in (
    *itertools.product((0, 0x20), (1, 3, 4), (True, False)),
    (0x10, 3, False),
    (0x30, 3, True),
  ):
    name = f"TGA x{channels} {origin=:#x} {run_length=}"
    write = functools.partial(_save_tga, origin=origin, run_length=run_length)
    yield Kind(name, ".tga", write, channels)
  yield Kind("TGA palette", ".tga", _save_tga_palette, 1, meaning="palette")
  yield Kind(
    "TGA 16 bits", ".tga", _save_tga_16, bits=5, meaning="8 bits", tolerance=1
  )
  for channels in (1, 3):
    yield Kind(
      f"SGI {channels}x16", ".sgi", _save_sgi_16, channels, 16, meaning="high"
    )
  for channels in (1, 3):
    yield _pillow_kind(f"SGI x{channels}", ".sgi", "SGI", channels)


def _webp_kinds() -> Iterator[Kind]:
  for channels in (3, 4):
    write = functools.partial(imagecodecs.webp_encode, lossless=True)
    yield Kind(
      f"WebP lossless x{channels}",
      ".webp",
      write,
      channels,
      loss=12 if channels == 4 else 0,  # Clear pixels lose their colour.
    )
    write = functools.partial(imagecodecs.webp_encode, level=95)
    yield Kind(f"WebP x{channels}", ".webp", write, channels, **_LOSSY)
  for orientation, lossless in itertools.product(SHOWN, (True, False)):
    write = functools.partial(
      _webp_with_exif, orientation=orientation, lossless=lossless
    )
    name = f"WebP {lossless=}, orientation {orientation}"
    lossy = {} if lossless else _LOSSY
    yield Kind(name, ".webp", write, orientation=orientation, **lossy)


def _avif_kinds() -> Iterator[Kind]:
  for channels in (1, 3, 4):
    write = functools.partial(imagecodecs.avif_encode, level=95)
    yield Kind(f"AVIF x{channels}", ".avif", write, channels, **_LOSSY)
    deep = functools.partial(write, bitspersample=10)
    yield Kind(
      f"AVIF x{channels} of 10 bits",
      ".avif",
      deep,
      channels,
      bits=10,
      meaning="high",
      **_LOSSY,
    )
  for orientation in SHOWN:
    yield _pillow_kind(
      f"AVIF, orientation {orientation}",
      ".avif",
      "AVIF",
      orientation=orientation,
      quality=95,
      **_LOSSY,
    )


def _jpeg2000_kinds() -> Iterator[Kind]:
  for suffix, channels in itertools.product((".jp2", ".j2k"), (1, 2, 3, 4)):
    write = functools.partial(
      imagecodecs.jpeg2k_encode,
      level=0,
      reversible=True,
      codecformat=suffix[1:],
    )
    name = f"JPEG 2000 {suffix} {channels}x"
    yield Kind(f"{name}8", suffix, write, channels)
    for bits in (12, 16):
      deep = functools.partial(write, bitspersample=bits)
      yield Kind(
        f"{name}{bits}",
        suffix,
        deep,
        channels,
        bits,
        meaning="16 bits",
        may_be_refused=True,
        tolerance=int(bits == 12),  # Readers shift or multiply.
      )


def _other_kinds() -> Iterator[Kind]:
  for form in ("GIF", "PNG", "TIFF", "WEBP"):
    frames = functools.partial(_save_frames, form=form)
    yield Kind(f"{form} of two frames", f".{form.lower()[:4]}", frames, 1)
  yield Kind(
    "GIF",
    ".gif",
    lambda v: imagecodecs.gif_encode(v[..., 0], colormap=_palette(8)),
    1,
    meaning="palette",
  )
  for options in ({"interlace": 1}, {"transparency": 3, "interlace": 0}):
    write = functools.partial(_save_palette, form="GIF", **options)
    yield Kind(
      f"GIF {options}",
      ".gif",
      write,
      1,
      meaning="palette",
      is_misread="transparency" in options,  # As black.
    )
  for channels in (3, 4):
    yield Kind(f"QOI x{channels}", ".qoi", imagecodecs.qoi_encode, channels)
  for channels in (1, 3):
    yield _pillow_kind(f"PCX x{channels}", ".pcx", "PCX", channels)
  write = functools.partial(_save_palette, form="PCX")
  yield Kind("PCX palette", ".pcx", write, 1, meaning="palette")
  for orientation in (1, 6, 7):
    yield _pillow_kind(
      f"MPO, orientation {orientation}",
      ".mpo",
      "MPO",
      orientation=orientation,
      quality=95,
      **_LOSSY,
    )
  yield _pillow_kind("DDS", ".dds", "DDS", 4)
