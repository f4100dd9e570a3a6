"""Data sets of Hugging Face, from files that the library itself wrote."""

import io
import sys

import numpy as np
from PIL import Image
import pytest

from l2t_jax import errors
from l2t_jax.data import look
from tests.support import data_sets

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _pixels(part, number):
  seed = 100 * ("train", "validation", "test").index(part) + number
  return np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)


def _rows(part, num_rows, kind, **others):
  labels = [number % 2 for number in range(num_rows)]
  images = [Image.fromarray(_pixels(part, n)) for n in range(num_rows)]
  return datasets.Dataset.from_dict(
    {"img": images, "kind": [kind(x) for x in labels], **others},
    features=datasets.Features(
      {
        "img": datasets.Image(),
        "kind": {
          int: datasets.ClassLabel(names=["cat", "dog"]),
          str: datasets.Value("string"),
        }[kind],
        **{name: datasets.Value("int64") for name in others},
      }
    ),
  )


def _splits(kind=int, sizes=(("train", 12), ("validation", 4), ("test", 6))):
  return datasets.DatasetDict(
    {part: _rows(part, size, kind) for part, size in sizes}
  )


def _load(path, **changes):
  fields = {"image_size": 8, "augment": "none", "batch_size": 4, **changes}
  return data_sets.load("huggingface", path=str(path), **fields)


def _save(how, splits, folder):
  """Write splits in one of the forms that people have; return their path."""
  if how == "save_to_disk":
    splits.save_to_disk(folder)
    return folder
  if how == "parquet":
    folder.mkdir()
    for part, rows in splits.items():
      rows.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return folder
  for part, rows in splits.items():
    for number, row in enumerate(rows):
      place = folder / part / rows.features["kind"].int2str(row["kind"])
      place.mkdir(parents=True, exist_ok=True)
      row["img"].save(place / f"{number:02}.png")
  return folder


