"""Properties of data sets, splits, augmentation and batches."""

import io
import multiprocessing
import pathlib
import shutil
import subprocess
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from l2t_jax import data, errors, imports
from l2t_jax.data import (
  augmentation,
  datasets,
  from_tfds,
  pillow,
  records,
  splits,
)
from tests.support import small_runs

SHARED_DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


_OPTIONS = ("batch_size", "seed", "process_index", "process_count", "images")


def load(source="npz", **changes):
  """Load a data set with fields that suit these tests."""
  values = {
    "image_size": 8,
    "channels": 3,
    "mean": MEAN,
    "std": STD,
    "augment": "crop_flip",
    "crop_padding": 2,
    "eval_resize": 10,
    "val_fraction": 0.25,
    "test_fraction": 0.25,
    "batch_size": 8,
    "seed": 3,
    **changes,
  }
  options = {name: values.pop(name) for name in _OPTIONS if name in values}
  return data.load(data.DataFields(source=source, **values), **options)


def open_images(source, **fields):
  """Open a data set, whatever its images are to become."""
  return data.open_images(
    data.DataFields(
      source=source, **fields, image_size=8, channels=1, mean=(0,), std=(1,)
    )
  )


def random_arrays(num_train=60, num_test=21, num_classes=3, size=8):
  """Return the arrays of an npz data set; each image is one of its kind."""
  rng = np.random.default_rng(0)

  def draw(num):
    pixels = rng.integers(0, 256, (num, size, size, 3), dtype=np.uint8)
    return pixels, np.arange(num) % num_classes

  (x_train, y_train), (x_test, y_test) = draw(num_train), draw(num_test)
  return {
    "x_train": x_train,
    "y_train": y_train,
    "x_test": x_test,
    "y_test": y_test,
  }


def save_npz(path, arrays):
  np.savez(path, **arrays)
  return str(path)


@pytest.fixture
def small_eval_batches(monkeypatch):
  """Let evaluation batches be as small as those of training."""
  monkeypatch.setattr(datasets, "MIN_EVAL_BATCH_SIZE", 1)


@pytest.fixture
def npz(tmp_path):
  """Path of a data set with 60 training and 21 test images."""
  return save_npz(tmp_path / "set.npz", random_arrays())


def save_folder(root, parts=("train", "test"), num_images=10, size=(20, 16)):
  """Write root/PART/{cat,dog}/*.png and return root."""
  rng = np.random.default_rng(0)
  for part in parts:
    for name in ("cat", "dog"):
      folder = root / part / name
      folder.mkdir(parents=True)
      for index in range(num_images):
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
  return root


def streamed(path, **changes):
  """Load a folder as a stream of random resized crops."""
  values = {
    "path": str(path),
    "augment": "random_resized_crop_flip",
    "in_memory": False,
    "batch_size": 4,
  }
  return load("folder", **(values | changes))


def concatenated(batches, axis=0):
  """Join a list of batches field by field."""
  batches = [jax.tree.map(np.asarray, batch) for batch in batches]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis), *batches)


def pixels_of(normalised):
  """Undo the normalisation, to uint8."""
  scaled = np.asarray(normalised) * np.array(STD) + np.array(MEAN)
  return np.rint(scaled * 255).astype(np.uint8)


def sorted_rows(pixels):
  """Return images as sorted rows, to compare sets of images."""
  rows = pixels.reshape(len(pixels), -1)
  return rows[np.lexsort(rows.T)]


def array_source(labels, *, test_labels=None, num_official_val=0):
  """Return a source whose images are never read."""

  def wrap(values):
    return records.Records(lambda index: None, np.asarray(values, np.int32))

  return records.ImageSet(
    wrap(labels),
    num_official_val,
    None if test_labels is None else wrap(test_labels),
    tuple("abcdefghij"[: 1 + max(labels)]),
  )


def draw_split(source, **changes):
  values = {"val_fraction": 0.2, "test_fraction": 0.1, "seed": 0}
  return splits.seeded_split(source, **(values | changes))


def test_seeded_split_is_disjoint_and_covers_everything():
  source = array_source(np.arange(100) % 4)
  split = draw_split(source)
  np.testing.assert_array_equal(np.sort(np.concatenate(split)), np.arange(100))


def test_seeded_split_takes_the_same_share_of_every_class():
  labels = np.repeat([0, 1, 2], [100, 50, 20])
  split = draw_split(array_source(labels))
  np.testing.assert_array_equal(np.bincount(labels[split.val]), [20, 10, 4])
  np.testing.assert_array_equal(np.bincount(labels[split.test]), [10, 5, 2])


