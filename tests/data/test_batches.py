"""Augmentation, and the batches of images in memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from l2t_jax import errors
from l2t_jax.data import augmentation, pillow
from tests.support import data_sets


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
  pixels = data_sets.random_arrays(num_train=7)["x_train"]
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
  pixels = data_sets.random_arrays()["x_train"]
  expected = (pixels / 255 - np.array(data_sets.MEAN)) / np.array(data_sets.STD)
  np.testing.assert_allclose(
    augmentation.normalise(pixels, data_sets.MEAN, data_sets.STD, white=255),
    expected,
    rtol=1e-5,
    atol=1e-6,
  )


def test_the_border_of_a_crop_is_black(tmp_path):
  arrays = data_sets.random_arrays()
  arrays["x_train"][:] = 255
  dataset = data_sets.load(
    path=data_sets.save_npz(tmp_path / "white.npz", arrays), augment="crop"
  )
  values = np.unique(data_sets.pixels_of(next(dataset.train_batches(0)).images))
  np.testing.assert_array_equal(values, [0, 255])


def test_crop_does_not_flip(tmp_path):
  arrays = data_sets.random_arrays()
  # Brightness rises from left to right: a mirrored image would show.
  arrays["x_train"][:] = np.linspace(10, 250, 8)[:, None]
  path = data_sets.save_npz(tmp_path / "ramp.npz", arrays)

  def any_falls(name):
    crops = data_sets.pixels_of(
      next(data_sets.load(path=path, augment=name).train_batches(0))[0]
    )
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
  dataset = data_sets.load(
    path=npz, augment="none", batch_size=9, val_fraction=0
  )
  assert (dataset.num_train, dataset.steps_per_epoch) == (60, 6)
  epoch = data_sets.concatenated(dataset.train_batches(0))
  arrays = np.load(npz)
  lookup = {
    image.tobytes(): (index, label)
    for index, (image, label) in enumerate(
      zip(arrays["x_train"], arrays["y_train"], strict=True)
    )
  }
  found = [
    lookup[image.tobytes()] for image in data_sets.pixels_of(epoch.images)
  ]
  indices, labels = zip(*found, strict=True)
  assert len(set(indices)) == 54
  assert list(indices) != sorted(indices)
  np.testing.assert_array_equal(epoch.labels, labels)


def test_the_order_of_an_epoch_stays_what_it_was(npz):
  dataset = data_sets.load(path=npz, val_fraction=0)
  # Runs that were begun with another version go on as they would have.
  order = np.random.default_rng([3, 1]).permutation(60)
  labels = data_sets.concatenated(dataset.train_batches(1)).labels
  np.testing.assert_array_equal(labels, np.load(npz)["y_train"][order[:56]])


def test_epochs_and_seeds_have_their_own_order(npz):
  dataset = data_sets.load(path=npz, augment="none")
  first = data_sets.concatenated(dataset.train_batches(0))
  chex.assert_trees_all_equal(
    first, data_sets.concatenated(dataset.train_batches(0))
  )
  second = data_sets.concatenated(dataset.train_batches(1))
  assert not np.array_equal(first.images, second.images)
  other = data_sets.concatenated(
    data_sets.load(path=npz, augment="none", seed=4).train_batches(0)
  )
  assert not np.array_equal(first.images, other.images)


@pytest.mark.parametrize(
  ("batch_size", "num_test", "eval_batch_size"),
  [(8, 150, 152), (8, 600, 512), (18, 600, 522), (130, 1, 130)],
)
def test_eval_batches_are_large(
  tmp_path, batch_size, num_test, eval_batch_size
):
  arrays = data_sets.random_arrays(num_train=200, num_test=num_test)
  path = data_sets.save_npz(tmp_path / "large.npz", arrays)
  dataset = data_sets.load(path=path, batch_size=batch_size)
  for batch in dataset.eval_batches("test"):
    chex.assert_shape(batch.mask, (eval_batch_size,))
  data_sets.check_eval(dataset, "test", arrays["x_test"])


@pytest.mark.parametrize(
  ("image_size", "eval_batch_size"), [(40, 328), (96, 128)]
)
def test_eval_batches_of_large_images_are_smaller(
  tmp_path, image_size, eval_batch_size
):
  arrays = data_sets.random_arrays(num_train=200, num_test=600)
  path = data_sets.save_npz(tmp_path / "large.npz", arrays)
  dataset = data_sets.load(path=path, image_size=image_size)
  batch = next(dataset.eval_batches("test"))
  chex.assert_shape(batch.images, (eval_batch_size, image_size, image_size, 3))


def test_eval_may_be_empty_for_val(npz):
  dataset = data_sets.load(path=npz, val_fraction=0)
  assert dataset.num_val == 0
  assert not list(dataset.eval_batches("val"))


def test_a_batch_is_compiled_once(npz):
  dataset = data_sets.load(path=npz, per_class=10, unlabeled=True)
  list(dataset.train_batches(0))
  with jax.no_tracing():
    list(dataset.train_batches(1))
    list(dataset.with_seed(5).train_batches(0))


def test_seeds_share_the_images_in_memory(npz):
  dataset = data_sets.load(path=npz, per_class=10, unlabeled=True)
  num_arrays = len(jax.live_arrays())
  other = dataset.with_seed(5)
  assert len(jax.live_arrays()) == num_arrays
  assert other.split_hash == dataset.split_hash


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"classes": (1, 1)}, r"\(1, 1\) has duplicates"),
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
    ({"per_class": -1}, "per_class is -1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"process_count": 3}, "batch_size is 8, .* multiple .* 3"),
    ({"val_fraction": -0.1}, "val_fraction -0.1"),
    ({"val_fraction": 0.01}, "no validation images: val_fraction=0.01"),
    ({"std": (-0.5,)}, r"std is \(-0.5,\), but must be finite and above 0"),
    ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\), but must have 1 or .*=3"),
    ({"unlabeled": True}, "per_class=0 keeps all images"),
    ({"unlabeled": True, "per_class": 15}, "per_class=15 keeps all images"),
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
    data_sets.load(values.pop("source"), **values)
  assert "\n" not in str(caught.value)
