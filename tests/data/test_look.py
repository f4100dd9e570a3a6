"""The look before training: what is planted appears, and nothing else."""

import json
import os
import shutil

import numpy as np
from PIL import Image
import pytest

from l2t_jax.data import look
from tests.support import data_sets, small_runs


def _clean(tmp_path):
  return data_sets.save_folder(
    tmp_path / "pictures", ("Train", "valid", "test"), num_images=6
  )


def _look(root):
  return look.look(data_sets.open_images("folder", path=str(root)))


def test_a_sound_folder(tmp_path):
  found = _look(_clean(tmp_path))
  part = {
    "images": 12,
    "classes": {"cat": 6, "dog": 6},
    "sizes": {"20x16": 12},
    "modes": {"RGB": 12},
    "formats": {"PNG": 12},
  }
  assert found == {
    "classes": ["cat", "dog"],
    # The files of the parts begin alike, but their names are not compared.
    "parts": {"train": part, "val": part, "test": part},
    "bit_depth": 0,
    "unreadable": [],
    "equal": [],
    "passed_over": {},
    "notes": [],
  }


def test_unreadable_files(tmp_path):
  root = _clean(tmp_path)
  cut = root / "valid" / "cat" / "3.png"
  cut.write_bytes(cut.read_bytes()[:-60])
  floats = root / "Train" / "dog" / "height map.tif"
  Image.new("F", (8, 8)).save(floats)
  text = root / "test" / "dog" / "0.png"
  text.write_text("<html>not found</html>")
  found = _look(root)
  named = {(one["part"], one["file"]) for one in found["unreadable"]}
  assert named == {
    ("train", str(floats)),
    ("val", str(cut)),
    ("test", str(text)),
  }
  assert found["equal"] == []
  assert found["parts"]["train"]["images"] == 13


def test_equal_pixels_whatever_their_names_and_formats(tmp_path):
  root = _clean(tmp_path)
  one, other = (
    root / "Train" / "cat" / "0.png",
    root / "Train" / "dog" / "1.png",
  )
  Image.open(one).save(root / "test" / "cat" / "renamed.bmp")
  Image.open(other).save(root / "Train" / "cat" / "wrong.webp", lossless=True)
  # Equal images of one class in one part are no fault of the split.
  shutil.copy(one, root / "Train" / "cat" / "again.png")
  # One pixel differs, which the sampled ones do not show.
  nearly = np.array(Image.open(root / "Train" / "dog" / "2.png"))
  nearly[1, 2] ^= 255
  Image.fromarray(nearly).save(root / "test" / "dog" / "nearly.png")
  found = _look(root)
  files = [
    sorted((entry["part"], os.path.basename(entry["file"])) for entry in group)
    for group in found["equal"]
  ]
  assert sorted(files) == [
    [("test", "renamed.bmp"), ("train", "0.png"), ("train", "again.png")],
    [("train", "1.png"), ("train", "wrong.webp")],
  ]
  assert found["unreadable"] == []


def test_many_images_that_look_blank(tmp_path):
  root = _clean(tmp_path)
  for part in ("Train", "test"):
    for index in range(40):
      pixels = np.full((50, 50), 255, np.uint8)
      pixels[1, index] = 0
      if part == "test" and index:
        pixels[2, 0] = 0
      Image.fromarray(pixels).save(root / part / "cat" / f"blank {index}.png")
  (group,) = _look(root)["equal"]
  assert [os.path.basename(one["file"]) for one in group] == ["blank 0.png"] * 2
  images = data_sets.load(
    "folder", path=str(root), channels=1, mean=(0,), std=(1,)
  )
  assert any(note.startswith("1 test images have the") for note in images.notes)


def test_depths_modes_and_other_files(tmp_path):
  root = _clean(tmp_path)
  deep = np.full((8, 8), 1000, np.uint16)
  Image.fromarray(deep).save(root / "Train" / "cat" / "deep.png")
  Image.fromarray(deep * 60).save(root / "test" / "cat" / "deep.png")
  Image.new("CMYK", (8, 8)).save(root / "Train" / "cat" / "print.jpg")
  for name in ("a.csv", "b.csv", "LICENSE"):
    (root / "Train" / "cat" / name).write_text("")
  found = _look(root)
  assert found["bit_depth"] == 10  # Of the training images.
  assert found["parts"]["train"]["modes"]["CMYK"] == 1
  assert found["passed_over"] == {".csv": 2, "no suffix": 1}
  assert (found["unreadable"], found["equal"]) == ([], [])


def test_arrays(tmp_path):
  arrays = data_sets.random_arrays()
  arrays["x_test"][0] = arrays["x_train"][4]
  path = data_sets.save_npz(tmp_path / "data.npz", arrays)
  found = look.look(data_sets.open_images("npz", path=path))
  (group,) = found["equal"]
  assert [(one["part"], one["file"]) for one in group] == [
    ("train", "image 4"),
    ("test", "image 0"),
  ]


def test_the_command(tmp_path):
  root = _clean(tmp_path)
  odd = root / "test" / "dog"
  shutil.copy(odd / "0.png", os.fsencode(odd) + b"/caf\xe9 [1].png")  # Latin-1.
  result = small_runs.run_python("-m", "l2t_jax.data", root)
  assert result.returncode == 0, result.stderr
  assert "cannot be read" not in result.stdout
  (odd / "1.png").write_bytes(b"")
  result = small_runs.run_python("-m", "l2t_jax.data", root)
  assert result.returncode == 2, result.stderr
  assert "files that cannot be read (1):" in result.stdout
  result = small_runs.run_python(
    "-m",
    "l2t_jax.data",
    "--config=configs/digits.py",
    "--config.data.source=folder",
    f"--config.data.path={root}",
    "--json",
  )
  assert result.returncode == 2, result.stderr
  (bad,) = json.loads(result.stdout)["unreadable"]
  assert bad["file"] == str(odd / "1.png")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "give a PATH or --config, one of the two"),
    (("a", "--config=b"), "give a PATH or --config, one of the two"),
    (
      ("a", "--config.data.channels=1"),
      "--config.data.channels=1 needs --config; leave it out, or give --config"
      " in place of PATH",
    ),
  ],
)
def test_a_path_or_a_config(arguments, message):
  result = small_runs.run_python("-m", "l2t_jax.data", *arguments)
  assert result.returncode == 2
  assert result.stderr == f"error: {message}\n"
