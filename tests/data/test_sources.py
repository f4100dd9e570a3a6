"""Data sets as they are opened: bundled, arrays, folders and tfds."""

import io
import re
import shutil

import chex
import numpy as np
from PIL import Image
import pytest

from l2t_jax import errors, imports
from l2t_jax.data import from_arrays, image_files, pillow
from tests.support import data_sets


@pytest.mark.parametrize(
  ("name", "size", "num_records"), [("mnist", 28, 5000), ("digits", 8, 1797)]
)
def test_bundled_sets(name, size, num_records):
  source = data_sets.open_images("bundled", name=name)
  assert source.test is None
  assert len(source.train.labels) == num_records
  assert set(source.train.labels) == set(range(10))
  image = source.train.read_image(0)
  chex.assert_shape(image, (size, size, 1))
  brightest = [np.asarray(source.train.read_image(i)).max() for i in range(9)]
  assert max(brightest) > 240


def test_grey_npz_becomes_rgb(tmp_path):
  arrays = data_sets.random_arrays()
  arrays["x_train"] = arrays["x_train"][..., 0]
  arrays["x_test"] = arrays["x_test"][..., 0]
  dataset = data_sets.load(
    path=data_sets.save_npz(tmp_path / "grey.npz", arrays)
  )
  data_sets.check_eval(
    dataset, "test", np.stack([arrays["x_test"]] * 3, axis=-1)
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"x_test": None}, "lacks 'x_test'"),
    ({"x_train": np.zeros((60, 64), np.uint8)}, r"uint8 \[60, 64\]"),
    (
      {
        "x_train": np.zeros((60, 8, 8, 4), np.uint8),
        "x_test": np.zeros((21, 8, 8, 4), np.uint8),
      },
      "channels is 3, but the images are uint8 with 4 channels",
    ),
    ({"x_train": np.zeros((60, 3, 8, 8), np.uint8)}, r"transpose\(0, 2, 3, 1"),
    ({"x_test": np.zeros((21, 8, 8, 3), np.float32)}, "x_train is uint8"),
    ({"x_test": np.zeros((21, 8, 8, 4), np.uint8)}, "they must agree"),
    ({"x_train": np.zeros((60, 8, 8, 3))}, "x_train is float64"),
    ({"x_train": np.full((60, 8, 8, 3), np.nan, np.float32)}, "60 images of x"),
    ({"class_names": np.array(["a", "b", "a"])}, "class_names has 'a' 2 times"),
    ({"class_names": np.array("abc")}, r"class_names is <U3 \[\]"),
    (
      {
        "y_train": np.full(60, 2**32),
        "class_names": np.array(["a", "b", "c"]),
      },
      "y_train has label 4294967296, but class_names has only 3",
    ),
    ({"y_train": np.full(60, b"\xe9")}, "y_train holds bytes that are not"),
    (
      {"y_train": np.eye(4)[np.zeros(60, int)], "y_test": np.eye(3)[[0] * 21]},
      "y_train 4, y_test 3",
    ),
    ({"y_train": np.zeros(60)}, "y_train is float64"),
    ({"y_test": np.full(21, -1)}, "y_test has label -1"),
    (
      {"x_valid": np.zeros((9, 8, 8, 3), np.uint8)},
      "has x_valid; the names of",
    ),
    ({"Y_test": np.zeros(21, int)}, "has Y_test; the names of"),
    ({"test_y": np.zeros(21, int)}, "has test_y; the names of"),
    (
      {"y_train": np.array([*"ab"] * 30, object)},
      r"y_train holds Python objects; .* y_train.astype\(str\)",
    ),
  ],
)
def test_malformed_npz_is_refused(tmp_path, changes, message):
  arrays = {
    key: value
    for key, value in (data_sets.random_arrays() | changes).items()
    if value is not None
  }
  with pytest.raises(errors.InputError, match=message):
    data_sets.load(path=data_sets.save_npz(tmp_path / "bad.npz", arrays))


