"""Which images train, validate and test."""

import pathlib

import chex
import numpy as np
import pytest

from l2t_jax import errors
from l2t_jax.data import records, splits
from tests.support import data_sets

SHARED_DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"


def draw_split(source, **changes):
  values = {"val_fraction": 0.2, "test_fraction": 0.1, "seed": 0}
  return splits.seeded_split(source, **(values | changes))


def test_split_hash_is_stable_and_tells_splits_apart():
  source = data_sets.array_source(np.arange(100) % 4)
  digest = splits.split_hash(draw_split(source))
  assert digest == splits.split_hash(draw_split(source))
  assert digest != splits.split_hash(draw_split(source, seed=1))
  one, two, three = (np.array([index]) for index in (1, 2, 3))
  both = np.array([1, 2])
  none = np.array([], np.int64)
  assert splits.split_hash(splits.Split(one, two, three)) != (
    splits.split_hash(splits.Split(both, none, three))
  )
  # The value is in files that people keep: it must not drift.
  assert splits.split_hash(splits.Split(one, two, three)) == "1b79eb8a4d703f9c"


def test_official_sets_are_used_as_they_are():
  source = data_sets.array_source(
    np.arange(30) % 3, test_labels=np.arange(9) % 3, num_official_val=6
  )
  split = draw_split(source)
  np.testing.assert_array_equal(split.train, np.arange(24))
  np.testing.assert_array_equal(split.val, np.arange(24, 30))
  np.testing.assert_array_equal(split.test, np.arange(9))


def test_per_class_leaves_val_and_test_alone():
  source = data_sets.array_source(np.arange(120) % 4)
  full = draw_split(source)
  few = splits.keep_per_class(full, source, per_class=3, seed=0)
  chex.assert_trees_all_equal(few[1:], full[1:])


def test_dropped_classes_are_in_no_split(npz):
  dataset = data_sets.load(
    path=npz, classes=(2, 0), per_class=4, unlabeled=True
  )
  assert dataset.class_names == ("2", "0")
  assert dataset.num_train == 8
  assert dataset.num_val == 10
  assert dataset.num_test == 14
  assert dataset.num_unlabeled == 22
  arrays = np.load(npz)
  evaluated = data_sets.concatenated(dataset.eval_batches("test"))
  real = evaluated.mask == 1
  for new_label, label in enumerate((2, 0)):
    chosen = real & (evaluated.labels == new_label)
    expected = arrays["x_test"][arrays["y_test"] == label]
    np.testing.assert_array_equal(
      data_sets.sorted_rows(data_sets.pixels_of(evaluated.images[chosen])),
      data_sets.sorted_rows(expected),
    )


@pytest.mark.skipif(
  not SHARED_DATA.is_dir(), reason="the authors' STL-10 split is not here"
)
def test_author_split_of_stl10():
  source = data_sets.open_images("npz", path=str(SHARED_DATA / "stl10_32.npz"))
  path = str(SHARED_DATA / "author_splits.npz")
  split = splits.split_from_file(source, path, "stl10")
  assert [len(indices) for indices in split] == [4500, 500, 8000]
  assert not set(split.train) & set(split.val)
  assert source.class_names[0] == "airplane"


def test_images_that_a_split_file_leaves_out_stay_out(tmp_path, npz):
  split = {
    "s_train": np.arange(30),
    "s_val": np.arange(50, 60),
    "s_test": np.arange(21),
  }
  dataset = data_sets.load(
    path=npz,
    split_file=data_sets.save_npz(tmp_path / "split.npz", split),
    split_prefix="s",
    per_class=5,
    unlabeled=True,
    augment="none",
  )
  assert dataset.num_unlabeled == 15
  named = {image.tobytes() for image in np.load(npz)["x_train"][:30]}
  assert set(data_sets.unlabeled_images(dataset, 2)) < named


def test_classes_without_validation_images_are_named(tmp_path):
  root = data_sets.save_folder(tmp_path, ("",), num_images=8)
  for path in list((root / "dog").iterdir())[2:]:
    path.unlink()
  dataset = data_sets.load(
    "folder", path=str(root), batch_size=2, val_fraction=0.2, test_fraction=0.3
  )
  assert dataset.notes == ("no validation images of 1 of 2 classes: dog",)


def test_test_images_whose_labels_are_secret_do_not_test():
  """As those of ImageNet, which tfds labels -1."""
  secret = records.Records(np.full(6, -1, np.int32))
  assert records.unless_secret(secret) is None
  half = secret._replace(labels=np.array([0, 1, 2, -1, -1, -1], np.int32))
  assert records.unless_secret(half) is half
  source = records.ImageSet(half, 0, half, ("ant", "bee", "cat"))
  kept = records.keep_classes(source, (0, 2))
  np.testing.assert_array_equal(kept.test.labels, [0, -1, 1, -1, -1, -1])


def test_without_an_official_test_set_some_images_must_test():
  with pytest.raises(errors.InputError, match="test_fraction=0"):
    data_sets.load("bundled", name="digits", test_fraction=0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"s_val": np.array([0.5])}, "s_val is float64"),
    ({"s_test": np.array([-1, 3])}, "s_test goes from -1 to 3, .* 0 to 20"),
  ],
)
def test_malformed_split_file_is_refused(tmp_path, npz, changes, message):
  arrays = {
    "s_train": np.arange(50),
    "s_val": np.arange(50, 60),
    "s_test": np.arange(21),
  } | changes
  arrays = {key: value for key, value in arrays.items() if value is not None}
  path = data_sets.save_npz(tmp_path / "split.npz", arrays)
  with pytest.raises(errors.InputError, match=message):
    data_sets.load(path=npz, split_file=path, split_prefix="s")
