"""The authors' numbers in float64, to 1e-9 of each array's norm."""

import os
import pathlib

from flax import traverse_util
import jax
import numpy as np
import pytest

from l2t_jax.models import torch_weights
from tests.support import golden_setup

pytestmark = pytest.mark.optimized

FOLDER = pathlib.Path(
  os.environ.get("L2T_GOLDEN_DIR") or pathlib.Path(__file__).parent / "golden"
)
FILES = sorted([*FOLDER.glob("step_*.npz"), *FOLDER.glob("heldout_*.npz")])


def test_there_are_golden_files():
  assert FILES, f"no step_*.npz or heldout_*.npz in {FOLDER}"


def _case(file, mode, marks=()):
  return pytest.param(file, mode, id=f"{file.stem}-{mode}", marks=marks)


@pytest.mark.parametrize(
  ("file", "mode"),
  # The default with every file; test_training.py compares all modes.
  [_case(file, "linearized") for file in FILES]
  + [_case(file, "mixed", pytest.mark.long) for file in FILES[-1:]]
  + [_case(file, "reverse", pytest.mark.long) for file in FILES[:1]],
)
def test_iterations_equal_the_authors(file, mode, x64):
  settings, recorded = golden_setup.read(file)
  setup = golden_setup.Setup(settings)
  state, sources = setup.start()
  train_step = jax.jit(setup.make_train_step(mode))
  computed = {}
  for it in range(settings["iterations"]):
    start = state
    state, metrics = train_step(state, sources, setup.batch(it))
    computed |= {
      f"it{it}/{name}": value
      for name, value in _numbers(setup, start, state, metrics).items()
    }
  computed |= _source_numbers(setup, sources[""], settings["iterations"] - 1)
  _assert_equal(computed, recorded)


@pytest.mark.parametrize(
  ("computed", "message"),
  [
    ({"a": np.array([1.0, 1e-6])}, r"not compared: \['b'\]"),
    ({"a": np.array([1.0, 1e-6]), "b": 2 + 3e-9}, r"b: off by 1\.5e-09"),
    ({"a": np.array([1.0, 3e-9 + 1e-6]), "b": 2.0}, "a: off by 3e-09"),
    ({"a": np.array([np.nan, 1e-6]), "b": 2.0}, "a: off by nan"),
    ({"a": np.array([[1.0, 1e-6]]), "b": 2.0}, r"a: \(1, 2\) is not \(2,\)"),
  ],
)
def test_a_difference_is_noticed(computed, message):
  recorded = {"a": np.array([1.0, 1e-6]), "b": np.array(2.0)}
  # An error of 5e-10 of the norm is rounding, however small the element.
  rounded = {"a": np.array([1.0, 5e-10 + 1e-6]), "b": 2.0, "more": 3.0}
  _assert_equal(rounded, recorded)
  with pytest.raises(AssertionError, match=message):
    _assert_equal(computed, recorded)


def _assert_equal(computed, recorded):
  missing = set(recorded) - set(computed)
  assert not missing, f"recorded but not compared: {sorted(missing)}"
  for name, expected in recorded.items():
    golden_setup.assert_equal(computed[name], expected, name)


def _numbers(setup, before, after, metrics):
  """Return what a golden file may record of one iteration."""
  numbers = {
    "ce": metrics["target_loss"],
    "match": metrics["matching_loss"],
    "outer_ce": metrics["outer_loss"],
    "pair_weight_mean": metrics["transfer"]["pair_weights"],
    "meta_grad_norm": metrics["meta_grad_norm"],
    "meta_param_norm": _norm(after.meta_params),
  }
  params = after.inner.params
  for path, leaf in traverse_util.flatten_dict(params["target"]).items():
    name = torch_weights.torch_name(("params", *path))
    numbers[f"target_param_norm/{name}"] = _norm(leaf)
  for k, pair in enumerate(setup.pairs):
    layer, name = params["regressors"][pair.name], f"regressor.{k}"
    numbers[f"target_param_norm/{name}.weight"] = _norm(layer["kernel"])
    numbers[f"target_param_norm/{name}.bias"] = _norm(layer["bias"])
  grads = setup.meta_gradient(before, after)
  golden_setup.assert_equal(
    _norm(grads), metrics["meta_grad_norm"], "the norm of meta_grad"
  )
  nets = (("channel_net", "channel"), ("pair_net", "pair"))
  for k, pair in enumerate(setup.pairs):
    for theirs, ours in nets:
      layer = grads[ours][pair.name]
      numbers[f"meta_grad/{theirs}.{k}.weight"] = layer["kernel"].T
      numbers[f"meta_grad/{theirs}.{k}.bias"] = layer["bias"]
  return numbers


def _source_numbers(setup, source, iteration):
  images = setup.batch(iteration).images
  logits, features, _ = jax.jit(setup.source_fn, static_argnames="train")(
    source.params, source.model_state, images, train=False
  )
  # Blocks are counted from 0 over the three stages.
  taps = {4: "stage1_block5", 9: "stage2_block5", 14: "stage3_block5"}
  return {"source_logits": logits} | {
    f"source_feature_mean/{block}": features[tap].mean(axis=(1, 2))
    for block, tap in taps.items()
  }


def _norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
