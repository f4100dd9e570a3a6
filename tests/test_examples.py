"""The examples learn what they say that they learn."""

import ast
import functools

import jax
from jax import flatten_util
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest

from configs import digits, digits_source
from examples import (
  few_shot,
  learned_loss,
  learned_rates,
  meta_training,
  noisy_labels,
  regularization,
  tasks,
)
import l2t_jax as l2t
from l2t_jax import types
from tests.support import small_runs

pytestmark = pytest.mark.long


def test_noisy_labels():
  results = noisy_labels.main()
  assert results["accuracy_learned"] > results["accuracy_equal"] + 0.02
  assert results["weight_right"] > results["weight_wrong"] + 0.2


@pytest.mark.optimized
def test_regularization():
  results = regularization.main()
  assert results["learned"] > results["cross_validated"] + 0.01


@pytest.mark.optimized
def test_few_shot():
  results = few_shot.main()
  assert results["pretrained"] > results["random"] + 0.05
  assert results["learned"] > results["pretrained"] + 0.02


@pytest.mark.optimized
def test_learned_rates():
  results = learned_rates.main()
  assert results["learned"] > results["grid"]


@pytest.mark.optimized
def test_learned_loss():
  results = learned_loss.main()
  others = [value for name, value in results.items() if name != "learned"]
  assert results["learned"] > max(others)


def _few_shot(rng):
  images = meta_training.kinds_of_digits()
  start = meta_training.init(jax.random.key(0), [few_shot.SIZE**2, 8, 3])
  (task,) = _each(few_shot.draw_tasks(rng, images, 1))
  judged = meta_training.loss_on(1)
  return few_shot.adapt(0.3), judged, few_shot.NO_STATE, start, task


def _learned_rates(rng):
  state, batch = learned_rates.draw(rng, *meta_training.halves_of_digits()[0])
  judged = meta_training.loss_on(1)
  meta_params = learned_rates.equal(0.03, 1e-3)
  return learned_rates.look_ahead, judged, state, meta_params, batch


def _learned_loss(rng):
  state, batch = learned_loss.draw(rng, *meta_training.halves_of_digits()[0])
  look_ahead = learned_loss.train_on(learned_loss.learned_loss)
  judged = meta_training.loss_on(1)
  return look_ahead, judged, state, jnp.full(7, -2.0), batch


def _noisy_labels(rng):
  train, clean, *_ = noisy_labels.load(0)
  params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
  state = types.InnerState(params, noisy_labels.OPTIMIZER.init(params), None)
  weights = jnp.asarray(rng.standard_normal(noisy_labels.NUM_TRAIN))
  judged = noisy_labels.clean_loss
  return noisy_labels.look_ahead, judged, state, weights, (train, clean)


def _each(tasks):
  """Return the tasks of arrays with a leading axis of tasks."""
  number = len(jax.tree.leaves(tasks)[0])
  return [jax.tree.map(lambda x: x[i], tasks) for i in range(number)]  # noqa: B023


@pytest.mark.parametrize(
  ("problem", "example"),
  [
    (_few_shot, few_shot),
    (_learned_rates, learned_rates),
    (_learned_loss, learned_loss),
    (_noisy_labels, noisy_labels),
  ],
)
def test_all_modes_agree_on_the_problem(problem, example, monkeypatch, x64):
  """To 1e-9, and with central differences."""
  monkeypatch.setattr(example, "INNER_STEPS", 6)
  make_inner_step = l2t.make_inner_step
  gradients = {}
  for mode in l2t.MODES:
    monkeypatch.setattr(
      l2t, "make_inner_step", functools.partial(make_inner_step, mode=mode)
    )
    look_ahead, judged, *arguments = _in_float64(
      problem(np.random.default_rng(0))
    )
    gradient = jax.jit(
      lambda *arguments: l2t.hypergradient(look_ahead, judged, *arguments)[1]  # noqa: B023
    )
    gradients[mode] = flatten_util.ravel_pytree(gradient(*arguments))[0]
  expected = gradients.pop("reverse")
  for mode, seen in gradients.items():
    distance = np.linalg.norm(seen - expected) / np.linalg.norm(expected)
    assert distance < 1e-9, mode
  comparison = l2t.check_hypergradient(
    look_ahead, judged, *arguments, num_directions=1
  )
  assert comparison.error < 1e-3, comparison  # There are kinks of relu.


