"""Files of pictures as people have them: formats, depths, debris, damage."""

import io
import itertools
import os
import pathlib
import re
import shutil
import unicodedata

import cv2
import numpy as np
from PIL import Image, ImageCms
import pytest
import tifffile

from l2t_jax import errors
from l2t_jax.data import from_folders, image_files, pillow
from tests.support import data_sets, picture_zoo


def _flag():
  """Return an image that looks different in each orientation."""
  pixels = np.zeros((24, 40, 3), np.uint8)
  pixels[:12, :20], pixels[12:, :20], pixels[:12, 20:] = np.diag([250] * 3)
  return pixels


def _random(depth, channels, shape=(13, 17)):
  rng = np.random.default_rng(0)
  return rng.integers(0, 2**depth, (*shape, channels), np.uint16)


@pytest.mark.parametrize("orientation", picture_zoo.SHOWN)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif", "mpo"])
def test_pictures_are_read_as_viewers_show_them(kind, orientation):
  exif = Image.Exif()
  exif[274] = orientation
  file = io.BytesIO()
  Image.fromarray(_flag()).save(file, kind, exif=exif, quality=95)
  image = image_files.decode(file, name=kind)
  shown = picture_zoo.SHOWN[orientation](_flag())
  difference = np.asarray(image).astype(int) - shown
  assert np.abs(difference).mean() < 8  # Of 250; some formats lose details.


def test_damaged_exif_is_no_damage(tmp_path):
  Image.fromarray(_flag()).save(tmp_path / "0.jpg", exif=b"Exif\0\0MM\0*\0\1")
  image = image_files.decode(tmp_path / "0.jpg", name="0")
  assert image.size == (40, 24)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_of_a_png(tmp_path, channels):
  pixels = _random(12, channels)
  # OpenCV has blue first.
  order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
  cv2.imwrite(str(tmp_path / "deep.png"), pixels[..., order])
  image = image_files.decode(tmp_path / "deep.png", name="deep")
  np.testing.assert_array_equal(image, pixels)
  content = io.BytesIO((tmp_path / "deep.png").read_bytes())
  np.testing.assert_array_equal(
    image_files.decode(content, name="deep"), pixels
  )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"byteorder": ">"},
    {"compression": "lzw"},
    {"compression": "zlib", "predictor": 2, "byteorder": ">"},
    {"tile": (16, 16)},
  ],
)
def test_sixteen_bits_of_a_tiff(tmp_path, channels, options):
  pixels = _random(14, channels)
  tifffile.imwrite(
    tmp_path / "deep.tif",
    pixels if channels == 3 else pixels[..., 0],
    photometric="rgb" if channels == 3 else "minisblack",
    **options,
  )
  image = image_files.decode(tmp_path / "deep.tif", name="deep")
  np.testing.assert_array_equal(image, pixels)


def test_planes_that_pillow_misreads_are_refused(tmp_path):
  pixels = _random(16, 3).transpose(2, 0, 1)
  for compression in (None, "zlib"):
    tifffile.imwrite(
      tmp_path / "0.tif",
      pixels,
      photometric="rgb",
      planarconfig="separate",
      compression=compression,
    )
    with pytest.raises(errors.InputError, match="in separate planes"):
      image_files.decode(tmp_path / "0.tif", name="0.tif")


