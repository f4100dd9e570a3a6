"""Arrays of other types and with other channels than those of image files."""

import jax
import numpy as np
from PIL import Image
import pytest

from l2t_jax import errors
from l2t_jax.data import data_fields, from_arrays, pillow
from tests.support import data_sets

# What the pixels are drawn from, and what becomes 1.
_KINDS = {
  "uint8": ((0, 256), 255),
  "uint16": ((0, 10_000), 2**14 - 1),
  "float32": ((-1000, 3000), 1),
}


def _arrays(dtype, channels, size=8):
  rng, ((low, high), _) = np.random.default_rng(0), _KINDS[dtype]
  draw = lambda num: rng.uniform(low, high, (num, size, size, channels)).astype(
    dtype
  )
  return {
    "x_train": draw(60),
    "y_train": np.arange(60) % 3,
    "x_test": draw(20),
    "y_test": np.arange(20) % 3,
  }


def _load(arrays, **fields):
  return data_sets.load(
    images=from_arrays.image_set(arrays, "arrays"),
    mean=(),
    std=(),
    channels=arrays["x_train"].shape[-1],
    **{"augment": "none", "val_fraction": 0, **fields},
  )


@pytest.mark.parametrize("channels", [1, 2, 13])
@pytest.mark.parametrize("dtype", _KINDS)
def test_arrays_are_normalised_by_their_own_statistics(dtype, channels):
  arrays = _arrays(dtype, channels)
  dataset = _load(arrays, batch_size=60)
  (batch,) = dataset.train_batches(0)
  np.testing.assert_allclose(
    np.mean(batch.images, axis=(0, 1, 2)), np.zeros(channels), atol=1e-5
  )
  np.testing.assert_allclose(
    np.std(batch.images, axis=(0, 1, 2)), np.ones(channels), rtol=1e-5
  )
  white = _KINDS[dtype][1]
  test = data_sets.concatenated(dataset.eval_batches("test"))
  np.testing.assert_allclose(
    (np.array(test.images[:20]) * dataset.std + dataset.mean) * white,
    arrays["x_test"],
    rtol=1e-5,
    atol=1e-2,
  )


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("dtype", _KINDS)
def test_channels_are_resized_like_grey_images(dtype, in_memory):
  arrays = _arrays(dtype, 5, size=20)
  dataset = _load(arrays, in_memory=in_memory, eval_resize=10)
  test = data_sets.concatenated(dataset.eval_batches("test"))
  resize = data_fields.make_eval_resize(8, 10, in_memory)
  expected = np.stack(
    [
      [
        np.asarray(resize(Image.fromarray(x[..., c].astype(np.float32))))
        for c in range(5)
      ]
      for x in arrays["x_test"]
    ]
  )
  white = _KINDS[dtype][1]
  seen = (np.array(test.images[:20]) * dataset.std + dataset.mean) * white
  np.testing.assert_allclose(
    np.moveaxis(seen, -1, 1),
    expected,
    # Whole numbers are rounded.
    atol=0.05 if dtype == "float32" else 1.01,
  )


def test_channels_are_cropped_and_mirrored_together():
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
  for seed in range(8):
    crop = lambda image, seed=seed: pillow.random_resized_crop_flip(
      image, np.random.default_rng(seed), size=8
    )
    np.testing.assert_array_equal(
      pillow.transform_channels(pixels, crop),
      np.asarray(crop(Image.fromarray(pixels))),
    )


def test_streamed_crops_of_channels():
  dataset = _load(
    _arrays("uint16", 4, size=20),
    in_memory=False,
    augment="random_resized_crop_flip",
  )
  first, again = (
    data_sets.concatenated(dataset.train_batches(0)) for _ in range(2)
  )
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert first.images.shape == (56, 8, 8, 4)
  assert np.abs(first.images.mean()) < 0.2


def test_the_training_images_say_what_white_is():
  arrays = _arrays("uint16", 3)
  arrays["x_test"][0, 0, 0, 0] = 60_000
  dataset = _load(arrays)
  assert dataset.bit_depth == 14
  (note,) = (note for note in dataset.notes if "white" in note)
  assert note.endswith(f"largest training value is {arrays['x_train'].max()}")
  test = data_sets.concatenated(dataset.eval_batches("test"))
  value = test.images[0, 0, 0, 0] * dataset.std[0] + dataset.mean[0]
  assert value == pytest.approx(60_000 / (2**14 - 1), rel=1e-5)