def test_split_hash_is_stable_and_tells_splits_apart():
  source = array_source(np.arange(100) % 4)
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
  source = array_source(
    np.arange(30) % 3, test_labels=np.arange(9) % 3, num_official_val=6
  )
  split = draw_split(source)
  np.testing.assert_array_equal(split.train, np.arange(24))
  np.testing.assert_array_equal(split.val, np.arange(24, 30))
  np.testing.assert_array_equal(split.test, np.arange(9))


def test_per_class_keeps_so_many_and_leaves_val_and_test_alone():
  source = array_source(np.arange(120) % 4)
  full = draw_split(source)
  few, more = (
    splits.keep_per_class(full, source, per_class=number, seed=0)
    for number in (3, 7)
  )
  counts = np.bincount(source.train.labels[few.train])
  np.testing.assert_array_equal(counts, [3, 3, 3, 3])
  assert set(few.train) < set(more.train) < set(full.train)
  chex.assert_trees_all_equal(few[1:], full[1:])


def test_dropped_classes_are_in_no_split(npz):
  dataset = load(path=npz, classes=(2, 0), per_class=4, unlabeled=True)
  assert dataset.class_names == ("2", "0")
  assert dataset.num_train == 8
  assert dataset.num_val == 10
  assert dataset.num_test == 14
  assert dataset.num_unlabeled == 22
  arrays = np.load(npz)
  evaluated = concatenated(dataset.eval_batches("test"))
  real = evaluated.mask == 1
  for new_label, label in enumerate((2, 0)):
    chosen = real & (evaluated.labels == new_label)
    expected = arrays["x_test"][arrays["y_test"] == label]
    np.testing.assert_array_equal(
      sorted_rows(pixels_of(evaluated.images[chosen])), sorted_rows(expected)
    )


@pytest.mark.skipif(
  not SHARED_DATA.is_dir(), reason="the authors' STL-10 split is not here"
)
def test_author_split_of_stl10():
  source = open_images("npz", path=str(SHARED_DATA / "stl10_32.npz"))
  path = str(SHARED_DATA / "author_splits.npz")
  split = splits.split_from_file(source, path, "stl10")
  assert [len(indices) for indices in split] == [4500, 500, 8000]
  assert not set(split.train) & set(split.val)
  assert source.class_names[0] == "airplane"


def reference_crop_flip(pixels, offsets, flips, padding):
  """Do in numpy, image by image, what pad_crop_flip does."""
  size = pixels.shape[1]
  result = []
  for image, (top, left), flip in zip(pixels, offsets, flips, strict=True):
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    crop = padded[top : top + size, left : left + size]
    result.append(crop[:, ::-1] if flip else crop)
  return np.stack(result)


def test_crop_and_flip_match_numpy():
  pixels = random_arrays(num_train=7)["x_train"]
  offsets = np.array([[0, 0], [4, 4], [0, 4], [2, 2], [1, 3], [3, 0], [2, 1]])
  flips = np.array([0, 1, 0, 0, 1, 1, 1], bool)
  cropped = augmentation.pad_crop_flip(
    jnp.array(pixels), jnp.array(offsets), jnp.array(flips), padding=2
  )
  np.testing.assert_array_equal(
    cropped, reference_crop_flip(pixels, offsets, flips, 2)
  )


def test_draws_reach_every_offset_and_both_flips():
  offsets, flips = augmentation.draw_crops(jax.random.key(0), 2000, padding=2)
  for column in np.asarray(offsets).T:
    np.testing.assert_array_equal(np.unique(column), np.arange(5))
  assert 0.45 < np.mean(flips) < 0.55


def test_normalise_matches_numpy():
  pixels = random_arrays()["x_train"]
  expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
  np.testing.assert_allclose(
    augmentation.normalise(pixels, MEAN, STD), expected, rtol=1e-5, atol=1e-6
  )


def test_the_border_of_a_crop_is_black(tmp_path):
  arrays = random_arrays()
  arrays["x_train"][:] = 255
  dataset = load(path=save_npz(tmp_path / "white.npz", arrays), augment="crop")
  values = np.unique(pixels_of(next(dataset.train_batches(0)).images))
  np.testing.assert_array_equal(values, [0, 255])


def test_crop_does_not_flip(tmp_path):
  arrays = random_arrays()
  # Brightness rises from left to right: a mirrored image would show.
  arrays["x_train"][:] = np.linspace(10, 250, 8)[:, None]
  path = save_npz(tmp_path / "ramp.npz", arrays)

  def any_falls(name):
    crops = pixels_of(next(load(path=path, augment=name).train_batches(0))[0])
    middle = crops[:, 4, 2:6, 0].astype(int)
    return bool((np.diff(middle) < 0).any(axis=-1).any())

  assert not any_falls("crop")
  assert any_falls("crop_flip")


