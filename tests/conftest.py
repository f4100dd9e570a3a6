"""Shared fixtures."""

import atexit
import contextlib
import functools
import os
import signal
import tempfile

import filelock
import hypothesis
import jax
import pytest

from l2t_jax.runtime import cpu_lowering
from tests.support import compiling, small_runs


def pytest_configure():
  """Compile quickly, and share what is compiled between all processes."""
  # `nohup make test &` starts this process, and those that tests start, with
  # Ctrl-C ignored.
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="l2t_jax_cache_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    atexit.register(folder.cleanup)
  # Small programs, too: there are thousands.
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  compiling.compile_quickly()
  cpu_lowering.install()
  # The same examples everywhere and every time, and none kept in a folder.
  hypothesis.settings.register_profile(
    "l2t_jax", derandomize=True, database=None, deadline=None
  )
  hypothesis.settings.load_profile("l2t_jax")


def pytest_collection_modifyitems(items):
  """Begin with what takes longest, so that no process is left alone with it."""
  items.sort(key=lambda item: item.path.name != "test_parity.py")


@pytest.fixture(autouse=True)
def optimized_compilation(request):
  """Let XLA optimise, for tests of what it makes of their programs.

  Elsewhere it compiles quickly, also for the fixtures of a whole session, which
  are made before this one.
  """
  as_usual = request.node.get_closest_marker("optimized")
  with compiling.optimized() if as_usual else contextlib.nullcontext():
    yield


@pytest.fixture
def x64():
  """Compute in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def source(tmp_path_factory):
  """Source weights, trained for one epoch through train.py."""

  def train(workdir):
    result = small_runs.run_python(
      "train.py",
      "--config=configs/digits_source.py",
      "--config.epochs=1",
      f"--workdir={workdir}",
    )
    assert result.returncode == 0, result.stderr

  return _once(tmp_path_factory, "source", train) / "target.safetensors"


@pytest.fixture(scope="session")
def finished(source, tmp_path_factory):
  """A finished run of three epochs."""
  train = functools.partial(small_runs.train, small_runs.small_config(source))
  return _once(tmp_path_factory, "finished", train)


def _once(tmp_path_factory, name, train):
  """Train a run in one process of pytest; the others wait for it."""
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  with filelock.FileLock(folder / f"{name}.lock"):
    if not (folder / name / "summary.json").exists():
      train(folder / name)
  return folder / name
