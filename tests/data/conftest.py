"""Data sets that several test files read."""

import pytest

from l2t_jax.data import datasets
from tests.support import data_sets


@pytest.fixture
def small_eval_batches(monkeypatch):
  """Let evaluation batches be as small as those of training."""
  monkeypatch.setattr(datasets, "EVAL_BATCH_SIZES", (1, 1))


@pytest.fixture
def npz(tmp_path):
  """Path of a data set with 60 training and 21 test images."""
  return data_sets.save_npz(tmp_path / "set.npz", data_sets.random_arrays())


@pytest.fixture(params=["in memory", "streaming"])
def load_few(request, tmp_path):
  """Loader of a folder: 16 labelled training images and 24 left over.

  40 more images are for val and test. All of them have the size of the batch:
  without augmentation, they come out as they are.
  """
  root = data_sets.save_folder(tmp_path, ("",), num_images=40, size=(8, 8))
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
  return lambda **changes: data_sets.load("folder", **(defaults | changes))