def test_random_box_has_the_bounds_of_torchvision():
  rng = np.random.default_rng(0)
  boxes = np.array([pillow.random_box(60, 40, rng) for _ in range(2000)])
  widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  assert (
    boxes.min() >= 0 and boxes[:, 2].max() <= 60 and boxes[:, 3].max() <= 40
  )
  # Sides are whole pixels, which moves area and ratio a little.
  shares, ratios = widths * heights / 2400, widths / heights
  assert 0.07 < shares.min() < 0.1 and 0.85 < shares.max() <= 1
  assert 0.7 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.43
  assert pillow.random_box(300, 10, rng) == (143, 0, 156, 10)


def test_center_crop_keeps_the_middle():
  pixels = np.zeros((30, 60, 3), np.uint8)
  pixels[10:20, 25:35] = 200
  cropped = pillow.resize_and_center_crop(
    Image.fromarray(pixels), resized=30, size=10
  )
  np.testing.assert_array_equal(np.asarray(cropped), 200)


def test_an_epoch_is_a_permutation(npz):
  dataset = load(path=npz, augment="none", batch_size=9, val_fraction=0)
  assert (dataset.num_train, dataset.steps_per_epoch) == (60, 6)
  epoch = concatenated(dataset.train_batches(0))
  arrays = np.load(npz)
  lookup = {
    image.tobytes(): (index, label)
    for index, (image, label) in enumerate(
      zip(arrays["x_train"], arrays["y_train"], strict=True)
    )
  }
  found = [lookup[image.tobytes()] for image in pixels_of(epoch.images)]
  indices, labels = zip(*found, strict=True)
  assert len(set(indices)) == 54
  assert list(indices) != sorted(indices)
  np.testing.assert_array_equal(epoch.labels, labels)


def test_the_order_of_an_epoch_stays_what_it_was(npz):
  dataset = load(path=npz, val_fraction=0)
  # Runs that were begun with another version go on as they would have.
  order = np.random.default_rng([3, 1]).permutation(60)
  labels = concatenated(dataset.train_batches(1)).labels
  np.testing.assert_array_equal(labels, np.load(npz)["y_train"][order[:56]])


@pytest.mark.parametrize("name", ["none", "crop_flip"])
def test_epochs_and_seeds_differ(npz, name):
  dataset = load(path=npz, augment=name)
  first = concatenated(dataset.train_batches(0))
  chex.assert_trees_all_equal(first, concatenated(dataset.train_batches(0)))
  second = concatenated(dataset.train_batches(1))
  assert not np.array_equal(first.images, second.images)
  other = concatenated(load(path=npz, augment=name, seed=4).train_batches(0))
  assert not np.array_equal(first.images, other.images)


def test_every_step_and_epoch_draws_its_own_crops(tmp_path):
  arrays = random_arrays()
  arrays["x_train"][:] = arrays["x_train"][0]
  dataset = load(path=save_npz(tmp_path / "same.npz", arrays))
  first, second, *_ = dataset.train_batches(0)
  assert not np.array_equal(first.images, second.images)
  next_epoch = next(dataset.train_batches(1))
  assert not np.array_equal(first.images, next_epoch.images)


def test_start_resumes_within_an_epoch(npz):
  dataset = load(path=npz)
  whole = list(dataset.train_batches(2))
  rest = list(load(path=npz).train_batches(2, start=3))
  chex.assert_trees_all_equal(whole[3:], rest)
  assert not list(dataset.train_batches(2, start=dataset.steps_per_epoch))


def test_processes_together_equal_one(npz, small_eval_batches):
  together = load(path=npz)
  shares = [
    load(path=npz, process_index=index, process_count=2) for index in (0, 1)
  ]
  for read in (
    lambda dataset: dataset.train_batches(1),
    lambda dataset: dataset.eval_batches("test"),
  ):
    parts = zip(*(read(share) for share in shares), strict=True)
    for part, batch in zip(parts, read(together), strict=True):
      chex.assert_trees_all_equal(
        concatenated(part), jax.tree.map(np.asarray, batch)
      )


def check_eval(dataset, split, expected):
  """Check that a split holds each expected image once, then padding."""
  batches = list(dataset.eval_batches(split))
  assert len({len(batch.images) for batch in batches}) == 1
  evaluated = concatenated(batches)
  assert evaluated.mask.sum() == len(expected)
  assert set(evaluated.mask) == {0.0, 1.0}
  np.testing.assert_array_equal(
    sorted_rows(pixels_of(evaluated.images[evaluated.mask == 1])),
    sorted_rows(expected),
  )


