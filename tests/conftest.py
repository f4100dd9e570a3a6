"""Shared fixtures."""

import atexit
import os
import tempfile

import jax
import pytest

from l2t_jax import experiment
from tests import small_runs


def pytest_configure():
  """Let all processes of one session share what they compile."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="l2t_jax_cache_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    atexit.register(folder.cleanup)


@pytest.fixture(autouse=True)
def quick_compilation(request):
  """Let XLA optimise little, but for tests of what it makes of a program."""
  as_usual = request.node.get_closest_marker("optimized")
  jax.config.update("jax_disable_most_optimizations", not as_usual)


@pytest.fixture
def x64():
  """Compute in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def source(tmp_path_factory):
  """Source weights, trained for one epoch through train.py."""
  workdir = tmp_path_factory.mktemp("source") / "run"
  result = small_runs.run_python(
    "train.py",
    "--config=configs/digits_source.py",
    "--config.epochs=1",
    f"--workdir={workdir}",
  )
  assert result.returncode == 0, result.stderr
  return workdir / "target.safetensors"


@pytest.fixture(scope="session")
def finished(source, tmp_path_factory):
  """A finished run of three epochs."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  experiment.train_and_evaluate(small_runs.small_config(source), workdir)
  return workdir