def test_a_damaged_second_frame_is_no_damage(tmp_path):
  file = tmp_path / "0.gif"
  frames = [Image.fromarray(_flag() // n) for n in (1, 2, 3)]
  frames[0].save(file, save_all=True, append_images=frames[1:])
  whole = image_files.decode(file, name="0").convert("RGB")
  content = file.read_bytes()
  second = content.index(b"\x21\xf9", content.index(b"\x21\xf9") + 1)
  file.write_bytes(content[: second + 5])
  image = image_files.decode(file, name="0").convert("RGB")
  np.testing.assert_array_equal(image, whole)


def test_a_second_page_is_said(tmp_path):
  pages = _random(8, 1, (4, 5, 6))[..., 0]
  tifffile.imwrite(tmp_path / "0.tif", pages, photometric="minisblack")
  with pytest.warns(UserWarning, match="several pages or frames"):
    image_files.decode(tmp_path / "0.tif", name="0")


def test_fits_of_16_bits_is_refused(tmp_path):
  cards = [
    "SIMPLE  =                    T",
    "BITPIX  =                   16",
    "NAXIS   =                    2",
    "NAXIS1  =                    3",
    "NAXIS2  =                    2",
    "BZERO   =                32768",
    "END",
  ]
  header = "".join(card.ljust(80) for card in cards).ljust(2880)
  values = np.full(1440, 7232, ">i2").tobytes()
  (tmp_path / "0.fits").write_bytes(header.encode() + values)
  with pytest.raises(errors.InputError, match="as FITS, which Pillow misreads"):
    image_files.decode(tmp_path / "0.fits", name="0.fits")


@pytest.mark.parametrize(
  ("maximum", "depth"),
  [
    (0, 8),
    (255, 8),
    (256, 10),
    (1024, 12),
    (4095, 12),
    (4096, 14),
    (2**14, 16),
  ],
)
def test_bit_depth_holds_the_maximum(maximum, depth):
  assert image_files.bit_depth(maximum) == depth


def test_lab_becomes_the_rgb_that_it_was_made_from(tmp_path):
  lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
  grey = Image.new("RGB", (8, 8), (120, 120, 120))
  ImageCms.profileToProfile(grey, srgb, lab, outputMode="LAB").save(
    tmp_path / "lab.tif"
  )
  image = image_files.decode(tmp_path / "lab.tif", name="lab")
  assert image.mode == "LAB"
  pixels = np.asarray(pillow.convert(image, 3, 16)).astype(int)
  assert np.abs(pixels - 120).max() < 3


def _save_deep(root, depth, parts=("train", "test"), num_images=10):
  """Write root/PART/{cat,dog}/*.png of 16 bits; return the pixels by path."""
  rng, pixels = np.random.default_rng(0), {}
  for part in parts:
    for name in ("cat", "dog"):
      (root / part / name).mkdir(parents=True)
      for index in range(num_images):
        path = root / part / name / f"{index}.png"
        pixels[path] = rng.integers(0, 2**depth, (8, 8), np.uint16)
        Image.fromarray(pixels[path]).save(path)
  return pixels


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("depth", [10, 12, 14, 16])
def test_the_brightest_training_value_says_what_white_is(
  tmp_path, depth, in_memory
):
  pixels = _save_deep(tmp_path, depth)
  # A test image whose values training images do not have is clipped.
  bright = tmp_path / "test" / "cat" / "0.png"
  pixels[bright] = np.full((8, 8), 40_000, np.uint16)
  Image.fromarray(pixels[bright]).save(bright)
  dataset = data_sets.load(
    "folder",
    path=str(tmp_path),
    in_memory=in_memory,
    eval_resize=8,
    augment="none",
    channels=1,
    mean=(0,),
    std=(1,),
    val_fraction=0.2,
  )
  assert dataset.bit_depth == depth
  said, *clipped = (note for note in dataset.notes if "white" in note)
  assert f"{2**depth - 1} is white" in said
  assert re.search(r"since the largest training value is \d+$", said)
  assert (["1 images of other parts"] if depth < 16 else []) == [
    note[:23] for note in clipped
  ]
  test = data_sets.concatenated(dataset.eval_batches("test"))
  expected = [
    np.minimum(image >> (depth - 8), 255)
    for path, image in sorted(pixels.items())
    if "test" in path.parts
  ]
  seen = np.rint(test.images[test.mask == 1][..., 0] * 255)
  np.testing.assert_array_equal(seen, expected)


def test_images_of_8_and_12_bits_together(tmp_path):
  _save_deep(tmp_path, 12)
  shallow = tmp_path / "test" / "dog" / "0.png"
  Image.new("L", (8, 8), 77).save(shallow)
  dataset = data_sets.load(
    "folder", path=str(tmp_path), channels=1, mean=(0,), std=(1,)
  )
  test = data_sets.concatenated(dataset.eval_batches("test"))
  np.testing.assert_allclose(test.images[10], 77 / 255, rtol=1e-6)


def test_all_raster_formats_of_pillow_are_images():
  suffixes = image_files.suffixes()
  wanted = ".avif .bmp .jp2 .jpe .mpo .pcx .ppm .qoi .tga .tif .webp"
  assert {*wanted.split()} <= {*suffixes}
  assert not {".eps", ".h5", ".mpg", ".pdf", ".wmf"} & {*suffixes}


def test_the_pictures_of_phones(tmp_path, monkeypatch):
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    for index in range(2):
      file = tmp_path / name / f"{index}.HEIC"
      image_files.suffixes()  # Registers the format.
      Image.fromarray(_flag()).save(file, "HEIF", quality=95)
  images = from_folders.open_folder(str(tmp_path))
  difference = np.asarray(images.train.read_image(0)).astype(int) - _flag()
  assert np.abs(difference).mean() < 8
  # Without the library it is said how to read them.
  monkeypatch.setattr(image_files, "suffixes", lambda: (".png",))
  with pytest.raises(errors.InputError, match="pip install pillow-heif"):
    from_folders.open_folder(str(tmp_path))


def test_what_systems_leave_behind_is_passed_over(tmp_path):
  root = data_sets.save_folder(tmp_path, num_images=4)
  clean = from_folders.open_folder(str(root))
  for name in ("._0.png", "Thumbs.db", "desktop.ini", ".DS_Store", ".0.png"):
    (root / "train" / "cat" / name).write_bytes(b"\0\5\x16\7")
  for folder in ("__MACOSX/train/cat", "train/@eaDir/cat", "train/.cache"):
    (root / folder).mkdir(parents=True)
    (root / folder / "0.png").write_bytes(b"\0\5\x16\7")
  (root / "train" / "cat" / "more").mkdir()
  (root / "train" / "cat" / "more" / "._5.jpg").write_bytes(b"")
  images = from_folders.open_folder(str(root))
  assert images.class_names == clean.class_names == ("cat", "dog")
  np.testing.assert_array_equal(images.train.labels, clean.train.labels)
  assert not images.passed_over


def test_what_is_no_image_is_counted(tmp_path):
  root = data_sets.save_folder(tmp_path)
  (root / "extra").mkdir()
  Image.new("L", (4, 4)).save(root / "extra" / "0.png")
  (root / "train" / "cat" / "a.txt").write_text("")
  (root / "test" / "dog" / "b.TXT").write_text("")
  (root / "test" / "dog" / "README").write_text("")
  for where in (root, root / "train"):
    Image.new("L", (4, 4)).save(where / "loose.png")
  images = from_folders.open_folder(str(root))
  assert images.passed_over == {
    ".txt": 2,
    "no suffix": 1,
    "images in extra": 1,
    ".png outside the classes": 2,
  }
  note, *_ = data_sets.load("folder", path=str(root)).notes
  assert note == (
    "ignored files: 2 .png outside the classes, 2 .txt, 1 images in extra, 1 no"
    " suffix"
  )


def test_a_folder_above_the_classes_is_pointed_out(tmp_path):
  for path in ("one/cat/a.png", "one/dog/a.png", "two/cat/b.png"):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(tmp_path / path)
  (note,) = from_folders.open_folder(str(tmp_path)).notes
  assert note == (
    "all images are in subfolders of the folders one, two, which are taken for"
    " the classes"
  )
  Image.new("L", (4, 4)).save(tmp_path / "two" / "b.png")
  assert not from_folders.open_folder(str(tmp_path)).notes


@pytest.mark.parametrize(
  "parts",
  [
    ("Train", "Valid", "Test"),
    ("training", "validation", "testing"),
    ("TRAIN", "dev", "TEST"),
    ("training_set", "val", "test_set"),
    ("Train data", "validation-images", "testset"),
    ("train2017", "val2017", "test2017"),
    ("train_val", "valid", "test"),
    ("pets_train", "pets_valid", "pets_test"),
  ],
)
def test_parts_under_their_usual_names(tmp_path, parts):
  root = data_sets.save_folder(tmp_path, parts, num_images=5)
  dataset = data_sets.load("folder", path=str(root))
  assert dataset.class_names == ("cat", "dog")
  sizes = (dataset.num_train, dataset.num_val, dataset.num_test)
  assert sizes == (10, 10, 10)


def test_a_class_may_be_called_train(tmp_path):
  data_sets.save_folder(tmp_path, ("",))
  (tmp_path / "cat").rename(tmp_path / "train")
  images = from_folders.open_folder(str(tmp_path))
  assert images.class_names == ("dog", "train")


def _move_parts_into_classes(root):
  for name in ("cat", "dog"):
    (root / name).mkdir()
    for part in ("train", "test"):
      (root / part / name).rename(root / name / part)
  for part in ("train", "test"):
    (root / part).rmdir()


def _rename_parts(*names):
  def rename(root):
    for part, name in zip(("train", "test"), names, strict=True):
      (root / part).rename(root / name)

  return rename


def _classes_outside(root):
  for name in ("cat", "dog"):
    (root / "train" / name).rename(root / name)
  (root / "train").rmdir()


def _and_another_folder(change):
  def both(root):
    change(root)
    shutil.copytree(next(root.rglob("cat")), root / "more")

  return both


def _flat(root):
  for part in ("train", "test"):
    for folder in list((root / part).iterdir()):
      for file in list(folder.iterdir()):
        file.rename(root / part / f"{folder.name}{file.name}")
      folder.rmdir()
  (root / "test").rename(root / "test1")


def _twice(root):
  """As in a well-known data set of scenes."""
  for part in ("train", "test"):
    (root / f"seg_{part}").mkdir()
    (root / part).rename(root / f"seg_{part}" / f"seg_{part}")
  shutil.copytree(
    root / "seg_test" / "seg_test" / "cat", root / "seg_pred" / "a"
  )


def _folds(root):
  _rename_parts("fold_0", "fold_1")(root)
  shutil.rmtree(root / "fold_1" / "dog")


def _wrap(root):
  (root / "pets").mkdir()
  for part in ("train", "test"):
    (root / part).rename(root / "pets" / part)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (_move_parts_into_classes, "has the parts in the classes (cat/train)"),
    (_rename_parts("fold1", "fold2"), "if they are parts of a data set"),
    (_rename_parts("pets_train_val", "pets_val"), "if they are parts"),
    (_rename_parts("rest", "test"), "if they are parts of a data set"),
    (_classes_outside, "has cat, dog, and so does its folder test; move"),
    (_and_another_folder(_move_parts_into_classes), "the parts in the classes"),
    (
      _and_another_folder(_rename_parts("pets_train", "pets_test")),
      "are parts",
    ),
    (_flat, "has test1, train; call the parts of a data set train, val"),
    (_twice, "have the folders seg_test, seg_train; if they are parts"),
    (_folds, "fold_0, fold_1 in"),
    (_wrap, "pets' as the path"),
  ],
)
def test_other_layouts_are_not_taken_for_classes(tmp_path, change, message):
  root = data_sets.save_folder(tmp_path)
  change(root)
  with pytest.raises(errors.InputError, match=re.escape(message)):
    from_folders.open_folder(str(root))


