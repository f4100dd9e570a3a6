"""Every bad input is answered in one line, early, and nothing is lost."""

import contextlib
import ctypes
import importlib
import multiprocessing
from multiprocessing import forkserver
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import sys

import pytest

from l2t_jax import imports
from tests.support import bad_input, small_runs

ALL = [case for cases in bad_input.CASES.values() for case in cases]
# One of each kind of command, each of its own group.
IN_FULL = (
  "A number out of range",
  "A table with an unknown method",
  "A checkpoint without a tensor",
)
PAGE = small_runs.ROOT / "docs" / "guides" / "bad_input.md"
# The library, before jax, and what it imports; this module, with pytest.
_PRELOADED = (
  "l2t_jax.cli",  # First, as in the commands: it keeps XLA quiet.
  "l2t_jax.run.train",
  "l2t_jax.run.plan",
  "l2t_jax.results.table_picture",
  "tests.commands.test_bad_input",
)
_CAPABILITIES_3 = 0x20080522


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  bad_input.set_up(folder)
  return folder


@pytest.fixture(scope="module")
def processes():
  """Forks of a process that has imported the library: they start at once."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(_PRELOADED))
  with pytest.MonkeyPatch.context() as patch:
    # Importing jax sets it, where l2t_jax has not done so before.
    patch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    forkserver.ensure_running()
  return context


def arguments_of(case):
  usual = {
    bad_input.TRAIN: ("--config=small.py", "--workdir=run"),
    bad_input.TABLE: ("--config=small.py", "--workdir=run"),
  }
  return (*usual.get(case.command, ()), *case.arguments.split())


def run_as_main(command, arguments, folder):
  """Become a command that is run in a folder; in a process of its own."""
  os.chdir(folder)
  sys.path[:0] = [str(folder), str(small_runs.ROOT)]
  for stream, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), stream)
  if os.geteuid() == 0:  # Or else nothing is read-only.
    header = struct.pack("Ii", _CAPABILITIES_3, 0)
    assert ctypes.CDLL(None).capset(header, bytes(24)) == 0
  jax = importlib.import_module("jax")
  jax.config.update("jax_disable_most_optimizations", True)
  # What one case compiles, however small, the others find.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  sys.argv = [command, *arguments]
  if command.endswith(".py"):
    runpy.run_path(str(small_runs.ROOT / command), run_name="__main__")
  else:
    sys.modules.pop(command, None)
    runpy.run_module(command, run_name="__main__", alter_sys=True)


def files_in(folder):
  return {
    path: path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file() and path.name != ".lock"
  }


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.wrong)
def test_bad_input(case, inputs, processes, tmp_path):
  if case.needs and not imports.is_installed(case.needs):
    pytest.skip(f"needs {case.needs}")
  shutil.copytree(inputs, tmp_path, symlinks=True, dirs_exist_ok=True)
  case.prepare(tmp_path)
  before = files_in(tmp_path)
  process = processes.Process(
    target=run_as_main, args=(case.command, arguments_of(case), tmp_path)
  )
  process.start()
  process.join()
  said = (tmp_path / "stderr").read_text()
  if case.code:
    assert said == f"error: {case.said}\n"
    (tmp_path / "stdout").unlink()
    (tmp_path / "stderr").unlink()
    assert files_in(tmp_path) == before
  else:
    assert said == ""
    assert (tmp_path / "run" / "summary.json").exists()
  assert process.exitcode == case.code


@pytest.mark.parametrize(
  "case", [case for case in ALL if case.wrong in IN_FULL], ids=lambda c: c.wrong
)
def test_as_a_user_starts_it(case, inputs, tmp_path):
  shutil.copytree(inputs, tmp_path, symlinks=True, dirs_exist_ok=True)
  case.prepare(tmp_path)
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ("TF_CPP_MIN_LOG_LEVEL", "JAX_COMPILATION_CACHE_DIR")
  }
  environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
  command = ("-m", case.command)
  if case.command.endswith(".py"):
    command = (small_runs.ROOT / case.command,)
  result = subprocess.run(
    [sys.executable, *command, *arguments_of(case)],
    capture_output=True,
    text=True,
    timeout=small_runs.PATIENCE,
    cwd=tmp_path,
    env=environment | {"PYTHONPATH": str(small_runs.ROOT)},
  )
  assert result.stderr == f"error: {case.said}\n"
  assert result.returncode == case.code


def test_the_pickle_runs_code_where_it_is_trusted(tmp_path):
  with contextlib.chdir(tmp_path):
    pickle.loads(pickle.dumps(bad_input.RunsCode()))
  assert (tmp_path / bad_input.EVIDENCE).exists()


def test_the_page_is_made_of_the_cases():
  assert PAGE.read_text() == bad_input.page(), (
    "python -m tests.support.bad_input > docs/guides/bad_input.md"
  )
