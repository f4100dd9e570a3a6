"""Batches of images that are read when they are needed."""

import multiprocessing
import pathlib
import subprocess
import time

import chex
import numpy as np
from PIL import Image
import pytest

from l2t_jax import errors
from l2t_jax.data import pillow
from tests.support import data_sets, small_runs


def test_stream_is_deterministic_and_resumes(tmp_path):
  root = data_sets.save_folder(tmp_path)
  dataset = data_sets.streamed(root)
  whole = list(dataset.train_batches(1))
  assert len(whole) == dataset.steps_per_epoch == 4
  rest = list(data_sets.streamed(root).train_batches(1, start=2))
  chex.assert_trees_all_equal(whole[2:], rest)
  # After an epoch out of turn and one left in the middle, too.
  list(dataset.train_batches(3))
  chex.assert_trees_all_equal(whole, list(dataset.train_batches(1)))
  next(dataset.train_batches(2))
  chex.assert_trees_all_equal(whole, list(dataset.train_batches(1)))
  other = data_sets.concatenated(dataset.train_batches(2))
  assert not np.array_equal(data_sets.concatenated(whole).images, other.images)


def test_streamed_eval_sees_every_image_once(tmp_path, small_eval_batches):
  root = data_sets.save_folder(tmp_path)
  expected = [
    pillow.resize_and_center_crop(Image.open(path), resized=10, size=8)
    for path in root.glob("test/*/*.png")
  ]
  dataset = data_sets.streamed(root, batch_size=8)
  assert len(list(dataset.eval_batches("test"))) == 3
  data_sets.check_eval(
    dataset, "test", np.stack([np.asarray(i) for i in expected])
  )


def test_streamed_training_without_augmentation(tmp_path):
  root = data_sets.save_folder(tmp_path)
  dataset = data_sets.streamed(
    root, augment="none", val_fraction=0, batch_size=20
  )
  (batch,) = dataset.train_batches(0)
  expected = [
    pillow.resize_and_center_crop(Image.open(path), resized=10, size=8)
    for path in root.glob("train/*/*.png")
  ]
  np.testing.assert_array_equal(
    data_sets.sorted_rows(data_sets.pixels_of(batch.images)),
    data_sets.sorted_rows(np.stack([np.asarray(image) for image in expected])),
  )


def test_evaluation_sees_most_of_an_image(tmp_path):
  root = data_sets.save_folder(tmp_path)
  dataset = data_sets.streamed(root, image_size=14, eval_resize=0)
  path = root / "test" / "cat" / "0.png"
  expected = pillow.resize_and_center_crop(
    Image.open(path), resized=16, size=14
  )
  batch = next(dataset.eval_batches("test"))
  np.testing.assert_array_equal(data_sets.pixels_of(batch.images[0]), expected)


def test_corrupt_image_in_a_stream_is_named(tmp_path):
  root = data_sets.save_folder(tmp_path)
  path = root / "test" / "dog" / "4.png"
  path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(errors.InputError, match=r"dog/4\.png cannot be read"):
    list(data_sets.streamed(root).eval_batches("test"))


def test_workers_do_not_change_the_stream(tmp_path):
  root = data_sets.save_folder(tmp_path)
  threads, workers = (
    data_sets.streamed(
      root, num_workers=num, per_class=6, unlabeled=True, has_outer=True
    )
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
    "path": data_sets.save_npz(tmp_path / "set.npz", data_sets.random_arrays()),
    "augment": "random_resized_crop_flip",
    "in_memory": False,
    "num_workers": 2,
  }
  before = multiprocessing.active_children()
  batches = data_sets.load(**values).train_batches(0)
  next(batches)
  assert multiprocessing.active_children() == before


def test_a_dead_worker_is_reported(tmp_path):
  dataset = data_sets.streamed(data_sets.save_folder(tmp_path), num_workers=1)
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
  root = data_sets.save_folder(tmp_path)
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
  process.wait(small_runs.PATIENCE)
  assert len(workers) == 2
  deadline = time.time() + 30
  while any(map(_runs, workers)):
    assert time.time() < deadline
    time.sleep(0.1)


_READ_AND_WAIT = """
import multiprocessing, sys
from tests.support import data_sets
if __name__ == "__main__":
  batches = data_sets.streamed(sys.argv[1], num_workers=2).train_batches(0)
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
