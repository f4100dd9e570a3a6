"""The face: its names, its documentation, and imports without effects."""

import importlib.metadata
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

import l2t_jax
from tests.support import small_runs

# Imported when they are needed, not by the package.
HEAVY = (
  "grain",
  "matplotlib",
  "orbax",
  "plotly",
  "tensorboardX",
  "tensorflow_datasets",
)
_EFFECTS = """
import json, os, sys
import jax, jax.numpy as jnp
from jax.interpreters import mlir
def convolution(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  ).sum((0, 1, 2))
def state():
  rules = (mlir._lowerings, mlir._platform_specific_lowerings)
  arrays = jnp.ones((2, 2, 2, 8)), jnp.ones((3, 3, 8, 8))
  program = jax.jit(convolution).lower(*arrays).as_text()
  return str(dict(os.environ)), str(rules), program
before = state()
jax.clear_caches()
INSTALL
import l2t_jax
changed = [a != b for a, b in zip(before, state())]
print(json.dumps([changed, list(sys.modules)]))
"""


def _import(install=""):
  result = small_runs.run_python("-c", _EFFECTS.replace("INSTALL", install))
  assert result.returncode == 0, result.stderr
  changed, modules = json.loads(result.stdout)
  loaded = {name.partition(".")[0] for name in modules}
  return changed, loaded & set(HEAVY)


def test_an_import_has_no_effect():
  assert _import() == ([False, False, False], set())


def test_effects_would_be_noticed():
  install = "from l2t_jax.runtime import cpu_lowering; cpu_lowering.install()"
  install += "; os.environ['L2T_X'] = '1'; import matplotlib"
  assert _import(install) == ([True, True, True], {"matplotlib"})


def test_every_name_is_there():
  for name in l2t_jax.__all__:
    assert getattr(l2t_jax, name) is not None


def test_every_name_is_documented():
  """Each has a link in docs/api.md that leads to an entry of that page."""
  text = (small_runs.ROOT / "docs" / "api.md").read_text()
  links = re.findall(r"^\| \[`(\w+)`\]\[([\w.]+)\]", text, re.MULTILINE)
  assert sorted(name for name, _ in links) == sorted(l2t_jax.__all__)
  entries = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
  for name, target in links:
    module, _, last = target.rpartition(".")
    assert target in entries or (module in entries and last == name)


def test_version_and_types():
  assert l2t_jax.__version__ == importlib.metadata.version("l2t-jax")
  assert importlib.resources.files(l2t_jax).joinpath("py.typed").is_file()


@pytest.mark.long
def test_the_wheel_works_without_the_clone(tmp_path):
  """The README's first example in Python, and a command."""
  build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
  build += [f"--wheel-dir={tmp_path}"]
  clone = tmp_path / "clone"  # A build leaves files beside its sources.
  shutil.copytree(small_runs.ROOT / "l2t_jax", clone / "l2t_jax")
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(small_runs.ROOT / name, clone)
  subprocess.run([*build, str(clone)], check=True, timeout=small_runs.PATIENCE)
  shutil.rmtree(clone)
  (wheel,) = tmp_path.glob("*.whl")
  venv.create(tmp_path / "venv", with_pip=False)
  (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
  install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
  install += [f"--target={site}", str(wheel)]
  subprocess.run(install, check=True, timeout=small_runs.PATIENCE)
  # Use the other packages of this interpreter, but not its editable install:
  # Python does not read .pth files in a folder that a .pth file adds.
  (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
  readme = (small_runs.ROOT / "README.md").read_text()
  example = re.search(r"```python\n(import numpy.*?)```", readme, re.S)[1]
  assert "= 20, 25" in example and "= 60," in example
  program = example.replace("= 20, 25", "= 1, 25").replace("= 60,", "= 1,")
  program += "\nprint(l2t.__file__)\n"
  run = lambda *arguments: (
    subprocess.run(
      [tmp_path / "venv/bin/python", *arguments],
      cwd=tmp_path,
      # A clone that PYTHONPATH names would hide the wheel.
      env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
      check=True,
      text=True,
      stdout=subprocess.PIPE,
      timeout=small_runs.PATIENCE,
    ).stdout
  )
  assert str(site) in run("-c", program)
  assert "stage1_block1" in run("-m", "l2t_jax.models", "resnet_tiny")


def test_training_keeps_xla_quiet_and_an_import_does_not():
  """It has to, before jax is imported, which the tests above do first."""
  program = """
import os, sys
os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)
before = dict(os.environ)
import l2t_jax
assert os.environ == before and "jax" not in sys.modules
l2t_jax.default_config()
assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
"""
  result = small_runs.run_python("-c", program)
  assert result.returncode == 0, result.stderr
