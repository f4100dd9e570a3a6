"""Files on a full disk and in places that cannot be written."""

import resource

import numpy as np
import pytest
import safetensors.numpy

from l2t_jax import errors, export, files
from l2t_jax.models import weight_files
from l2t_jax.runtime import run_folder, tracking

LARGE = {"params": {"w": np.ones(20_000, np.float32)}}
SMALL = {"params": {"w": np.zeros(3, np.float32)}}


@pytest.fixture
def full_disk():
  """Make writes of more than 40 kB into a file fail."""
  usual = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, usual[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def _as_of_a_run(folder):
  return (
    pytest.raises(
      errors.StorageError, match=f"cannot write into {folder}: File"
    ),
    run_folder.storage_errors([folder]),
  )


def test_weights_stay_what_they_were(tmp_path, full_disk):
  path = tmp_path / "target.safetensors"
  weight_files.save(path, SMALL, {})
  told, run = _as_of_a_run(tmp_path)
  with told, run:
    weight_files.save(path, LARGE, {})
  assert [*tmp_path.iterdir()] == [path]
  np.testing.assert_array_equal(
    safetensors.numpy.load_file(path)["params/w"], SMALL["params"]["w"]
  )


def test_tensorboard_does_not_wait_for_ever(tmp_path, full_disk):
  tracker = tracking.TRACKERS["tensorboard"](tmp_path, 0, {})
  told, run = _as_of_a_run(tmp_path)
  with told, run:
    for step in range(1_000):
      tracker.write({"loss": 0.5}, step)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_what_a_user_named(tmp_path, full_disk, suffix, monkeypatch):
  if suffix == "pt":
    pytest.importorskip("torch")
  monkeypatch.setattr(export, "to_state_dict", lambda _: LARGE["params"])
  path = tmp_path / f"weights.{suffix}"
  message = f"cannot write {path}: File too large; choose another place"
  with pytest.raises(errors.InputError, match=message):
    export.write(None, path)
  assert not [*tmp_path.iterdir()]


def test_places_where_no_file_can_be(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "folder").mkdir()
  for place in ("folder", "file/report.html"):
    with pytest.raises(OSError, match=r"directory|exists"):
      files.check_place(tmp_path / place)
  files.check_place(tmp_path / "new" / "report.html")
  assert not [*(tmp_path / "new").iterdir()]
