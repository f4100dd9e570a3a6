"""Small data sets, how tests load them, and what their batches hold."""

import jax
import numpy as np
from PIL import Image

from l2t_jax import data
from l2t_jax.data import records

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
_OPTIONS = (
  *("batch_size", "seed", "process_index", "process_count", "images"),
  "has_outer",
)


def load(source="npz", **changes):
  """Load a data set, with defaults that suit small images."""
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
  """Open a data set without cutting it into batches."""
  return data.open_images(
    data.DataFields(
      source=source, **fields, image_size=8, channels=1, mean=(0,), std=(1,)
    )
  )


def random_arrays(num_train=60, num_test=21, num_classes=3, size=8):
  """Return the arrays of an npz data set; all images differ."""
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
  """Write an npz file and return its path as a string."""
  np.savez(path, **arrays)
  return str(path)


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


def array_source(labels, *, test_labels=None, num_official_val=0):
  """Return a data set whose images are never read."""

  def wrap(values):
    return records.Records(np.asarray(values, np.int32))

  return records.ImageSet(
    wrap(labels),
    num_official_val,
    None if test_labels is None else wrap(test_labels),
    tuple("abcdefghij"[: 1 + max(labels)]),
  )


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


def unlabeled_images(dataset, num_epochs=1):
  """Return the bytes of the images without labels, in their order."""
  batches = [
    batch
    for epoch in range(num_epochs)
    for batch in dataset.train_batches(epoch)
  ]
  pixels = pixels_of(concatenated(batches).unlabeled)
  return [image.tobytes() for image in pixels]