@pytest.mark.parametrize(
  "change",
  [
    lambda y: y[:, None],
    lambda y: np.eye(3)[y],
    lambda y: np.eye(3, dtype=bool)[y],
    lambda y: np.array(["ant", "bee", "cät"])[y],
    lambda y: np.array(["ant", "bee", "cät"], object)[y],
    lambda y: np.char.encode(np.array(["ant", "bee", "cät"])[y], "utf-8"),
    lambda y: y.astype(np.uint64),
    lambda y: np.eye(3, dtype=np.float32)[y],
  ],
)
def test_labels_as_people_have_them(change):
  arrays = data_sets.random_arrays()
  numbers = arrays["y_train"].copy(), arrays["y_test"].copy()
  arrays |= {key: change(arrays[key]) for key in ("y_train", "y_test")}
  images = from_arrays.image_set(arrays, "arrays")
  np.testing.assert_array_equal(images.train.labels, numbers[0])
  np.testing.assert_array_equal(images.test.labels, numbers[1])
  is_named = arrays["y_train"].dtype.kind in "USO"
  names = ("ant", "bee", "cät") if is_named else ("0", "1", "2")
  assert images.class_names == names


def test_other_arrays_are_named():
  others = {name: np.arange(3) for name in ("ids_train", "x_mean", "y_names")}
  images = from_arrays.image_set(data_sets.random_arrays() | others, "arrays")
  assert images.notes == ("ignored arrays: ids_train, x_mean, y_names",)


def test_an_empty_file_is_no_npz(tmp_path):
  (tmp_path / "empty.npz").touch()
  with pytest.raises(errors.InputError, match="or is cut off"):
    from_arrays.load_npz(str(tmp_path / "empty.npz"))


@pytest.mark.parametrize("in_memory", [True, False])
def test_copies_among_arrays_are_counted(tmp_path, in_memory):
  arrays = data_sets.random_arrays()
  twice = {name: np.concatenate([arrays[name]] * 2) for name in ("x_train",)}
  arrays |= twice | {"y_train": np.tile(arrays["y_train"], 2)}
  path = data_sets.save_npz(tmp_path / "twice.npz", arrays)
  dataset = data_sets.load(path=path, in_memory=in_memory, augment="none")
  (note,) = dataset.notes
  assert re.match(r"\d+ val images have the same pixels as training", note)


def test_a_test_set_that_is_the_validation_set_is_noted(tmp_path):
  root = data_sets.save_folder(tmp_path)
  shutil.copytree(root / "test", root / "val")
  dataset = data_sets.load("folder", path=str(root))
  note = "20 test images have the same pixels as validation images"
  assert note in dataset.notes


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("scales", [(1, 255), (255, 1), (1, 1)])
def test_a_part_on_another_scale_is_noted(tmp_path, part, scales):
  arrays = data_sets.random_arrays()
  for name, scale in (("train", scales[0]), ("test", scales[1])):
    arrays[f"x_{name}"] = np.float32(arrays[f"x_{name}"] * (scale / 255))
  for kind in "xy":
    arrays[f"{kind}_{part}"] = arrays.pop(f"{kind}_test")
  path = data_sets.save_npz(tmp_path / "scales.npz", arrays)
  notes = data_sets.load(path=path, mean=(), std=()).notes
  if scales == (1, 1):
    assert not notes
    return
  (note,) = notes
  expected = f"{part} images have values from 0 to {scales[1]}, but .* alike"
  assert re.match(expected, note)


def test_class_names_number_the_names(tmp_path):
  arrays = data_sets.random_arrays()
  arrays["class_names"] = np.array(["bee", "cat", "ant"])
  for key in ("y_train", "y_test"):
    arrays[key] = np.array(["ant", "bee", "cat"])[arrays[key]]
  images = from_arrays.image_set(arrays, "arrays")
  assert images.class_names == ("bee", "cat", "ant")
  assert images.train.labels[:3].tolist() == [2, 0, 1]
  arrays["y_test"][3] = "dog"
  with pytest.raises(errors.InputError, match="y_test has dog, which class_"):
    from_arrays.image_set(arrays, "arrays")


@pytest.mark.parametrize("identifier", [60, 10**9, 2**32 + 1, 2**63 - 1])
def test_identifiers_are_no_labels(identifier):
  arrays = data_sets.random_arrays()
  arrays["y_train"] = arrays["y_train"].astype(np.int64)
  arrays["y_train"][7] = identifier
  with pytest.raises(errors.InputError, match=f"label {identifier}, but there"):
    from_arrays.image_set(arrays, "arrays")
  others = data_sets.random_arrays()
  others["y_test"] = np.full(21, identifier)
  with pytest.raises(errors.InputError, match="y_test has label"):
    from_arrays.image_set(others, "arrays")
  # The line of the message mends it.
  names = np.unique(arrays["y_train"])
  labels = np.searchsorted(names, arrays["y_train"])
  arrays |= {"class_names": names, "y_train": labels}
  images = from_arrays.image_set(arrays, "arrays")
  assert images.class_names == ("0", "1", "2", str(identifier))