@pytest.mark.parametrize("how", ["save_to_disk", "parquet", "imagefolder"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_official_splits(tmp_path, how, in_memory):
  path = _save(how, _splits(), tmp_path / "set")
  dataset = _load(path, in_memory=in_memory, eval_resize=8)
  assert dataset.class_names == ("cat", "dog")
  sizes = (dataset.num_train, dataset.num_val, dataset.num_test)
  assert sizes == (12, 4, 6)
  resize = lambda x: x.resize((8, 8), Image.Resampling.BILINEAR)
  if not in_memory:  # The short side is 8; the long one is cropped.
    resize = lambda x: x.crop((0, 0, 8, 8))
  for part, split, count in (("val", "validation", 4), ("test", "test", 6)):
    batch = data_sets.concatenated(dataset.eval_batches(part))
    images, labels = (x[batch.mask == 1] for x in (batch.images, batch.labels))
    order = range(count)
    if how == "imagefolder":
      order = sorted(order, key=lambda number: number % 2)
    for image, label, number in zip(images, labels, order, strict=True):
      assert label == number % 2
      expected = np.asarray(resize(Image.fromarray(_pixels(split, number))))
      np.testing.assert_array_equal(data_sets.pixels_of(image), expected)


def test_one_table_is_split(tmp_path):
  folder = tmp_path / "set"
  folder.mkdir()
  _rows("train", 40, int).to_parquet(folder / "all.parquet")
  for path in (folder / "all.parquet", folder):
    dataset = _load(path, batch_size=8)
    sizes = (dataset.num_train, dataset.num_val, dataset.num_test)
    assert sizes == (20, 10, 10)


def test_labels_that_are_names_or_have_to_be_named(tmp_path):
  names = lambda label: ["dog", "cat"][int(label)]
  rows = _rows("train", 20, str, number=[n // 2 for n in range(20)])
  rows = rows.map(lambda row: {"kind": names(row["kind"])})
  rows.save_to_disk(tmp_path / "set")
  with pytest.raises(errors.InputError, match="0 columns of type ClassLabel"):
    _load(tmp_path / "set")
  dataset = _load(tmp_path / "set", label_column="kind")
  assert dataset.class_names == ("cat", "dog")
  numbers = _load(
    tmp_path / "set", label_column="number", val_fraction=0, test_fraction=0.5
  )
  assert numbers.class_names == tuple("0123456789")
  with pytest.raises(errors.InputError, match="no column 'klass'"):
    _load(tmp_path / "set", label_column="klass")
  with pytest.raises(errors.InputError, match="'kind' is not of type Image"):
    _load(tmp_path / "set", label_column="kind", image_column="kind")


def test_secret_test_labels(tmp_path):
  splits = _splits()
  splits["test"] = splits["test"].map(lambda _: {"kind": -1})
  splits.save_to_disk(tmp_path / "set")
  dataset = _load(tmp_path / "set", test_fraction=0.5)
  assert (dataset.num_train, dataset.num_test) == (6, 6)


def test_numbers_below_0_are_withheld_labels(tmp_path):
  splits = _splits(str).map(lambda row: {"kind": int(row["kind"])})
  numbers = splits.cast_column("kind", datasets.Value("int64"))
  numbers["test"] = numbers["test"].map(lambda _: {"kind": -1})
  numbers.save_to_disk(tmp_path / "set")
  open_set = lambda name: data_sets.open_images(
    "huggingface", path=str(tmp_path / name), label_column="kind"
  )
  images = open_set("set")
  assert images.class_names == ("0", "1") and images.test is None
  first = lambda row, i: {"kind": -1 if i == 0 else row["kind"]}
  numbers["train"] = numbers["train"].map(first, with_indices=True)
  numbers.save_to_disk(tmp_path / "unknown")
  with pytest.raises(errors.InputError, match="of train has -1; leave out"):
    open_set("unknown")


def test_splits_without_a_role_are_named(tmp_path):
  sizes = (("train", 12), ("test", 6), ("validation", 3))
  splits = _splits(sizes=sizes)
  splits["extra"] = splits.pop("validation")
  dataset = _load(_save("save_to_disk", splits, tmp_path / "set"))
  assert "ignored files: 3 images in extra" in dataset.notes


@pytest.mark.parametrize("kind", ["numpy", "pandas", "arrow"])
def test_the_format_of_a_saved_set_does_not_matter(tmp_path, kind):
  splits = _splits().with_format(kind)
  dataset = _load(_save("save_to_disk", splits, tmp_path / "set"))
  assert (dataset.num_train, dataset.num_test) == (12, 6)


@pytest.mark.parametrize("with_path", [True, False])
def test_parquet_files_of_other_libraries(tmp_path, with_path):
  pandas = pytest.importorskip("pandas")
  rows = []
  for number in range(20):
    file = io.BytesIO()
    Image.fromarray(_pixels("train", number)).save(file, "PNG")
    image = file.getvalue()
    image = {"bytes": image, "path": None} if with_path else image
    rows.append({"image": image, "kind": number % 2, "md5": b"0"})
  path = tmp_path / "rows.parquet"
  pandas.DataFrame(rows).to_parquet(path)
  open_set = lambda **fields: data_sets.open_images(
    "huggingface", path=str(path), label_column="kind", **fields
  )
  with pytest.raises(errors.InputError, match="2 columns of type Image"):
    open_set()
  images = open_set(image_column="image")
  typed = datasets.load_dataset("parquet", data_files=str(path))["train"]
  typed.cast_column("image", datasets.Image()).to_parquet(path)
  assert len(open_set().train.labels) == 20
  read = np.asarray(images.train.read_image(3))
  np.testing.assert_array_equal(read, _pixels("train", 3))


def test_splits_that_number_their_classes_differently(tmp_path):
  """As where each is encoded alone: labels are compared by name."""
  splits = _splits()
  swapped = splits["test"].features["kind"].__class__(names=["dog", "cat"])
  usual = _load(_save("save_to_disk", splits, tmp_path / "usual"))
  splits["test"] = splits["test"].cast_column("kind", swapped)
  other = _load(_save("save_to_disk", splits, tmp_path / "other"))
  labels = [
    data_sets.concatenated(each.eval_batches("test")).labels[:6]
    for each in (usual, other)
  ]
  assert list(labels[0]) == [1 - label for label in labels[1]]
  more = splits["test"].features["kind"].__class__(names=["cow", "cat"])
  splits["test"] = splits["test"].cast_column("kind", more)
  with pytest.raises(errors.InputError, match="has cow, which train lacks"):
    _load(_save("save_to_disk", splits, tmp_path / "more"))


def test_a_class_with_the_name_none(tmp_path):
  splits = _splits()
  names = splits["test"].features["kind"].__class__(names=["None", "dog"])
  splits = splits.cast_column("kind", names)
  dataset = _load(_save("save_to_disk", splits, tmp_path / "set"))
  assert (dataset.num_train, dataset.num_test) == (12, 6)


def test_a_damaged_picture_is_named(tmp_path):
  rows = _rows("train", 20, int)
  content = io.BytesIO()
  Image.fromarray(_pixels("train", 3)).save(content, "PNG")
  cut = {"bytes": content.getvalue()[:-30], "path": None}
  column = rows.cast_column("img", datasets.Image(decode=False))["img"][:]
  column[3] = cut
  spoilt = datasets.Dataset.from_dict(
    {"img": column, "kind": rows["kind"][:]}, features=rows.features
  )
  spoilt.save_to_disk(tmp_path / "set")
  with pytest.raises(errors.InputError, match="image 3 of Hugging Face"):
    _load(tmp_path / "set")
  images = data_sets.open_images("huggingface", path=str(tmp_path / "set"))
  (bad,) = look.look(images)["unreadable"]
  assert bad["file"].startswith("3 of Hugging Face")


@pytest.mark.parametrize("given", [{}, {"name": "a/b", "path": "c"}])
def test_a_name_or_a_path(given):
  with pytest.raises(errors.InputError, match=r"give data\.name"):
    data_sets.open_images("huggingface", **given)


def test_the_hub_cannot_be_reached(tmp_path):
  with pytest.raises(errors.InputError, match="'nobody/nothing' cannot be"):
    data_sets.open_images("huggingface", name="nobody/nothing")
  with pytest.raises(errors.InputError, match="cannot be opened"):
    data_sets.open_images("huggingface", path=str(tmp_path / "nowhere"))


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(errors.InputError, match="pip install datasets"):
    data_sets.open_images("huggingface", name="a/b")
