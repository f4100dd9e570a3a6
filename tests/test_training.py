"""Whole iterations of the method on small networks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import models, objectives, training, types
from tests import small_setup

# Compiled steps are shared by the tests of one process.
pytestmark = pytest.mark.xdist_group("training")


def setup(method="l2t_ww", **step_options):
  """Return (jitted train step, its first state, source)."""
  state, source, pairs, _ = small_setup.create(method)
  train_step = _jitted(method, jax.config.jax_enable_x64, **step_options)
  return train_step, state, source if pairs else None


@functools.cache
def _jitted(method, x64, **step_options):
  del x64  # A part of the key: each precision has its own program.
  _, _, pairs, target_taps = small_setup.create(method)
  return jax.jit(
    small_setup.make_train_step(pairs, target_taps, **step_options)
  )


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_jitted_equals_unjitted(size):
  """Catches a compiler that computes wrong numbers (jaxlib 0.10.2 does)."""
  # One pair and T = 1: op by op, a step is slow. Two convolutions: a max-pool
  # by `jnp.maximum` goes wrong in them, and has to show.
  target = small_setup.DEEPER_TARGET
  state, source, pairs, target_taps = small_setup.create(
    pair_set="stage1_block1->conv2", target=target
  )
  train_step = small_setup.make_train_step(
    pairs, target_taps, num_inner_steps=1, target=target
  )
  data = small_setup.batch(size)
  after, metrics = jax.jit(train_step)(state, source, data)
  with jax.disable_jit():
    expected, expected_metrics = train_step(state, source, data)
  # What the gradients were shows in the optimizers' moments.
  chex.assert_trees_all_close(
    after.inner.opt_state, expected.inner.opt_state, rtol=2e-3, atol=1e-5
  )
  chex.assert_trees_all_close(
    after.meta_opt_state, expected.meta_opt_state, rtol=2e-3, atol=1e-6
  )
  chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  "options",
  [{"mode": "reverse"}, {"mode": "remat"}, {"rolled": True}],
  ids=["reverse", "remat", "rolled"],
)
def test_modes_and_loops_agree(options, x64):
  data = small_setup.batch(4)
  step, state, source = setup(**options)
  usual, *_ = setup()
  chex.assert_trees_all_close(
    step(state, source, data),
    usual(state, source, data),
    rtol=1e-9,
    atol=1e-14,
  )


def test_the_look_ahead_is_thrown_away(x64):
  """With the same weights, fixed matching takes exactly the same update."""
  train_step, state, source = setup()
  # λ = 1 and w = 1/C, what fixed matching uses.
  meta_params = jax.tree.map(jnp.zeros_like, state.meta_params)
  for layer in meta_params["pair"].values():
    layer["bias"] += 1
  state = state._replace(meta_params=meta_params)
  data = small_setup.batch(4)
  after, _ = train_step(state, source, data)
  fixed_step, fixed, _ = setup("fm_all_to_all")
  fixed = fixed._replace(inner=state.inner)
  expected, _ = fixed_step(fixed, source, data)
  chex.assert_trees_all_close(
    after.inner, expected.inner, rtol=1e-12, atol=1e-15
  )
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), after.meta_params, meta_params
  )
  assert any(jax.tree.leaves(moved))


def test_zero_pair_weights_are_training_from_scratch(x64):
  train_step, state, source = setup()
  meta_params = jax.tree.map(jnp.zeros_like, state.meta_params)
  state = state._replace(meta_params=meta_params)
  data = small_setup.batch(4)
  after, _ = train_step(state, source, data)
  scratch_step, scratch, _ = setup("scratch")
  target = state.inner.params["target"]
  params = {"target": target, "regressors": {}}
  inner = scratch.inner._replace(params=params)
  expected, _ = jax.jit(scratch_step)(scratch._replace(inner=inner), None, data)
  # A bias before a batch norm has no gradient but rounding.
  chex.assert_trees_all_close(
    after.inner.params["target"],
    expected.inner.params["target"],
    rtol=1e-12,
    atol=1e-15,
  )
  chex.assert_trees_all_close(
    after.inner.model_state, expected.inner.model_state, rtol=1e-12
  )


def test_batch_statistics_move_once_an_iteration(x64):
  """They are those of one train-mode pass, whatever the look-ahead does."""
  train_step, state, source = setup()
  data = small_setup.batch(4)
  after, _ = train_step(state, source, data)
  _, once = small_setup.TARGET.apply(
    {"params": state.inner.params["target"], **state.inner.model_state},
    data.images,
    train=True,
    mutable=["batch_stats"],
  )
  chex.assert_trees_all_close(after.inner.model_state, once, rtol=1e-12)


def test_the_step_compiles_once():
  state, source, pairs, target_taps = small_setup.create()
  train_step = jax.jit(
    chex.assert_max_traces(small_setup.make_train_step(pairs, target_taps), n=1)
  )
  for seed in range(3):
    state, _ = train_step(state, source, small_setup.batch(4, seed))
  assert int(state.step) == 3


@pytest.mark.parametrize("method", ["scratch", "fm_one_to_one", "l2t_ww"])
def test_the_loss_goes_down(method):
  train_step, state, source = setup(method)
  data = small_setup.batch(8)
  losses = []
  for _ in range(60):
    state, metrics = train_step(state, source, data)
    losses.append(float(metrics["loss"]))
  assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize(
  ("method", "learned"),
  [
    ("scratch", set()),
    ("fm_all_to_all", set()),
    ("l2t_w_one_to_one", {"channel"}),
    ("l2t_ww", {"channel", "pair"}),
  ],
)
def test_methods_learn_what_they_say(method, learned):
  state, *_ = small_setup.create(method)
  assert set(state.meta_params) == learned


def test_unknown_method():
  with pytest.raises(types.InputError, match="'l2t'; the methods are scratch"):
    objectives.get_method("l2t")


def test_sgd_is_pytorchs(x64):
  """Two steps by hand: L2 in the gradient, then heavy-ball momentum."""
  optimizer = training.sgd(momentum=0.9, weight_decay=0.1)(0.5)
  param = jnp.array(2.0)
  state = optimizer.init(param)
  buffer = expected = 0.0
  expected = 2.0
  for grad in (1.0, -3.0):
    updates, state = optimizer.update(jnp.array(grad), state, param)
    param = optax.apply_updates(param, updates)
    buffer = 0.9 * buffer + grad + 0.1 * expected
    expected -= 0.5 * buffer
    np.testing.assert_allclose(param, expected, rtol=1e-12)


def test_adam_is_pytorchs(x64):
  """Two steps by hand: L2 in the gradient, bias-corrected moments."""
  optimizer = training.adam_l2(0.01, 0.1)
  param = jnp.array(2.0)
  state = optimizer.init(param)
  expected, m, v = 2.0, 0.0, 0.0
  for t, grad in enumerate((1.0, -3.0), start=1):
    updates, state = optimizer.update(jnp.array(grad), state, param)
    param = optax.apply_updates(param, updates)
    grad += 0.1 * expected
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
    denominator = (v / (1 - 0.999**t)) ** 0.5 + 1e-8
    expected -= 0.01 * m / (1 - 0.9**t) / denominator
    np.testing.assert_allclose(param, expected, rtol=1e-9)


def test_learning_rate_is_constant_within_an_epoch():
  rate = training.cosine_by_epoch(0.1, epochs=4, steps_per_epoch=3)
  np.testing.assert_allclose(
    [float(rate(step)) for step in (0, 2, 3, 5, 6, 11)],
    [0.1 * (1 + np.cos(np.pi * e / 4)) / 2 for e in (0, 0, 1, 1, 2, 3)],
    rtol=1e-5,
  )


def test_evaluation_ignores_padding():
  state, *_ = small_setup.create("scratch")
  eval_step = jax.jit(
    training.make_eval_step(models.as_apply_fn(small_setup.TARGET))
  )
  images, labels = small_setup.batch(4)
  whole = eval_step(
    state.inner, types.EvalBatch(images[:3], labels[:3], jnp.ones(3))
  )
  padded = eval_step(
    state.inner,
    types.EvalBatch(images, labels, jnp.array([1.0, 1.0, 1.0, 0.0])),
  )
  chex.assert_trees_all_close(whole, padded, rtol=1e-5)
  assert float(whole["count"]) == 3