@pytest.mark.parametrize(
  "names", ["train_steam steam", "steam_train steam_test"]
)
def test_steam_trains_are_no_parts(tmp_path, names):
  for name in names.split():
    (tmp_path / name).mkdir()
    Image.new("L", (4, 4)).save(tmp_path / name / "0.png")
  images = from_folders.open_folder(str(tmp_path))
  assert images.class_names == tuple(sorted(names.split()))


def test_classes_may_have_names_like_parts_and_equal_subfolders(tmp_path):
  for name, part in itertools.product(("test_tube", "flask"), ("left", "top")):
    (tmp_path / name / part).mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / name / part / "0.png")
  (tmp_path / "flask" / "top").rename(tmp_path / "flask" / "right")
  images = from_folders.open_folder(str(tmp_path))
  assert images.class_names == ("flask", "test_tube")
  assert len(images.train.labels) == 4


def test_links_are_followed_out_of_the_data_set_only(tmp_path):
  root = data_sets.save_folder(tmp_path / "pictures")
  elsewhere = data_sets.save_folder(tmp_path / "elsewhere", ("more",))
  cats = root / "train" / "cat"
  (cats / "more").symlink_to(elsewhere / "more" / "cat")
  # Each of these would put images into a second class or part, or never end.
  for name, target in (
    ("loop", cats),
    ("others", root / "train" / "dog"),
    ("test", root / "test" / "cat"),
    ("up", "../.."),
    ("root", "/"),
    ("again", elsewhere / "more" / "cat"),
  ):
    (cats / name).symlink_to(target)
  images = from_folders.open_folder(str(root))
  np.testing.assert_array_equal(np.bincount(images.train.labels), [20, 10])
  assert images.passed_over == {"links to folders of this data set": 6}
  assert from_folders.digest(str(root))


