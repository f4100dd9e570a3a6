"""Validation images in training batches, for the outer loss."""

import chex
import numpy as np
import pytest

from tests.support import data_sets


def outer_images(dataset, num_epochs=1):
  """Return the bytes of the images, in their order, and their labels."""
  batches = [
    batch.outer
    for epoch in range(num_epochs)
    for batch in dataset.train_batches(epoch)
  ]
  outer = data_sets.concatenated(batches)
  pixels = data_sets.pixels_of(outer.images)
  return [image.tobytes() for image in pixels], outer.labels


@pytest.mark.parametrize("batch_size", [4, 6])
def test_every_pass_holds_the_validation_images(load_few, batch_size):
  """Each of them once, with its label and without augmentation."""
  dataset = load_few(has_outer=True, batch_size=batch_size)
  val = data_sets.concatenated(dataset.eval_batches("val"))
  is_image = val.mask == 1
  expected = {
    image.tobytes(): label
    for image, label in zip(
      data_sets.pixels_of(val.images[is_image]),
      val.labels[is_image],
      strict=True,
    )
  }
  assert len(expected) == 20
  stream, labels = outer_images(dataset, num_epochs=10)
  assert [expected[image] for image in stream] == list(labels)
  passes = [stream[i : i + 20] for i in range(0, len(stream) - 19, 20)]
  assert len(passes) > 1
  for images_of_pass in passes:
    assert set(images_of_pass) == set(expected)
  assert passes[0] != passes[1]
  assert outer_images(dataset.with_seed(9), num_epochs=10)[0] != stream


def test_the_rest_of_a_batch_does_not_depend_on_them(load_few):
  whole = list(load_few(has_outer=True).train_batches(1))
  for batch, plain in zip(whole, load_few().train_batches(1), strict=True):
    assert plain.outer is None
    chex.assert_trees_all_equal(batch._replace(outer=None), plain)
  rest = list(load_few(has_outer=True).train_batches(1, start=2))
  chex.assert_trees_all_equal(whole[2:], rest)


def test_processes_share_them(load_few):
  whole = load_few(has_outer=True)
  shares = [
    load_few(has_outer=True, process_index=index, process_count=2)
    for index in (0, 1)
  ]
  parts = zip(*(one.train_batches(0) for one in shares), strict=True)
  for part, batch in zip(parts, whole.train_batches(0), strict=True):
    together = data_sets.concatenated(one.outer for one in part)
    np.testing.assert_array_equal(together.images, batch.outer.images)
    np.testing.assert_array_equal(together.labels, batch.outer.labels)