def test_targets_beyond_32_bits_are_refused():
  arrays = data_sets.random_arrays()
  arrays = {
    "x_train": arrays["x_train"],
    "t_train": arrays["y_train"].astype(np.int64) + 2**32,
  }
  with pytest.raises(errors.InputError, match="integers must fit in 32 bits"):
    from_arrays.image_set(arrays, "arrays")


def test_folder_converts_every_kind_of_image(tmp_path):
  red = Image.new("RGB", (12, 9), (255, 0, 0))
  variants = {
    "rgb.jpg": red,
    "rgba.png": red.convert("RGBA"),
    "palette.gif": red.convert("P"),
    "grey.bmp": red.convert("L"),
    "upper.PNG": red,
    "web.webp": red,
  }
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    for file_name, image in variants.items():
      image.save(tmp_path / name / file_name)
    (tmp_path / name / "notes.txt").write_text("no image")
  for channels in (1, 3):
    dataset = data_sets.load(
      "folder",
      path=str(tmp_path),
      channels=channels,
      mean=(0.0,),
      std=(1.0,),
      val_fraction=0,
      test_fraction=0.5,
      batch_size=6,
      augment="none",
    )
    assert dataset.image_shape == (8, 8, channels)
    (batch,) = dataset.train_batches(0)
    chex.assert_shape(batch.images, (6, 8, 8, channels))
    # Grey of pure red is 76; JPEG and WebP move colours a little.
    expected = {(76,)} if channels == 1 else {(250, 0, 0), (80, 80, 80)}
    middle = np.asarray(batch.images)[:, 4, 4] * 255
    for pixel in middle:
      assert min(np.abs(pixel - close).max() for close in expected) < 8
  assert dataset.class_names == ("cat", "dog")


def test_folder_with_its_own_val_and_test(tmp_path):
  root = data_sets.save_folder(tmp_path, ("train", "val", "test"), num_images=3)
  (root / "val" / "cat" / "2.png").unlink()
  dataset = data_sets.load("folder", path=str(root), batch_size=2, per_class=2)
  assert (dataset.num_train, dataset.num_val, dataset.num_test) == (4, 5, 6)
  val = data_sets.concatenated(dataset.eval_batches("val"))
  np.testing.assert_array_equal(val.labels[val.mask == 1], [0, 0, 1, 1, 1])
  expected = pillow.resize(Image.open(root / "val" / "cat" / "0.png"), 8, 8)
  np.testing.assert_array_equal(
    data_sets.pixels_of(val.images[0]), np.asarray(expected)
  )


def test_folders_within_classes_are_read(tmp_path):
  root = data_sets.save_folder(tmp_path, ("",), num_images=8)
  for place in ("cat/young", "dog/.previews"):
    (root / place).mkdir()
    Image.new("L", (9, 9)).save(root / place / "more.pgm")
  dataset = data_sets.load("folder", path=str(root))
  counts = (dataset.num_train, dataset.num_val, dataset.num_test)
  assert sum(counts) == 2 * 8 + 1