def test_implicit_derivative_of_regularization(x64, monkeypatch):
  """It agrees with central differences once the loop has converged."""
  monkeypatch.setattr(regularization, "INNER_STEPS", 400)
  labelled, _ = regularization.load(0)
  fold = _each(regularization.in_folds(*labelled))[0]
  params = {"w": jnp.zeros((256, 10)), "b": jnp.zeros(10)}
  state = types.InnerState(params, None, None)
  look_ahead = l2t.at_stationary_point(
    regularization.minimise,
    regularization.penalised,
    tolerance=1e-6,
    max_iterations=3000,
  )
  comparison = l2t.check_hypergradient(
    look_ahead,
    regularization.held_out,
    state,
    jnp.full(4, jnp.log(1e-2)),
    fold,
  )
  assert comparison.dtype == "float64"
  assert comparison.error < 1e-4, comparison


def _in_float64(tree):
  is_float = lambda x: (
    hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
  )
  return jax.tree.map(
    lambda x: x.astype(jnp.float64) if is_float(x) else x, tree
  )


def test_a_transformer_teaches_a_convnet(tmp_path):
  """Tokens against maps, Linen against NNX, as examples/networks.py says."""
  source_config = digits_source.get_config()
  source_config.target.model = "examples.networks:vit"
  source_config.optimizer.learning_rate = 0.05
  source_config.epochs = 7
  source = small_runs.train(source_config, tmp_path / "vit")
  assert source["test_accuracy"] > 0.3
  config = digits.get_config()
  config.source.weights = str(tmp_path / "vit" / "target.safetensors")
  config.source.taps = ("block_[13]",)
  config.target.model = "examples.networks:convnext_nnx"
  config.bilevel.num_inner_steps = 1
  config.optimizer.learning_rate = 0.05
  config.transfer.beta = 0.02
  config.epochs = 20
  summary = small_runs.train(config, tmp_path / "convnext")
  assert summary["test_accuracy"] > 0.3
  losses = [
    record["train_matching_loss"]
    for record in small_runs.records(tmp_path / "convnext", "epoch")
  ]
  assert losses[-1] < 0.8 * max(losses)


@pytest.mark.parametrize(
  ("task", "method", "guess"),
  [
    # No digit is there; the middle of -1 and 1; ink everywhere.
    ("PRESENCE", "scratch", 0.81),
    ("ANGLE", "fm_all_to_all", -0.5),
    ("INK", "fm_all_to_all", 0.3),
  ],
)
def test_tasks(task, method, guess, source, tmp_path):
  config = tasks.config_of(task, tmp_path, source, method, epochs=8)
  config.bilevel.num_inner_steps = 1
  summary = small_runs.train(config, tmp_path / "run")
  assert summary["test_accuracy"] > guess + 0.05


def test_notebook():
  """Every cell runs; it draws the map and the target has learned."""
  notebook = nbformat.read(small_runs.ROOT / "examples/notebook.ipynb", 4)
  nbclient.NotebookClient(
    notebook, timeout=600, resources={"metadata": {"path": small_runs.ROOT}}
  ).execute()
  *_, targets, drawn, predicted = (
    cell.outputs[-1]["data"] for cell in notebook.cells if cell.get("outputs")
  )
  assert min(ast.literal_eval(targets["text/plain"]).values()) > 0.4
  assert "image/png" in drawn
  assert "array" in predicted["text/plain"]