@pytest.mark.parametrize(
  ("target", "message"),
  [("cat", "classes cat and kitty in .* are one folder"), ("..", "it is in")],
)
def test_a_link_makes_no_second_class(tmp_path, target, message):
  root = data_sets.save_folder(tmp_path)
  for part in ("train", "test"):
    (root / part / "kitty").symlink_to(target)
  with pytest.raises(errors.InputError, match=message):
    from_folders.open_folder(str(root))


def test_the_test_set_may_be_a_link(tmp_path):
  """As in the usual arrangement of ImageNet."""
  root = data_sets.save_folder(tmp_path, ("train", "val"))
  (root / "test").symlink_to("val")
  (root / "latest").symlink_to("train")
  dataset = data_sets.load("folder", path=str(root))
  note = "20 test images have the same pixels as validation images"
  assert note in dataset.notes


def test_classes_whose_names_contain_those_of_parts(tmp_path):
  for name in ("valley", "festival", "scaffold"):
    (tmp_path / name / "images").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / name / "images" / "0.png")
  images = from_folders.open_folder(str(tmp_path))
  assert images.class_names == ("festival", "scaffold", "valley")


@pytest.mark.parametrize("folder", [".", "train", "train/cat"])
def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch, folder):
  root = data_sets.save_folder(tmp_path)
  scandir = os.scandir

  def refuse(path):
    if pathlib.Path(path) == root / folder:
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(errors.InputError, match=r"cannot be read \(Permission"):
    from_folders.open_folder(str(root))


