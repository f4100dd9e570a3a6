"""Classifying image files with what a run left."""

import csv
import dataclasses
import io

import numpy as np
import PIL.Image
import pytest
from sklearn import datasets

from l2t_jax import errors, predict
from l2t_jax.run import predictor as predictors
from tests.support import small_runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Digits as files in subfolders named by their classes."""
  folder = tmp_path_factory.mktemp("pictures")
  images, labels = datasets.load_digits(return_X_y=True)
  for i, (image, label) in enumerate(zip(images[:70], labels, strict=False)):
    path = folder / str(label) / f"{i:03}.png"
    path.parent.mkdir(exist_ok=True)
    pixels = np.rint(image.reshape(8, 8) * (255 / 16)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path)
  return folder


@pytest.mark.xdist_group("experiment")
def test_folders_of_images(pictures, source):
  result = small_runs.run_python(
    "-m", "l2t_jax.predict", source.parent, pictures / "0", pictures
  )
  assert result.returncode == 0, result.stderr
  rows = list(csv.DictReader(io.StringIO(result.stdout)))
  assert len(rows) == 70 + len(list((pictures / "0").iterdir()))
  right = [row["class"] == row["image"].split("/")[-2] for row in rows]
  assert np.mean(right) > 0.2  # Chance is 0.1.
  assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
  assert rows[0]["image"] == str(sorted((pictures / "0").iterdir())[0])


def _save(path, mode):
  PIL.Image.new(mode, (9, 7)).save(path)
  return path


@pytest.mark.xdist_group("experiment")
def test_images_that_cannot_be(source, tmp_path):
  predictor = predictors.load(source)
  assert predictor.read(_save(tmp_path / "rgb.png", "RGB")).shape == (
    *predictor.image_format.shape[:2],
    1,
  )
  for mode in ("RGBA", "LA", "P", "L", "I;16"):  # Opaque, or deep.
    image = PIL.Image.new("L" if mode == "LA" else mode, (9, 7), 250)
    if mode in ("RGBA", "LA"):
      image = PIL.Image.new(mode, (9, 7), (9,) * (len(mode) - 1) + (255,))
    image.save(tmp_path / "opaque.png")
    assert predictor.read(tmp_path / "opaque.png").dtype == np.uint8
  deep = np.full((9, 7), 40_000, np.uint16)
  PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
  assert set(predictor.read(tmp_path / "deep.png").flat) == {40_000 // 256}
  with pytest.warns(UserWarning, match="transparency is dropped, as in train"):
    predictor.read(_save(tmp_path / "transparent.png", "RGBA"))
  regression = dataclasses.replace(predictor, task="examples.tasks:ANGLE")
  (tmp_path / "broken.png").write_bytes(b"no image")
  (tmp_path / "empty").mkdir()
  for make, message in (
    (lambda: predictor.read(tmp_path / "broken.png"), "cannot be read"),
    (lambda: predict.find_images([tmp_path / "none"]), "no image or folder"),
    (lambda: predict.find_images([tmp_path / "empty"]), "has no images"),
    (lambda: next(regression.classify([])), "ANGLE', not classes"),
    (lambda: predictors.load(tmp_path), "there is no target.safetensors"),
  ):
    with pytest.raises(errors.InputError, match=message):
      make()


@pytest.mark.xdist_group("experiment")
def test_one_damaged_image_leaves_the_others(source, pictures, tmp_path):
  predictor = predictors.load(str(source))
  good = sorted((pictures / "0").iterdir())[:2]
  bad = tmp_path / "broken.png"
  bad.write_bytes(b"no image")
  rows = predictor.classify([str(good[0]), bad, good[1]])
  assert [next(rows)[0] for _ in range(2)] == good
  with pytest.raises(errors.InputError, match="1 of the images cannot be read"):
    next(rows)
  with pytest.raises(errors.InputError, match="must be a list of image files"):
    next(predictor.classify(str(pictures)))
  assert repr(predictor) == "Predictor: 10 classes, uint8 images [16, 16, 1]"


@pytest.mark.xdist_group("experiment")
@pytest.mark.parametrize(
  ("dtype", "shape"),
  [
    (np.float32, (2, 8, 8, 1)),
    (np.uint8, (2, 9, 9, 1)),
    (np.uint8, (2, 8, 8, 3)),
    (np.uint8, (8, 8, 1)),
  ],
)
def test_arrays_unlike_those_in_training(source, dtype, shape):
  predictor = predictors.load(source)
  size = predictor.image_format.size
  shape = tuple(size if side == 8 else side for side in shape)
  with pytest.raises(errors.InputError, match="but must be uint8"):
    predictor.outputs(np.zeros(shape, dtype))