def test_eval_sees_every_image_once(npz, small_eval_batches):
  dataset = load(path=npz)
  assert dataset.num_test == 21
  assert len(list(dataset.eval_batches("test"))) == 3
  check_eval(dataset, "test", np.load(npz)["x_test"])


@pytest.mark.parametrize(
  ("batch_size", "eval_batch_size"),
  [(8, 128), (18, 144), (128, 128), (130, 130)],
)
def test_eval_batches_are_large(tmp_path, batch_size, eval_batch_size):
  arrays = random_arrays(num_train=200, num_test=150)
  path = save_npz(tmp_path / "large.npz", arrays)
  dataset = load(path=path, batch_size=batch_size)
  for batch in dataset.eval_batches("test"):
    chex.assert_shape(batch.mask, (eval_batch_size,))
  check_eval(dataset, "test", arrays["x_test"])


def test_eval_may_be_empty_only_for_val(npz):
  dataset = load(path=npz, val_fraction=0)
  assert dataset.num_val == 0
  assert not list(dataset.eval_batches("val"))


def test_a_batch_is_compiled_once(npz):
  dataset = load(path=npz, per_class=10, unlabeled=True)
  list(dataset.train_batches(0))
  with jax.no_tracing():
    list(dataset.train_batches(1))
    list(dataset.with_seed(5).train_batches(0))


def test_seeds_share_the_images_in_memory(npz):
  dataset = load(path=npz, per_class=10, unlabeled=True)
  num_arrays = len(jax.live_arrays())
  other = dataset.with_seed(5)
  assert len(jax.live_arrays()) == num_arrays
  assert other.split_hash == dataset.split_hash


@pytest.fixture(params=["in memory", "streaming"])
def load_few(request, tmp_path):
  """Loader of a folder: 16 labelled training images and 24 left over.

  40 more images are for val and test. All of them have the size of the batch:
  without augmentation, they come out as they are.
  """
  root = save_folder(tmp_path, ("",), num_images=40, size=(8, 8))
  in_memory = request.param == "in memory"
  defaults = {
    "path": str(root),
    "in_memory": in_memory,
    "augment": "crop_flip" if in_memory else "random_resized_crop_flip",
    "eval_resize": 8,
    "per_class": 8,
    "batch_size": 4,
    "unlabeled": True,
    "unlabeled_batch_size": 6,
  }
  return lambda **changes: load("folder", **(defaults | changes))


def unlabeled_images(dataset, num_epochs=1):
  """Return the bytes of the images without labels, in their order."""
  batches = [
    batch
    for epoch in range(num_epochs)
    for batch in dataset.train_batches(epoch)
  ]
  pixels = pixels_of(concatenated(batches).unlabeled)
  return [image.tobytes() for image in pixels]


def test_no_image_has_two_roles(load_few):
  dataset = load_few(augment="none")
  labelled = concatenated(dataset.train_batches(0)).images
  val, test = (
    concatenated(dataset.eval_batches(split)) for split in ("val", "test")
  )
  roles = [
    {image.tobytes() for image in pixels_of(part)}
    for part in (
      labelled,
      val.images[val.mask == 1],
      test.images[test.mask == 1],
    )
  ] + [set(unlabeled_images(dataset))]
  assert [len(role) for role in roles] == [16, 20, 20, 24]
  assert dataset.num_unlabeled == 24
  assert len(set.union(*roles)) == 80


def test_images_that_a_split_file_leaves_out_stay_out(tmp_path, npz):
  split = {
    "s_train": np.arange(30),
    "s_val": np.arange(50, 60),
    "s_test": np.arange(21),
  }
  dataset = load(
    path=npz,
    split_file=save_npz(tmp_path / "split.npz", split),
    split_prefix="s",
    per_class=5,
    unlabeled=True,
    augment="none",
  )
  assert dataset.num_unlabeled == 15
  named = {image.tobytes() for image in np.load(npz)["x_train"][:30]}
  assert set(unlabeled_images(dataset, 2)) < named


def test_labelled_images_do_not_depend_on_the_others(load_few):
  with_others, without = load_few(), load_few(unlabeled=False)
  assert with_others.steps_per_epoch == without.steps_per_epoch == 4
  assert (without.num_train, without.num_unlabeled) == (16, 0)
  for epoch in (0, 1):
    for batch, labelled in zip(
      with_others.train_batches(epoch),
      without.train_batches(epoch),
      strict=True,
    ):
      chex.assert_shape(batch.unlabeled, (6, 8, 8, 3))
      assert labelled.unlabeled is None
      chex.assert_trees_all_equal(batch[:2], labelled[:2])


