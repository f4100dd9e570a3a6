"""RandAugment, colour jitter, erasing and mixing, beside Pillow and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest

from l2t_jax import errors
from l2t_jax.data import augmentation, rand_augment
from tests.support import data_sets

_ALL = {
  "rand_augment": 2,
  "color_jitter": 0.4,
  "random_erasing": 0.5,
  "mixup": 0.8,
  "cutmix": 1.0,
}
_COLORS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def _photograph(mode):
  """Return a smooth image, [24, 32, C]; Pillow's own resizing makes it."""
  noise = np.random.default_rng(0).integers(20, 230, (6, 8, 3), np.uint8)
  image = Image.fromarray(noise).resize((32, 24), Image.Resampling.BICUBIC)
  return image.convert(mode)


def _pixels(image):
  return np.atleast_3d(np.asarray(image)).astype(np.float32)


def _by_pillow(image, op, strength):
  warp = lambda *matrix: image.transform(
    image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
  )
  width, height = image.size
  enhance = lambda kind: kind(image).enhance(1 + 0.9 * strength)
  shear, shift = 0.3 * strength, 150 / 331 * strength
  return {
    "shear_x": lambda: warp(1, shear, 0, 0, 1, 0),
    "shear_y": lambda: warp(1, 0, 0, shear, 1, 0),
    "translate_x": lambda: warp(1, 0, shift * width, 0, 1, 0),
    "translate_y": lambda: warp(1, 0, 0, 0, 1, shift * height),
    "rotate": lambda: image.rotate(30 * strength, Image.Resampling.BILINEAR),
    "brightness": lambda: enhance(ImageEnhance.Brightness),
    "contrast": lambda: enhance(ImageEnhance.Contrast),
    "color": lambda: enhance(ImageEnhance.Color),
    "sharpness": lambda: enhance(ImageEnhance.Sharpness),
    "posterize": lambda: ImageOps.posterize(
      image, 8 - round(4 * abs(strength))
    ),
    "solarize": lambda: ImageOps.solarize(image, 255 * (1 - abs(strength))),
    "autocontrast": lambda: ImageOps.autocontrast(image),
    "equalize": lambda: ImageOps.equalize(image),
    "identity": lambda: image,
  }[op]()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_operations_are_those_of_pillow(mode):
  """Which cuts off fractions: several times where it blends with an image."""
  image, count = _photograph(mode), len(rand_augment.OPERATIONS)
  for strength in (0.3, -0.8):
    seen = rand_augment.rand_augment(
      jnp.stack([_pixels(image)] * count),
      jnp.arange(count)[None],
      jnp.full((1, count), strength),
    )
    for index, op in enumerate(rand_augment.OPERATIONS):
      expected = _pixels(_by_pillow(image, op, strength))
      np.testing.assert_allclose(seen[index], expected, atol=1.5, err_msg=op)


def test_an_image_of_one_color_survives_all_operations():
  count = len(rand_augment.OPERATIONS)
  for size in (4, 1):
    flat = jnp.full((count, size, size, 3), 100.0)
    seen = rand_augment.rand_augment(
      flat, jnp.arange(count)[None], jnp.zeros((1, count))
    )
    np.testing.assert_allclose(seen, flat, atol=1e-4)


def test_operations_are_drawn_evenly():
  ops, strengths = rand_augment.draw_operations(
    jax.random.key(0), 20_000, num_ops=2, magnitude=9
  )
  shares = np.bincount(np.ravel(ops)) / ops.size
  np.testing.assert_allclose(shares, 1 / len(rand_augment.OPERATIONS), rtol=0.1)
  np.testing.assert_allclose(np.unique(strengths), [-0.3, 0.3], rtol=1e-6)
  assert abs(np.mean(strengths)) < 0.01
  assert not np.array_equal(ops[0], ops[1])


def test_color_jitter_is_that_of_pillow():
  image = _photograph("RGB")
  kinds, factors = rand_augment.draw_jitter(jax.random.key(0), 6, strength=0.4)
  assert len(np.unique(kinds, axis=1).T) > 2
  np.testing.assert_array_equal(np.sort(kinds, axis=0)[:, 0], [0, 1, 2])
  seen = rand_augment.color_jitter(
    jnp.stack([_pixels(image)] * 6), kinds, factors
  )
  for index in range(6):
    expected = image
    for kind, factor in zip(kinds[:, index], factors[:, index], strict=True):
      expected = _COLORS[kind](expected).enhance(float(factor))
    np.testing.assert_allclose(seen[index], _pixels(expected), atol=4)
  _, factors = rand_augment.draw_jitter(jax.random.key(0), 5000, strength=0.4)
  assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4