@pytest.mark.parametrize(
  ("scale", "mean", "std"),
  [(255, (0.5,), (0.25,)), (1, (123.7,), (58.0,)), (9e4, (0.1,), (0.3,))],
)
def test_mean_and_std_of_another_scale_are_refused(scale, mean, std):
  arrays = _arrays("float32", 1)
  for key in ("x_train", "x_test"):
    arrays[key] = np.abs(arrays[key]) / np.float32(3000 / scale)
  images = from_arrays.image_set(arrays, "arrays")
  with pytest.raises(
    errors.InputError, match="are not for images whose values"
  ):
    data_sets.load(images=images, channels=1, mean=mean, std=std)


def test_what_varies_little_around_a_large_mean():
  arrays, rng = _arrays("float32", 1), np.random.default_rng(0)
  shape = arrays["x_train"].shape
  arrays["x_train"] = (101_325 + rng.normal(size=shape)).astype(np.float32)
  (batch,) = _load(arrays, batch_size=60).train_batches(0)
  assert abs(float(batch.images.mean())) < 0.01
  for scale in (3e37, 1e-39):  # The sum is infinite, and the std subnormal.
    arrays["x_train"] = (scale * rng.random(shape)).astype(np.float32)
    (batch,) = _load(arrays, batch_size=60).train_batches(0)
    assert np.isfinite(batch.images).all()


def test_a_channel_without_contrast():
  arrays = _arrays("float32", 2)
  arrays["x_train"][..., 1] = 0.1
  (batch,) = _load(arrays, batch_size=60).train_batches(0)
  np.testing.assert_allclose(batch.images[..., 1], 0, atol=1e-5)


def test_statistics_are_those_after_conversion():
  arrays = _arrays("uint8", 3, size=20)
  for in_memory in (True, False):
    dataset = data_sets.load(
      images=from_arrays.image_set(arrays, "arrays"),
      channels=1,
      mean=(),
      std=(),
      augment="none",
      in_memory=in_memory,
      val_fraction=0,
      batch_size=60,
    )
    (batch,) = dataset.train_batches(0)
    assert len(dataset.mean) == len(dataset.std) == 1
    assert np.mean(batch.images) == pytest.approx(0, abs=0.05)


def test_bytes_in_the_other_order():
  arrays = _arrays("uint16", 2)
  swapped = {k: x.astype(x.dtype.newbyteorder()) for k, x in arrays.items()}
  one, other = (
    data_sets.concatenated(_load(each).eval_batches("test"))
    for each in (arrays, swapped)
  )
  np.testing.assert_array_equal(one.images, other.images)


@pytest.mark.parametrize(
  ("dtype", "channels", "fields", "message"),
  [
    ("uint16", 13, {"channels": 3}, "uint16 with 13 channels"),
    ("float32", 3, {"channels": 1}, "float32 with 3 channels"),
    ("uint8", 3, {"channels": 4}, "images are grey or RGB; set it to 1 or 3"),
    (
      "uint8",
      4,
      {"channels": 4, "unlabeled": True, "unlabeled_path": "pictures"},
      "no files in unlabeled_path 'pictures' hold",
    ),
  ],
)
def test_channels_that_cannot_be(tmp_path, dtype, channels, fields, message):
  path = data_sets.save_npz(tmp_path / "0.npz", _arrays(dtype, channels))
  with pytest.raises(errors.InputError, match=message):
    data_sets.load(path=path, mean=(), std=(), **fields)


def test_streamed_files_have_no_statistics_of_their_own(tmp_path):
  root = data_sets.save_folder(tmp_path)
  with pytest.raises(errors.InputError, match="give numbers, such as those of"):
    data_sets.streamed(root, mean=())
  dataset = data_sets.load(
    "folder", path=str(root), mean=(), std=(), augment="none"
  )
  images = data_sets.concatenated(dataset.train_batches(0)).images
  assert abs(images.mean()) < 0.1
