"""Images without labels beside the labelled ones, in memory and streamed."""

import shutil

import chex
import jax
import numpy as np
from PIL import Image
import pytest

from l2t_jax import errors
from tests.support import data_sets


def test_no_image_has_two_roles(load_few):
  dataset = load_few(augment="none")
  labelled = data_sets.concatenated(dataset.train_batches(0)).images
  val, test = (
    data_sets.concatenated(dataset.eval_batches(split))
    for split in ("val", "test")
  )
  roles = [
    {image.tobytes() for image in data_sets.pixels_of(part)}
    for part in (
      labelled,
      val.images[val.mask == 1],
      test.images[test.mask == 1],
    )
  ] + [set(data_sets.unlabeled_images(dataset))]
  assert [len(role) for role in roles] == [16, 20, 20, 24]
  assert dataset.num_unlabeled == 24
  assert len(set.union(*roles)) == 80


def test_test_images_are_not_among_the_unlabelled(tmp_path):
  root = data_sets.save_folder(tmp_path, ("train", "val"))
  shutil.copytree(root / "train", root / "test")
  load = lambda **fields: data_sets.load(
    "folder", path=str(root), batch_size=2, per_class=2, **fields
  )
  (note,) = (note for note in load().notes if "pixels" in note)
  assert note.startswith("4 test images")
  with pytest.raises(errors.InputError, match="20 of 20 images of test"):
    load(unlabeled=True)


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
  stream = data_sets.unlabeled_images(dataset, num_epochs=3)
  assert len(stream) == 12 * batch_size
  passes = [stream[i : i + 24] for i in range(0, len(stream) - 23, 24)]
  for images_of_pass in passes:
    assert len(set(images_of_pass)) == 24
    assert set(images_of_pass) == set(passes[0])
  assert len({tuple(images_of_pass) for images_of_pass in passes}) > 1
  assert (
    data_sets.unlabeled_images(dataset.with_seed(9), num_epochs=3) != stream
  )


def test_start_resumes_within_an_epoch(load_few):
  dataset = load_few()
  whole = list(dataset.train_batches(2))
  rest = list(load_few().train_batches(2, start=1))
  chex.assert_trees_all_equal(whole[1:], rest)
  assert not list(dataset.train_batches(2, start=dataset.steps_per_epoch))
  assert not np.array_equal(whole[0].unlabeled, whole[1].unlabeled)


def test_processes_together_equal_one(load_few, small_eval_batches):
  shares = [load_few(process_index=index, process_count=2) for index in (0, 1)]
  for read in (
    lambda dataset: dataset.train_batches(1),
    lambda dataset: dataset.eval_batches("test"),
  ):
    parts = zip(*map(read, shares), strict=True)
    for part, batch in zip(parts, read(load_few()), strict=True):
      chex.assert_trees_all_equal(
        data_sets.concatenated(part), jax.tree.map(np.asarray, batch)
      )


def test_each_role_step_epoch_and_seed_has_its_own_crops(load_few, tmp_path):
  paths = sorted(tmp_path.glob("*/*.png"))
  for path in paths[1:]:
    path.write_bytes(paths[0].read_bytes())
  dataset = load_few(unlabeled_batch_size=0)
  first, second, *_ = dataset.train_batches(0)
  chex.assert_equal_shape([first.images, first.unlabeled])
  # The images are all the same: so would be their crops.
  assert not np.array_equal(first.images, first.unlabeled)
  for other in (
    second,
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
  assert set(data_sets.unlabeled_images(dataset)) == expected
  (folder / "one.png").unlink()
  found = {load_folder().fingerprint, dataset.fingerprint}
  found.add(load_few(unlabeled=False, per_class=0).fingerprint)
  assert len(found) == 3


def test_an_unlabeled_folder_without_images_is_refused(tmp_path, npz):
  (tmp_path / "empty" / "deep").mkdir(parents=True)
  with pytest.raises(errors.InputError, match=r"empty' has no images; .*\.png"):
    data_sets.load(
      path=npz, unlabeled=True, unlabeled_path=str(tmp_path / "empty")
    )


def test_the_split_hash_is_that_of_the_labelled_images(load_few):
  """Methods that do not read the others are compared with those that do."""
  with_others, without = load_few(), load_few(unlabeled=False)
  assert with_others.num_unlabeled > without.num_unlabeled == 0
  assert with_others.split_hash == without.split_hash
  assert with_others.split_hash != load_few(per_class=3).split_hash


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
