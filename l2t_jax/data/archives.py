"""Sort the official archives of the paper's data sets into folders of images.

    python -m l2t_jax.data.archives NAME ARCHIVES OUT

NAME is tinyimagenet, mit67 or stanford40. ARCHIVES is the folder of the
downloads, still packed; `DATA_SETS` lists their names and where to get them.
The official split is written as OUT/train/CLASS/* and OUT/test/CLASS/*, with
the files unchanged; read it with --config.data.source=folder
--config.data.path=OUT. An interrupted run leaves only OUT.partial, which the
next run replaces.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
import contextlib
import pathlib
import re
import shutil
import tarfile
from typing import NamedTuple
import zipfile
import zlib

from l2t_jax import errors
from l2t_jax.data import records


class Destination(NamedTuple):
  """Where an image is written."""

  part: str  # 'train' or 'test'.
  class_name: str
  file_name: str


class Published(NamedTuple):
  """A data set as its authors publish it."""

  files: tuple[str, ...]  # Archives to download; the first holds the images.
  homepage: str
  num_train: int
  num_test: int
  # Folder of `files` -> pairs (member of the first archive, its destination).
  list_images: Callable[[pathlib.Path], Iterable[tuple[str, Destination]]]


def unpack(
  published: Published, archives: pathlib.Path, out: pathlib.Path
) -> None:
  """Extract all images of a published data set into folders, atomically.

  Args:
    published: an entry of `DATA_SETS`.
    archives: the folder that holds `published.files`.
    out: the folder to write; it must not exist.

  Raises:
    errors.InputError: an archive or an image is missing or damaged, the numbers
      of images are not the official ones, or `out` exists or is not writable.
  """
  absent = [name for name in published.files if not (archives / name).is_file()]
  if absent:
    raise errors.InputError(
      f"folder {str(archives)!r} lacks {', '.join(absent)}; download from"
      f" {published.homepage} and do not unpack"
    )
  if out.exists():
    raise errors.InputError(
      f"{str(out)!r} exists already; remove it or choose another folder"
    )
  partial = out.with_name(out.name + ".partial")
  try:
    destinations = _collect(published.list_images(archives))
    if partial.exists():
      shutil.rmtree(partial)
    _extract(archives / published.files[0], destinations, partial)
    _check_counts(published, partial)
    # Renamed last, so that `out` never holds an incomplete data set.
    partial.rename(out)
  except OSError as error:
    raise errors.InputError(
      f"cannot read {str(archives)!r} or write {str(out)!r}: {error}"
    ) from error


def _collect(
  images: Iterable[tuple[str, Destination]],
) -> dict[str, Destination]:
  """Map members to destinations; raise if a name is not a plain file name."""
  destinations: dict[str, Destination] = {}
  for member, destination in images:
    for name in destination:
      # The names come from downloaded lists and become a path, which must not
      # lead out of the folder.
      if not re.fullmatch(r"[^./\\:\0][^/\\:\0]*", name):
        raise errors.InputError(
          f"image {member!r} is listed with the name {name!r}, which is no"
          " plain file name; download the archives again"
        )
    destinations[member] = destination
  return destinations


def _extract(
  archive: pathlib.Path,
  destinations: Mapping[str, Destination],
  out: pathlib.Path,
) -> None:
  """Extract the members that have a destination; raise if one is missing."""
  missing = set(destinations)
  with _naming_damage(archive):
    for member, content in _read_members(archive, destinations):
      path = out.joinpath(*destinations[member])
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
      missing.discard(member)
  if missing:
    raise errors.InputError(
      f"{archive} lacks {records.some_of(sorted(missing))}: it has"
      f" {len(destinations) - len(missing)} of {len(destinations)} listed"
      " images; download it again"
    )


def _read_members(
  path: pathlib.Path, wanted: Collection[str]
) -> Iterator[tuple[str, bytes]]:
  """Yield (name, content) of the wanted regular files, in archive order."""
  if path.suffix == ".zip":
    with zipfile.ZipFile(path) as archive:
      for name in archive.namelist():
        if name in wanted:
          yield name, archive.read(name)
    return
  # As a stream, because seeking in a compressed tar is slow.
  with tarfile.open(path, "r|*") as stream:
    for member in stream:
      name = member.name.removeprefix("./")
      file = stream.extractfile(member) if member.isfile() else None
      if file and name in wanted:
        yield name, file.read()


def _check_counts(published: Published, folder: pathlib.Path) -> None:
  """Compare the numbers of written files with the official ones."""
  found = [len(list(folder.glob(f"{part}/*/*"))) for part in ("train", "test")]
  expected = [published.num_train, published.num_test]
  if found != expected:
    raise errors.InputError(
      f"found {found[0]} training and {found[1]} test images, expected"
      f" {expected[0]} and {expected[1]}; download"
      f" {', '.join(published.files)} again from {published.homepage}"
    )


@contextlib.contextmanager
def _naming_damage(path: pathlib.Path) -> Iterator[None]:
  """Context manager: convert errors about damaged archives to InputError."""
  try:
    yield
  except (
    EOFError,
    KeyError,  # zipfile: the archive lacks one of the lists.
    UnicodeDecodeError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise errors.InputError(
      f"{path} is damaged ({type(error).__name__}); download it again"
    ) from error


def _lines(content: bytes) -> list[str]:
  """Return the non-blank lines, stripped; names may contain spaces."""
  lines = (line.strip() for line in content.decode().splitlines())
  return [line for line in lines if line]


def _list_tinyimagenet(
  archives: pathlib.Path,
) -> Iterator[tuple[str, Destination]]:
  """List train and, as test, val: the official test images have no labels."""
  root, path = "tiny-imagenet-200", archives / "tiny-imagenet-200.zip"
  with _naming_damage(path), zipfile.ZipFile(path) as archive:
    members = archive.namelist()
    annotations = _lines(archive.read(f"{root}/val/val_annotations.txt"))
  for member in members:
    match = re.fullmatch(rf"{root}/train/([^/]+)/images/([^/]+\.JPEG)", member)
    if match:
      yield member, Destination("train", match[1], match[2])
  for line in annotations:
    # Tab-separated: file, class and bounding box. A missing class becomes "",
    # which `_collect` rejects.
    file_name, class_name, *_ = [*line.split("\t"), ""]
    member = f"{root}/val/images/{file_name}"
    yield member, Destination("test", class_name, file_name)


def _list_mit67(archives: pathlib.Path) -> Iterator[tuple[str, Destination]]:
  """List the images that the two text files name."""
  for part, name in (("train", "TrainImages.txt"), ("test", "TestImages.txt")):
    with _naming_damage(archives / name):
      lines = _lines((archives / name).read_bytes())
    for line in lines:
      class_name, _, file_name = line.partition("/")
      yield f"Images/{line}", Destination(part, class_name, file_name)


def _list_stanford40(
  archives: pathlib.Path,
) -> Iterator[tuple[str, Destination]]:
  """List the images that ACTION_train.txt and ACTION_test.txt name."""
  path = archives / "Stanford40_ImageSplits.zip"
  with _naming_damage(path), zipfile.ZipFile(path) as archive:
    for name in archive.namelist():
      # train.txt and test.txt, which repeat all images, do not match.
      match = re.fullmatch(r"ImageSplits/(.+)_(train|test)\.txt", name)
      if match:
        action, part = match.groups()
        for line in _lines(archive.read(name)):
          yield f"JPEGImages/{line}", Destination(part, action, line)


DATA_SETS = {
  "tinyimagenet": Published(
    files=("tiny-imagenet-200.zip",),
    homepage="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    num_train=100_000,
    num_test=10_000,
    list_images=_list_tinyimagenet,
  ),
  "mit67": Published(
    files=("indoorCVPR_09.tar", "TrainImages.txt", "TestImages.txt"),
    homepage="https://web.mit.edu/torralba/www/indoor.html",
    num_train=5_360,
    num_test=1_340,
    list_images=_list_mit67,
  ),
  "stanford40": Published(
    files=("Stanford40_JPEGImages.zip", "Stanford40_ImageSplits.zip"),
    homepage="http://vision.stanford.edu/Datasets/40actions.html",
    num_train=4_000,
    num_test=5_532,
    list_images=_list_stanford40,
  ),
}


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument("name", choices=list(DATA_SETS))
  parser.add_argument("archives", type=pathlib.Path, help="folder of downloads")
  parser.add_argument("out", type=pathlib.Path, help="folder to make")
  return parser


def main(args: argparse.Namespace) -> None:
  """Extract a data set into folders."""
  published = DATA_SETS[args.name]
  unpack(published, args.archives, args.out)
  print(
    f"wrote {published.num_train} training and {published.num_test} test images"
    f" to {args.out}"
  )


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