@pytest.mark.parametrize("make_link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize(("num_copies", "is_accepted"), [(4, True), (5, False)])
def test_links_to_training_images_are_copies(
  tmp_path, num_copies, is_accepted, make_link
):
  root = data_sets.save_folder(tmp_path)
  for index in range(num_copies):
    link = root / "test" / "dog" / f"{index}.png"
    link.unlink()
    # Of another name, and once of another class.
    name = "cat" if index == 0 else "dog"
    getattr(link, make_link)(root / "train" / name / f"{index + 3}.png")
  if is_accepted:
    assert data_sets.load("folder", path=str(root)).num_test == 20
    return
  with pytest.raises(errors.InputError, match="5 of 20 images of test are in"):
    data_sets.load("folder", path=str(root))


def test_sixteen_bits_of_a_pgm_are_those_of_a_png(tmp_path):
  deep = np.full((9, 7), 40_000, np.uint16)
  Image.fromarray(deep).save(tmp_path / "deep.pgm")
  image = image_files.decode(tmp_path / "deep.pgm", name="deep")
  assert set(np.asarray(pillow.convert(image, 1, 16)).flat) == {40_000 // 256}


def test_a_split_without_classes_is_no_pair_of_classes(tmp_path):
  for part in ("train", "test"):
    (tmp_path / part).mkdir()
    Image.new("L", (9, 9)).save(tmp_path / part / "0.png")
  with pytest.raises(errors.InputError, match="train' has no subfolders"):
    data_sets.load("folder", path=str(tmp_path))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  """Directory of a tfds data set that was prepared without TensorFlow."""
  tfds = pytest.importorskip("tensorflow_datasets")

  class TinyPets(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      sizes = {"train": 12, "validation": 4, "test": 6}
      return {
        part: self._generate_examples(size) for part, size in sizes.items()
      }

    def _generate_examples(self, num_examples):
      for index in range(num_examples):
        # Encoded here: tfds would encode an array by TensorFlow.
        encoded = io.BytesIO()
        colour = (num_examples, 10 * index, 0)
        Image.new("RGB", (9 + index, 9), colour).save(encoded, "PNG")
        encoded.seek(0)
        yield index, {"image": encoded, "label": index % 2}

  path = str(tmp_path_factory.mktemp("tfds"))
  tfds.display_progress_bar(False)
  TinyPets(data_dir=path, file_format="array_record").download_and_prepare()
  return path


def test_tfds_reads_official_splits(tfds_dir):
  dataset = data_sets.load(
    "tfds",
    name="tiny_pets",
    path=tfds_dir,
    augment="none",
    batch_size=12,
    mean=(0.0,),
    std=(1.0,),
  )
  assert dataset.class_names == ("cat", "dog")
  assert (dataset.num_train, dataset.num_val, dataset.num_test) == (12, 4, 6)
  (batch,) = dataset.train_batches(0)
  for part, num in (
    (batch, 12),
    *(
      (next(dataset.eval_batches(split)), num)
      for split, num in (("val", 4), ("test", 6))
    ),
  ):
    colours = np.rint(np.asarray(part.images)[:num, 0, 0] * 255).astype(int)
    np.testing.assert_array_equal(colours[:, 0], num)
    np.testing.assert_array_equal(np.sort(colours[:, 1]), 10 * np.arange(num))
    np.testing.assert_array_equal(colours[:, 1] // 10 % 2, part.labels[:num])


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("stl11", "no data set 'stl11'; similar names: stl10"),
    ("stl10", "pip install tensorflow .*file_format='array_record'"),
    ("stl10/large", "BuilderConfig large not found"),
  ],
)
def test_tfds_errors_say_what_to_do(tmp_path, name, message):
  pytest.importorskip("tensorflow_datasets")
  with pytest.raises(errors.InputError, match=message) as caught:
    data_sets.load("tfds", name=name, path=str(tmp_path))
  assert "\n" not in str(caught.value)


def test_tfds_in_another_format_is_refused(tmp_path, tfds_dir):
  shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
  (info,) = tmp_path.rglob("dataset_info.json")
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(errors.InputError, match="is prepared as tfrecord"):
    data_sets.load("tfds", name="tiny_pets", path=str(tmp_path))


def test_missing_package_is_named():
  with pytest.raises(errors.InputError, match="pip install some-package"):
    imports.require("no_such_module", needed_for="it", package="some-package")


def _damage_records(path, how):
  content = path.read_bytes()
  if how == "missing":
    path.unlink()
  elif how == "empty":
    path.write_bytes(b"")
  elif how == "cut":
    path.write_bytes(content[: len(content) // 2])
  else:
    middle = bytearray(content)
    for position in range(500, 520):  # Among the first images.
      middle[position] ^= 255
    path.write_bytes(middle)


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "spoilt"])
def test_damaged_records_are_one_line(tfds_dir, tmp_path, how):
  folder = shutil.copytree(tfds_dir, tmp_path / "tfds")
  (file,) = folder.rglob("*-train.array_record*")
  _damage_records(file, how)
  with pytest.raises(errors.InputError, match="tfds 'tiny_pets'") as caught:
    data_sets.load("tfds", name="tiny_pets", path=str(folder))
  assert "\n" not in str(caught.value)
  assert str(folder) in str(caught.value)
