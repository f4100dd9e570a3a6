"""The face: its names, its documentation, and imports without effects."""

import importlib.metadata
import importlib.resources
import json
import re

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
  """Each has a link in docs/api.md; mkdocs checks where it leads."""
  text = (small_runs.ROOT / "docs" / "api.md").read_text()
  names = re.findall(
    r"^\| \[`(\w+)`\]\[l2t_jax\.[\w.]+\] \|", text, re.MULTILINE
  )
  assert len(names) == len(set(names))
  assert set(names) == set(l2t_jax.__all__)


def test_version_and_types():
  assert l2t_jax.__version__ == importlib.metadata.version("l2t-jax")
  assert importlib.resources.files(l2t_jax).joinpath("py.typed").is_file()