@pytest.mark.parametrize("batch_size", [6, 5, 50])
def test_every_pass_is_a_permutation(load_few, batch_size):
  dataset = load_few(augment="none", unlabeled_batch_size=batch_size)
  stream = unlabeled_images(dataset, num_epochs=3)
  assert len(stream) == 12 * batch_size
  passes = [stream[i : i + 24] for i in range(0, len(stream) - 23, 24)]
  for images_of_pass in passes:
    assert len(set(images_of_pass)) == 24
    assert set(images_of_pass) == set(passes[0])
  assert len({tuple(images_of_pass) for images_of_pass in passes}) > 1
  assert unlabeled_images(dataset.with_seed(9), num_epochs=3) != stream


def test_images_without_labels_resume(load_few):
  whole = list(load_few().train_batches(2))
  rest = list(load_few().train_batches(2, start=1))
  chex.assert_trees_all_equal(whole[1:], rest)
  assert not np.array_equal(whole[0].unlabeled, whole[1].unlabeled)


def test_processes_share_images_without_labels(load_few):
  shares = [
    load_few(process_index=index, process_count=2).train_batches(1)
    for index in (0, 1)
  ]
  together = load_few().train_batches(1)
  for first, second, batch in zip(*shares, together, strict=True):
    chex.assert_trees_all_equal(
      concatenated([first, second]), jax.tree.map(np.asarray, batch)
    )


def test_images_without_labels_have_draws_of_their_own(load_few, tmp_path):
  paths = sorted(tmp_path.glob("*/*.png"))
  for path in paths[1:]:
    path.write_bytes(paths[0].read_bytes())
  dataset = load_few(unlabeled_batch_size=0)
  first, second, *_ = dataset.train_batches(0)
  chex.assert_equal_shape([first.images, first.unlabeled])
  # The images are all the same: so would be their crops.
  assert not np.array_equal(first.images, first.unlabeled)
  assert not np.array_equal(first.unlabeled, second.unlabeled)
  for other in (
    next(dataset.train_batches(1)),
    next(dataset.with_seed(9).train_batches(0)),
  ):
    assert not np.array_equal(first.images, other.images)
    assert not np.array_equal(first.unlabeled, other.unlabeled)


def test_a_folder_of_images_without_labels(load_few, tmp_path_factory):
  folder = tmp_path_factory.mktemp("unlabeled")
  rng = np.random.default_rng(1)
  expected = set()
  for name in ("one.png", "a/two.PNG", "a/b c/3.bmp"):
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (folder / name).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    expected.add(pixels.tobytes())
  (folder / "a" / "notes.txt").write_text("no image")

  def load_folder():
    return load_few(unlabeled_path=str(folder), per_class=0, augment="none")

  dataset = load_folder()
  assert (dataset.num_train, dataset.num_unlabeled) == (40, 3)
  assert set(unlabeled_images(dataset)) == expected
  (folder / "one.png").unlink()
  hashes = {load_folder().split_hash, dataset.split_hash}
  hashes.add(load_few(unlabeled=False, per_class=0).split_hash)
  assert len(hashes) == 3


def test_the_split_hash_tells_what_has_no_labels(load_few):
  with_others, without = load_few(), load_few(unlabeled=False)
  assert with_others.split_hash != without.split_hash
  assert with_others.split_hash == load_few(seed=9).split_hash


def test_with_seed_equals_another_load(load_few):
  dataset, expected = load_few(), load_few(seed=9)
  list(dataset.train_batches(0))
  # A stream of the first seed now waits for its next epoch, the second.
  other = dataset.with_seed(9)
  for epoch in (1, 0):
    chex.assert_trees_all_equal(
      list(other.train_batches(epoch)), list(expected.train_batches(epoch))
    )
  chex.assert_trees_all_equal(
    list(other.eval_batches("test")), list(expected.eval_batches("test"))
  )
  chex.assert_trees_all_equal(
    list(load_few().train_batches(1)), list(dataset.train_batches(1))
  )
  with pytest.raises(errors.InputError, match="seed is -1"):
    dataset.with_seed(-1)


@pytest.mark.parametrize(
  ("name", "size", "num_records"), [("mnist", 28, 5000), ("digits", 8, 1797)]
)
def test_bundled_sets(name, size, num_records):
  source = open_images("bundled", name=name)
  assert source.test is None
  assert len(source.train.labels) == num_records
  assert set(source.train.labels) == set(range(10))
  image = source.train.read_image(0)
  assert (image.size, image.mode) == ((size, size), "L")
  brightest = [np.asarray(source.train.read_image(i)).max() for i in range(9)]
  assert max(brightest) > 240