def test_accents_of_a_mac_name_the_same_class(tmp_path):
  root = data_sets.save_folder(tmp_path)
  forms = {"train": "NFD", "test": "NFC"}
  for part, form in forms.items():
    name = unicodedata.normalize(form, "bébé chat")
    (root / part / "cat").rename(root / part / name)
  images = from_folders.open_folder(str(root))
  assert images.class_names == (
    unicodedata.normalize("NFC", "bébé chat"),
    "dog",
  )
  (root / "train" / "bébé chat").mkdir()
  with pytest.raises(errors.InputError, match="how accents are encoded"):
    from_folders.open_folder(str(root))


def _damage(root: pathlib.Path) -> set[str]:
  """Spoil an image of each part in another way; return their paths."""
  train, test = (
    root / "train" / "cat" / "1.png",
    root / "test" / "dog" / "2.png",
  )
  train.write_bytes(train.read_bytes()[:-40])
  test.write_bytes(b"")
  floats = root / "train" / "dog" / "f.tif"
  Image.new("F", (8, 8)).save(floats)
  return {str(path) for path in (train, test, floats)}


def test_pipes_and_broken_links_are_named(tmp_path):
  root = data_sets.save_folder(tmp_path)
  os.mkfifo(root / "train" / "cat" / "pipe.png")
  (root / "test" / "dog" / "link.png").symlink_to(tmp_path / "gone.png")
  with pytest.raises(errors.InputError, match="2 of 42 images") as caught:
    data_sets.load("folder", path=str(root))
  assert "pipe.png is not a regular file" in str(caught.value)
  assert "link.png cannot be read (FileNotFoundError)" in str(caught.value)
  assert from_folders.digest(str(root))


@pytest.mark.parametrize("in_memory", [True, False])
def test_all_bad_images_are_named_before_training(tmp_path, in_memory):
  root = data_sets.save_folder(tmp_path)
  bad = _damage(root)
  load = lambda **fields: data_sets.load(
    "folder", path=str(root), in_memory=in_memory, augment="none", **fields
  )
  with pytest.raises(errors.InputError, match="3 of 41 images") as caught:
    load()
  assert all(name in str(caught.value) for name in bad)
  with pytest.raises(errors.InputError, match=r"max_bad_fraction to 0\.074$"):
    load(bad_images="skip")
  dataset = load(bad_images="skip", max_bad_fraction=0.1)
  assert {*dataset.skipped} == bad
  assert (dataset.num_train + dataset.num_val, dataset.num_test) == (19, 19)
  assert sum(len(b.labels) for b in dataset.train_batches(0)) == 8
  test = data_sets.concatenated(dataset.eval_batches("test"))
  assert test.mask.sum() == 19
  np.testing.assert_array_equal(test.labels[test.mask == 1], [0] * 10 + [1] * 9)


def test_a_part_without_usable_images_is_refused(tmp_path):
  root = data_sets.save_folder(tmp_path)
  for file in root.glob("test/*/*"):
    file.write_bytes(b"")
  with pytest.raises(errors.InputError, match="none of the 20 images of test"):
    data_sets.load(
      "folder", path=str(root), bad_images="skip", max_bad_fraction=0.9
    )


def test_a_class_without_usable_images_is_refused(tmp_path):
  root = data_sets.save_folder(tmp_path)
  for file in root.glob("train/dog/*"):
    file.write_bytes(b"")
  with pytest.raises(errors.InputError, match="training images of dog can be"):
    data_sets.load(
      "folder",
      path=str(root),
      bad_images="skip",
      max_bad_fraction=0.9,
      batch_size=2,
    )