def test_erased_rectangles_have_the_bounds_of_torchvision():
  boxes = np.asarray(
    augmentation.draw_erased(
      jax.random.key(0), 5000, (40, 60), probability=0.25
    )
  )
  sizes = boxes[:, 2:] - boxes[:, :2]
  erased = sizes.min(axis=1) > 0
  assert 0.23 < erased.mean() < 0.27
  assert (boxes[~erased, :2] == boxes[~erased, 2:]).all()
  boxes, (heights, widths) = boxes[erased], sizes[erased].T
  assert boxes.min() == 0
  assert (boxes[:, 2:].max(axis=0) == (40, 60)).all()
  shares, ratios = heights * widths / 2400, heights / widths
  assert 0.015 < shares.min() < 0.025 and 0.31 < shares.max() < 0.35
  assert 0.25 < ratios.min() < 0.35 and 2.8 < ratios.max() < 3.6


def _loaded(kind, tmp_path, **fields):
  if kind == "streamed":
    root = tmp_path / "images"
    if not root.exists():
      data_sets.save_folder(root)
    return data_sets.streamed(root, **fields)
  path = data_sets.save_npz(tmp_path / "x.npz", data_sets.random_arrays())
  return data_sets.load(path=path, **fields)


@pytest.mark.parametrize("kind", ["in memory", "streamed"])
def test_augmented_batches(kind, tmp_path):
  """The same ones each time, of the same images, in the range of pixels."""
  load = lambda **fields: _loaded(kind, tmp_path, **fields)
  plain, dataset = load(), load(**_ALL)
  for epoch, start in ((0, 0), (1, 1)):
    expected = next(plain.train_batches(epoch, start))
    seen = next(dataset.train_batches(epoch, start))
    again = next(load(**_ALL).train_batches(epoch, start))
    jax.tree.map(np.testing.assert_array_equal, seen, again)
    np.testing.assert_array_equal(seen.labels, expected.labels)
    pixels = np.asarray(seen.images) * data_sets.STD + data_sets.MEAN
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    assert not np.array_equal(seen.images, expected.images)
  other = next(dataset.with_seed(4).train_batches(1, 1))
  assert not np.array_equal(other.mixing.share, seen.mixing.share)
  for split in ("val", "test"):
    evaluated = (list(one.eval_batches(split)) for one in (plain, dataset))
    jax.tree.map(np.testing.assert_array_equal, *evaluated)


@pytest.mark.parametrize("kind", ["in memory", "streamed"])
def test_processes_share_the_draws(kind, tmp_path):
  load = lambda **of: _loaded(kind, tmp_path, **_ALL, **of)
  whole = next(load().train_batches(2))
  parts = [
    next(load(process_index=i, process_count=2).train_batches(2))
    for i in range(2)
  ]
  jax.tree.map(
    lambda x, *rows: np.testing.assert_allclose(
      x, np.concatenate(rows), rtol=1e-5, atol=1e-5
    ),
    whole,
    *parts,
  )


@pytest.mark.parametrize("kind", ["in memory", "streamed"])
def test_erased_pixels_have_the_mean_color(kind, tmp_path):
  load = lambda **fields: _loaded(kind, tmp_path, **fields)
  plain = next(load().train_batches(0)).images
  erased = next(load(random_erasing=1.0).train_batches(0)).images
  is_lost = np.asarray(erased != plain).any(axis=-1)
  assert is_lost.any(axis=(1, 2)).all() and not is_lost.all(axis=(1, 2)).any()
  np.testing.assert_array_equal(erased[is_lost], 0)


def test_images_without_labels_are_augmented_and_not_mixed(tmp_path):
  fields = {"unlabeled": True, "per_class": 8}
  load = lambda **more: next(
    _loaded("in memory", tmp_path, **fields, **more).train_batches(0)
  )
  plain, mixed, jittered = load(), load(mixup=0.8), load(color_jitter=0.4)
  np.testing.assert_array_equal(mixed.unlabeled, plain.unlabeled)
  assert not np.array_equal(jittered.unlabeled, plain.unlabeled)


@pytest.mark.parametrize("field", ["rand_augment", "color_jitter"])
def test_only_images_of_8_bits_change_their_colors(field, tmp_path):
  arrays = data_sets.random_arrays()
  for name in ("x_train", "x_test"):
    arrays[name] = arrays[name].astype(np.uint16)
  path = data_sets.save_npz(tmp_path / "x.npz", arrays)
  message = f"{field} is 1 and needs uint8 images .* are uint16 with 3; set it"
  with pytest.raises(errors.InputError, match=message):
    data_sets.load(path=path, **{field: 1})
  batch = next(data_sets.load(path=path, mixup=1.0).train_batches(0))
  assert batch.mixing is not None