def test_grey_npz_becomes_rgb(tmp_path):
  arrays = random_arrays()
  arrays["x_train"] = arrays["x_train"][..., 0]
  arrays["x_test"] = arrays["x_test"][..., 0]
  dataset = load(path=save_npz(tmp_path / "grey.npz", arrays))
  check_eval(dataset, "test", np.stack([arrays["x_test"]] * 3, axis=-1))


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
    dataset = load(
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
  root = save_folder(tmp_path, ("train", "val", "test"), num_images=3)
  (root / "val" / "cat" / "2.png").unlink()
  dataset = load("folder", path=str(root), batch_size=2, per_class=2)
  assert (dataset.num_train, dataset.num_val, dataset.num_test) == (4, 5, 6)
  val = concatenated(dataset.eval_batches("val"))
  np.testing.assert_array_equal(val.labels[val.mask == 1], [0, 0, 1, 1, 1])
  expected = pillow.resize(Image.open(root / "val" / "cat" / "0.png"), 8, 8)
  np.testing.assert_array_equal(pixels_of(val.images[0]), np.asarray(expected))


def test_folders_within_classes_are_read(tmp_path):
  root = save_folder(tmp_path, ("",), num_images=8)
  for place in ("cat/young", "dog/.previews"):
    (root / place).mkdir()
    Image.new("L", (9, 9)).save(root / place / "more.pgm")
  dataset = load("folder", path=str(root))
  counts = (dataset.num_train, dataset.num_val, dataset.num_test)
  assert sum(counts) == 2 * 8 + 1


def test_a_class_may_be_called_train(tmp_path):
  for name in ("bus", "train"):
    (tmp_path / name).mkdir()
    for index in range(8):
      Image.new("L", (9, 9), index).save(tmp_path / name / f"{index}.png")
  dataset = load("folder", path=str(tmp_path))
  assert dataset.class_names == ("bus", "train")


def test_sixteen_bits_of_a_pgm_are_those_of_a_png(tmp_path):
  deep = np.full((9, 7), 40_000, np.uint16)
  Image.fromarray(deep).save(tmp_path / "deep.pgm")
  image = pillow.decode(tmp_path / "deep.pgm", name="deep")
  assert set(np.asarray(pillow.convert(image, 1)).flat) == {40_000 // 256}


def test_a_split_without_classes_is_no_pair_of_classes(tmp_path):
  for part in ("train", "test"):
    (tmp_path / part).mkdir()
    Image.new("L", (9, 9)).save(tmp_path / part / "0.png")
  with pytest.raises(errors.InputError, match="train' has no subfolders"):
    load("folder", path=str(tmp_path))


def test_classes_without_validation_images_are_named(tmp_path):
  root = save_folder(tmp_path, ("",), num_images=8)
  for path in list((root / "dog").iterdir())[2:]:
    path.unlink()
  dataset = load(
    "folder", path=str(root), batch_size=2, val_fraction=0.2, test_fraction=0.3
  )
  assert dataset.notes == ("no validation images of 1 of 2 classes: dog",)


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
  dataset = load(
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


def test_test_images_whose_labels_are_secret_do_not_test():
  """As those of ImageNet, which tfds labels -1."""
  secret = records.Records(lambda index: None, np.full(6, -1, np.int32))
  assert from_tfds.unless_secret(secret) is None
  half = secret._replace(labels=np.array([0, 1, 2, -1, -1, -1], np.int32))
  assert from_tfds.unless_secret(half) is half
  source = records.ImageSet(half, 0, half, ("ant", "bee", "cat"))
  kept = records.keep_classes(source, (0, 2))
  np.testing.assert_array_equal(kept.test.labels, [0, -1, 1, -1, -1, -1])


def test_workers_do_not_change_the_stream(tmp_path):
  root = save_folder(tmp_path)
  threads, workers = (
    streamed(root, num_workers=num, per_class=6, unlabeled=True)
    for num in (0, 2)
  )
  # Twice in a row: the second epoch goes on with the first one's workers.
  for epoch in (0, 1):
    chex.assert_trees_all_equal(
      list(threads.train_batches(epoch)), list(workers.train_batches(epoch))
    )
  # A broken image must come out of a worker as one line, too.
  for path in root.glob("train/*/*.png"):
    path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(errors.InputError, match=r"image .*\.png cannot be read"):
    list(workers.train_batches(5))


def test_images_in_memory_need_no_workers(tmp_path):
  """Each would get a copy of all of them."""
  values = {
    "path": save_npz(tmp_path / "set.npz", random_arrays()),
    "augment": "random_resized_crop_flip",
    "in_memory": False,
    "num_workers": 2,
  }
  before = multiprocessing.active_children()
  batches = load(**values).train_batches(0)
  next(batches)
  assert multiprocessing.active_children() == before


def test_evaluation_sees_most_of_an_image(tmp_path):
  root = save_folder(tmp_path)
  dataset = streamed(root, image_size=14, eval_resize=0)
  path = root / "test" / "cat" / "0.png"
  expected = pillow.resize_and_center_crop(
    Image.open(path), resized=16, size=14
  )
  batch = next(dataset.eval_batches("test"))
  np.testing.assert_array_equal(pixels_of(batch.images[0]), expected)


def test_a_dead_worker_is_told_of(tmp_path):
  dataset = streamed(save_folder(tmp_path), num_workers=1)
  batches = dataset.train_batches(0)
  next(batches)
  (worker,) = multiprocessing.active_children()
  worker.kill()
  with pytest.raises(errors.LostProcessError, match="reads images ended"):
    for epoch in range(20):  # What it had read before is used.
      list(batches)
      batches = dataset.train_batches(epoch + 1)


@pytest.mark.long
def test_workers_end_with_a_killed_process(tmp_path):
  root = save_folder(tmp_path)
  # Where worker processes start, scripts must be files.
  script = tmp_path / "script.py"
  script.write_text(_READ_AND_WAIT)
  process = small_runs.start_python(
    script,
    root,
    stdin=subprocess.PIPE,
    environment={"PYTHONPATH": str(small_runs.ROOT)},
  )
  workers = process.stdout.readline().split()
  process.kill()
  process.wait()
  assert len(workers) == 2
  deadline = time.time() + 30
  while any(map(_runs, workers)):
    assert time.time() < deadline
    time.sleep(0.1)


_READ_AND_WAIT = """
import multiprocessing, sys
from tests.data import test_data
if __name__ == "__main__":
  batches = test_data.streamed(sys.argv[1], num_workers=2).train_batches(0)
  next(batches)
  print(*(one.pid for one in multiprocessing.active_children()), flush=True)
  sys.stdin.read()
"""


def _runs(pid):
  """One that has ended may be there still, but no longer has a command."""
  try:
    return bool(pathlib.Path("/proc", pid, "cmdline").read_bytes())
  except FileNotFoundError:
    return False


def test_stream_is_deterministic_and_resumes(tmp_path):
  root = save_folder(tmp_path)
  dataset = streamed(root)
  whole = list(dataset.train_batches(1))
  assert len(whole) == dataset.steps_per_epoch == 4
  rest = list(streamed(root).train_batches(1, start=2))
  chex.assert_trees_all_equal(whole[2:], rest)
  # After an epoch out of turn and one left in the middle, too.
  list(dataset.train_batches(3))
  chex.assert_trees_all_equal(whole, list(dataset.train_batches(1)))
  next(dataset.train_batches(2))
  chex.assert_trees_all_equal(whole, list(dataset.train_batches(1)))
  other = concatenated(dataset.train_batches(2))
  assert not np.array_equal(concatenated(whole).images, other.images)


def test_streamed_processes_together_equal_one(tmp_path, small_eval_batches):
  root = save_folder(tmp_path)
  shares = [
    streamed(root, process_index=index, process_count=2) for index in (0, 1)
  ]
  for read in (
    lambda dataset: dataset.train_batches(1),
    lambda dataset: dataset.eval_batches("test"),
  ):
    parts = zip(*(read(share) for share in shares), strict=True)
    for part, batch in zip(parts, read(streamed(root)), strict=True):
      chex.assert_trees_all_equal(
        concatenated(part), jax.tree.map(np.asarray, batch)
      )


def test_streamed_eval_sees_every_image_once(tmp_path, small_eval_batches):
  root = save_folder(tmp_path)
  expected = [
    pillow.resize_and_center_crop(Image.open(path), resized=10, size=8)
    for path in root.glob("test/*/*.png")
  ]
  dataset = streamed(root, batch_size=8)
  assert len(list(dataset.eval_batches("test"))) == 3
  check_eval(dataset, "test", np.stack([np.asarray(i) for i in expected]))


def test_streamed_training_without_augmentation(tmp_path):
  root = save_folder(tmp_path)
  dataset = streamed(root, augment="none", val_fraction=0, batch_size=20)
  (batch,) = dataset.train_batches(0)
  expected = [
    pillow.resize_and_center_crop(Image.open(path), resized=10, size=8)
    for path in root.glob("train/*/*.png")
  ]
  np.testing.assert_array_equal(
    sorted_rows(pixels_of(batch.images)),
    sorted_rows(np.stack([np.asarray(image) for image in expected])),
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"classes": (1, 1)}, r"\(1, 1\) has duplicates"),
    ({"image_size": 0}, "image_size is 0"),
    (
      {"augment": "random_resized_crop_flip"},
      "'random_resized_crop_flip' .* in memory; possible: none, crop, crop_f",
    ),
    (
      {"augment": "crop", "in_memory": False},
      "'crop' .* streamed; possible: none, random_resized_crop_flip",
    ),
    (
      {"augment": "none", "in_memory": False, "eval_resize": 7},
      "eval_resize is 7, .* at least image_size=8",
    ),
    ({"crop_padding": -1}, "crop_padding is -1"),
    ({"seed": -1}, "seed is -1"),
    ({"split_seed": -1}, "split_seed is -1"),
    ({"per_class": -1}, "per_class is -1"),
    ({"num_workers": -1}, "num_workers is -1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"process_count": 3}, "batch_size is 8, .* multiple .* 3"),
    ({"val_fraction": -0.1}, "val_fraction -0.1"),
    ({"val_fraction": 0.01}, "no validation images: val_fraction=0.01"),
    (
      {"unlabeled": True, "per_class": 15},
      "per_class is 15 and leaves no images over",
    ),
    ({"unlabeled_path": "here"}, "is 'here', but unlabeled is False; set"),
    (
      {"unlabeled": True, "unlabeled_path": "nowhere"},
      "no folder 'nowhere'",
    ),
    ({"unlabeled_batch_size": -1}, "unlabeled_batch_size is -1"),
    (
      {"unlabeled_batch_size": 7, "process_count": 2},
      "unlabeled_batch_size is 7, .* multiple .* 2",
    ),
    ({"split_file": "no.npz"}, "no file 'no.npz'"),
  ],
)
def test_wrong_values_are_refused(npz, changes, message):
  values = {"source": "npz", "path": npz} | changes
  with pytest.raises(errors.InputError, match=message) as caught:
    load(values.pop("source"), **values)
  assert "\n" not in str(caught.value)


def test_without_an_official_test_set_some_images_must_test():
  with pytest.raises(errors.InputError, match="test_fraction=0"):
    load("bundled", name="digits", test_fraction=0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"x_test": None}, "lacks 'x_test'"),
    ({"x_train": np.zeros((60, 64), np.uint8)}, r"uint8 \[60, 64\]"),
    ({"x_train": np.zeros((60, 8, 8, 4), np.uint8)}, r"\[60, 8, 8, 4\]"),
    ({"y_train": np.zeros(60)}, "y_train is float64"),
    ({"y_test": np.full(21, -1)}, "y_test has label -1"),
  ],
)
def test_malformed_npz_is_refused(tmp_path, changes, message):
  arrays = {
    key: value
    for key, value in (random_arrays() | changes).items()
    if value is not None
  }
  with pytest.raises(errors.InputError, match=message):
    load(path=save_npz(tmp_path / "bad.npz", arrays))


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
  path = save_npz(tmp_path / "split.npz", arrays)
  with pytest.raises(errors.InputError, match=message):
    load(path=npz, split_file=path, split_prefix="s")


def test_an_unlabeled_folder_without_images_is_refused(tmp_path, npz):
  (tmp_path / "empty" / "deep").mkdir(parents=True)
  with pytest.raises(errors.InputError, match=r"empty' has no images; .*\.png"):
    load(path=npz, unlabeled=True, unlabeled_path=str(tmp_path / "empty"))


def test_corrupt_image_in_a_stream_is_named(tmp_path):
  root = save_folder(tmp_path)
  path = root / "test" / "dog" / "4.png"
  path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(errors.InputError, match=r"dog/4\.png cannot be read"):
    list(streamed(root).eval_batches("test"))


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
    load("tfds", name=name, path=str(tmp_path))
  assert "\n" not in str(caught.value)


def test_tfds_in_another_format_is_refused(tmp_path, tfds_dir):
  shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
  (info,) = tmp_path.rglob("dataset_info.json")
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(errors.InputError, match="is prepared as tfrecord"):
    load("tfds", name="tiny_pets", path=str(tmp_path))


def test_missing_package_is_named():
  with pytest.raises(errors.InputError, match="pip install some-package"):
    imports.require("no_such_module", needed_for="it", package="some-package")


@pytest.mark.parametrize("start", [-1, 6])
def test_start_beyond_the_epoch_is_refused(npz, start):
  with pytest.raises(errors.InputError, match=f"start is {start}, .* 5 steps"):
    load(path=npz).train_batches(0, start)


def test_unknown_eval_split_is_refused(npz):
  with pytest.raises(errors.InputError, match=r"'train' .*possible: val, test"):
    load(path=npz).eval_batches("train")
