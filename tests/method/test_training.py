"""Whole iterations of the method on small networks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import models, types
from l2t_jax.method import bilevel, objectives, optimizers, training, transfer
from tests.support import compiling, small_setup

# Compiled steps are shared by the tests of one process.
pytestmark = pytest.mark.xdist_group("training")


def setup(method="l2t_ww", **step_options):
  """Return (jitted train step, its first state, sources)."""
  state, sources, *_ = small_setup.create(method)
  train_step = _jitted(method, jax.config.jax_enable_x64, **step_options)
  return train_step, state, sources


@functools.cache
def _jitted(method, x64, **step_options):
  del x64  # A part of the key: each precision has its own program.
  _, _, pairs, target_taps = small_setup.create(method)
  return jax.jit(
    small_setup.make_train_step(method, pairs, target_taps, **step_options)
  )


def test_jitted_equals_unjitted():
  """Catch a compiler that computes wrong numbers, such as jaxlib 0.10.2's."""
  # One pair and T = 1, because a step is slow op by op. Two convolutions, so
  # that the errors of a max-pool by `jnp.maximum` would show.
  target = small_setup.DEEPER_TARGET
  state, source, pairs, target_taps = small_setup.create(
    pair_set="stage1_block1->conv2", target=target
  )
  train_step = small_setup.make_train_step(
    "l2t_ww", pairs, target_taps, num_inner_steps=1, target=target
  )
  data = small_setup.batch(3)  # No multiple of 4.
  with compiling.optimized():
    step = jax.jit(train_step).lower(state, source, data).compile()
  after, metrics = step(state, source, data)
  with jax.disable_jit():
    expected, expected_metrics = train_step(state, source, data)
  # The optimizers' moments show the gradients.
  chex.assert_trees_all_close(
    after.inner.opt_state, expected.inner.opt_state, rtol=2e-3, atol=1e-5
  )
  chex.assert_trees_all_close(
    after.meta_opt_state, expected.meta_opt_state, rtol=2e-3, atol=1e-6
  )
  chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  "options",
  [
    {"mode": "reverse"},
    {"mode": "remat"},
    {"num_inner_steps": 3, "rolled": False},
  ],
  ids=["reverse", "remat", "unrolled"],
)
def test_modes_and_loops_agree(options, x64):
  data = small_setup.batch(4)
  step, state, source = setup(**options)
  usual, *_ = setup(num_inner_steps=options.get("num_inner_steps", 2))
  chex.assert_trees_all_close(
    step(state, source, data),
    usual(state, source, data),
    rtol=1e-9,
    atol=1e-14,
  )


def test_the_look_ahead_is_thrown_away(x64):
  """With the same weights, fixed matching makes exactly the same update."""
  train_step, state, source = setup()
  # λ = 1 and w = 1/C, as in fixed matching.
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
  params = scratch.inner.params | {"target": target}
  inner = scratch.inner._replace(params=params)
  expected, _ = scratch_step(scratch._replace(inner=inner), {}, data)
  # The gradient of a bias before a batch norm is only rounding error.
  chex.assert_trees_all_close(
    after.inner.params["target"],
    expected.inner.params["target"],
    rtol=1e-12,
    atol=1e-15,
  )
  chex.assert_trees_all_close(
    after.inner.model_state, expected.inner.model_state, rtol=1e-12
  )


def test_batch_statistics_move_once_per_iteration(x64):
  """They are those of one pass in train mode, without the look-ahead's."""
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
    chex.assert_max_traces(
      small_setup.make_train_step("l2t_ww", pairs, target_taps), n=1
    )
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


def test_sgd_is_pytorchs(x64):
  """Two steps by hand: L2 in the gradient, then heavy-ball momentum."""
  optimizer = optimizers.sgd(momentum=0.9, weight_decay=0.1)(0.5)
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
  optimizer = optimizers.adam_l2(0.01, 0.1)
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
  rate = optimizers.make_schedule("cosine", 0.1, epochs=4, steps_per_epoch=3)
  np.testing.assert_allclose(
    [float(rate(step)) for step in (0, 2, 3, 5, 6, 11)],
    [0.1 * (1 + np.cos(np.pi * e / 4)) / 2 for e in (0, 0, 1, 1, 2, 3)],
    rtol=1e-5,
  )


def test_learning_rate_by_steps():
  rate = optimizers.make_schedule("step", 0.1, epochs=4, steps_per_epoch=3)
  np.testing.assert_allclose(
    [float(rate(step)) for step in (0, 5, 6, 8, 9, 11)],
    [0.1, 0.1, 0.01, 0.01, 0.001, 0.001],
    rtol=1e-5,
  )
  short = optimizers.make_schedule("step", 0.1, epochs=1, steps_per_epoch=3)
  np.testing.assert_allclose(float(short(0)), 0.1, rtol=1e-6)


def test_an_iteration_has_its_own_rate_and_keeps_the_momentum(x64):
  """With L = θ, rates of 0.1, 0.2 and 0.3, and momentum 0.5."""
  loss_fn = lambda params, *_: (params, objectives.Aux({}, {"loss": params}))
  recipe = training.Recipe(
    optimizers.sgd(momentum=0.5, weight_decay=0.0),
    lambda step: 0.1 * (step + 1),
    optax.identity(),
  )
  train_step = jax.jit(
    training.make_train_step(
      training.Problem(objectives.Losses(*[loss_fn] * 4)), recipe
    )
  )
  state = training.create_state(jnp.array(1.0), {}, {}, recipe)
  # The momentum buffers are 1, 1.5 and 1.75.
  for expected in (0.9, 0.6, 0.075):
    state, _ = train_step(state, {}, small_setup.batch(1))
    np.testing.assert_allclose(state.inner.params, expected, rtol=1e-12)


def test_two_sources_are_the_sum_of_their_pairs(x64):
  """Pairs, losses and gradients of the regressors."""
  state, sources, pairs, target_taps = small_setup.create("fm_all_to_all")
  second = jax.tree.map(lambda x: 1.1 * x, sources[""])
  data = small_setup.batch(4)
  named = lambda name: tuple(
    p._replace(source=f"{name}/{p.source}") for p in pairs
  )
  all_pairs = (*named("a"), *named("b"))
  regressors = {
    f"{name}/{key}": value
    for name in "ab"
    for key, value in state.inner.params["regressors"].items()
  }
  source_fn = models.as_apply_fn(small_setup.SOURCE)

  def first_step(pairs, sources):
    matching = objectives.matching(pairs, beta=0.5)
    target_fn = models.as_apply_fn(small_setup.TARGET)
    problem = training.Problem(
      objectives.make_losses(target_fn, {"matching": matching}),
      dict.fromkeys(sources, source_fn),
      pairs,
      target_taps,
      functools.partial(transfer.transfer_weights, pairs=pairs),
    )
    recipe = training.Recipe(
      # No momentum, no decay: the update is the gradient.
      optax.sgd,
      lambda step: 0.05,
      small_setup.META_OPTIMIZER,
      num_inner_steps=1,
    )
    train_step = training.make_train_step(problem, recipe)
    params = {"target": state.inner.params["target"], "regressors": regressors}
    inner = types.InnerState(
      params, optax.sgd(0.0).init(params), state.inner.model_state
    )
    start = types.TrainState(jnp.zeros((), jnp.int32), inner, {}, ())
    after, metrics = jax.jit(train_step)(start, sources, data)
    moved = jax.tree.map(jnp.subtract, after.inner.params, params)
    return moved, metrics

  a, metrics_a = first_step(named("a"), {"a": sources[""]})
  b, metrics_b = first_step(named("b"), {"b": second})
  both, metrics = first_step(all_pairs, {"a": sources[""], "b": second})
  np.testing.assert_allclose(
    metrics["matching_loss"],
    metrics_a["matching_loss"] + metrics_b["matching_loss"],
    rtol=1e-12,
  )
  chex.assert_trees_all_close(
    both["regressors"],
    jax.tree.map(jnp.add, a["regressors"], b["regressors"]),
    rtol=1e-9,
    atol=1e-15,
  )
  np.testing.assert_array_equal(
    metrics["transfer"]["distances"],
    jnp.concatenate(
      [m["transfer"]["distances"] for m in (metrics_a, metrics_b)]
    ),
  )


def test_unlabeled_images_join_the_matching_alone(x64):
  """L_org and the batch statistics are those of the labelled images."""
  train_step, state, sources = setup("fm_all_to_all")
  data = small_setup.batch(4, num_unlabeled=6)
  labelled = data._replace(unlabeled=None)
  rest = types.Batch(data.unlabeled, jnp.zeros(6, jnp.int32))
  after, metrics = train_step(state, sources, data)
  plain, plain_metrics = train_step(state, sources, labelled)
  _, rest_metrics = train_step(state, sources, rest)
  assert metrics["target_loss"] == plain_metrics["target_loss"]
  chex.assert_trees_all_equal(after.inner.model_state, plain.inner.model_state)
  by_hand = 4 * plain_metrics["matching_loss"]
  by_hand += 6 * rest_metrics["matching_loss"]
  np.testing.assert_allclose(metrics["matching_loss"], by_hand / 10, rtol=1e-12)
  np.testing.assert_allclose(
    metrics["loss"], metrics["target_loss"] + by_hand / 10, rtol=1e-12
  )


def test_vmapped_seeds_are_single_seeds(x64):
  train_step, _, sources = setup()
  states = [small_setup.create(seed=seed)[0] for seed in range(3)]
  # All seeds have one source.
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  _, _, pairs, target_taps = small_setup.create()
  vmapped = jax.jit(
    jax.vmap(
      small_setup.make_train_step("l2t_ww", pairs, target_taps),
      in_axes=(0, None, 0),
    )
  )
  for step in range(2):
    batches = [
      small_setup.batch(4, seed=10 * step + s, mixes=True) for s in range(3)
    ]
    ends = [
      train_step(state, sources, batch)
      for state, batch in zip(states, batches, strict=True)
    ]
    states = [state for state, _ in ends]
    together, metrics = vmapped(
      together, sources, jax.tree.map(lambda *x: jnp.stack(x), *batches)
    )
    for index, end in enumerate(ends):
      mine = jax.tree.map(lambda x: x[index], (together, metrics))  # noqa: B023
      chex.assert_trees_all_close(mine, end, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", ["afd", "aft", "l2t_ww_joint"])
def test_vmapped_seeds_of_other_methods(method, x64):
  states = [small_setup.create(method, seed=seed)[0] for seed in range(2)]
  _, sources, pairs, target_taps = small_setup.create(method)
  train_step = small_setup.make_train_step(method, pairs, target_taps)
  batch = small_setup.batch(4)
  together, _ = jax.jit(jax.vmap(train_step, in_axes=(0, None, None)))(
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), sources, batch
  )
  alone = jax.jit(train_step)
  for index, state in enumerate(states):
    mine = jax.tree.map(lambda x: x[index], together)  # noqa: B023
    chex.assert_trees_all_close(
      mine, alone(state, sources, batch)[0], rtol=1e-9, atol=1e-13
    )


def test_a_combination_adds_to_the_real_update_alone(x64):
  """Steps of the look-ahead minimise the matching loss alone."""
  method = "lwf+at+l2t_ww"
  state, sources, pairs, target_taps = small_setup.create(method)
  data = training._with_sources(
    small_setup.make_problem(method, pairs, target_taps),
    sources,
    training._mixed(small_setup.batch(4)),
  )
  weights = transfer.transfer_weights(
    state.meta_params, data.source.matching.pooled, pairs
  )
  values = {
    name: {
      loss: fn(state.inner.params, weights, state.inner.model_state, data)[0]
      for loss, fn in small_setup.make_problem(name, pairs, target_taps)
      .losses._asdict()
      .items()
    }
    for name in (method, "l2t_ww", "lwf", "at")
  }
  for loss in ("target", "auxiliary", "total"):
    np.testing.assert_allclose(
      values[method][loss], values["l2t_ww"][loss], rtol=1e-12
    )
  by_hand = sum(values[name]["auxiliary"] for name in ("l2t_ww", "lwf", "at"))
  np.testing.assert_allclose(
    values[method]["update"],
    values["l2t_ww"]["target"] + by_hand,
    rtol=1e-12,
  )


def test_without_a_look_ahead_the_weights_descend_the_real_loss(x64):
  """Together with the target, from the same gradient."""
  method = "l2t_ww_joint"
  state, sources, pairs, target_taps = small_setup.create(method)
  problem = small_setup.make_problem(method, pairs, target_taps)
  recipe = small_setup.RECIPE._replace(
    look_ahead_loss="none", meta_optimizer=optax.sgd(1.0)
  )
  params, _, model_state = state.inner
  state = training.create_state(params, model_state, state.meta_params, recipe)
  batch = small_setup.batch(4)
  after, metrics = jax.jit(training.make_train_step(problem, recipe))(
    state, sources, batch
  )
  data = training._with_sources(problem, sources, training._mixed(batch))

  def loss(meta_params):
    weights = transfer.transfer_weights(
      meta_params, data.source.matching.pooled, pairs, activation="softmax"
    )
    return problem.losses.total(params, weights, model_state, data)[0]

  expected = jax.grad(loss)(state.meta_params)
  seen = jax.tree.map(jnp.subtract, state.meta_params, after.meta_params)
  chex.assert_trees_all_close(seen, expected, rtol=1e-9, atol=1e-13)
  assert metrics["meta_grad_norm"] > 1e-6
  assert "outer_loss" not in metrics


@pytest.mark.parametrize(
  ("look_ahead_loss", "num_outer"),
  [("auxiliary", 0), ("total", 0), ("total", 5)],
)
def test_look_ahead_by_hand(look_ahead_loss, num_outer, x64):
  """T = 1 on labelled and unlabelled images, after the real update.

  The outer loss is that of the labelled images, or of images of its own.
  """
  train_step, state, sources = setup(
    look_ahead_loss=look_ahead_loss, num_inner_steps=1
  )
  _, _, pairs, target_taps = small_setup.create()
  data = small_setup.batch(4, num_unlabeled=6)
  if num_outer:
    images, labels, *_ = small_setup.batch(num_outer, seed=1)
    data = data._replace(outer=types.Labelled(images, labels))
  after, metrics = train_step(state, sources, data)
  _, features, _ = models.as_apply_fn(small_setup.SOURCE)(
    sources[""].params,
    sources[""].model_state,
    jnp.concatenate([data.images, data.unlabeled]),
    train=False,
  )
  maps = transfer.prepare_source(features, pairs, target_taps)
  batch = objectives.TransferBatch(
    *data[:3], source=objectives.SourceOutputs({}, maps)
  )
  losses = objectives.make_losses(
    models.as_apply_fn(small_setup.TARGET),
    {"matching": objectives.matching(pairs, beta=0.5)},
  )

  def one_step(inner, loss_fn, weights):
    grads, aux = jax.grad(loss_fn, has_aux=True)(
      inner.params, weights, inner.model_state, batch
    )
    return bilevel.apply_gradients(
      small_setup.OPTIMIZER_FN(0.05), inner, grads, aux.model_state
    )

  @jax.jit
  def outer_loss(meta_params):
    weights = transfer.transfer_weights(meta_params, maps.pooled, pairs)
    if look_ahead_loss == "total":
      inner = one_step(after.inner, losses.total, weights)
    else:
      inner = one_step(after.inner, losses.auxiliary, weights)
      inner = one_step(inner, losses.target, weights)
    outer = objectives.TransferBatch(*(data.outer or data[:2]))
    return losses.target(inner.params, weights, inner.model_state, outer)[0]

  np.testing.assert_allclose(
    metrics["outer_loss"], outer_loss(state.meta_params), rtol=1e-10
  )
  norm = optax.tree.norm(jax.grad(outer_loss)(state.meta_params))
  np.testing.assert_allclose(metrics["meta_grad_norm"], norm, rtol=1e-9)


def test_without_a_meta_update_the_target_trains_on(x64):
  train_step, state, sources = setup()
  plain_step, *_ = setup(update_meta=False)
  data = small_setup.batch(4)
  after, _ = train_step(state, sources, data)
  plain, metrics = plain_step(state, sources, data)
  chex.assert_trees_all_close(after.inner, plain.inner, rtol=1e-12, atol=1e-15)
  chex.assert_trees_all_equal(plain.meta_params, state.meta_params)
  chex.assert_trees_all_equal(plain.meta_opt_state, state.meta_opt_state)
  assert "outer_loss" not in metrics
  assert int(plain.step) == 1


def test_the_average_is_evaluated(x64):
  """By hand: it follows closely at first, then at the decay rate."""
  loss_fn = lambda params, *_: (
    params["target"],
    objectives.Aux({"seen": params["target"]}, {"loss": params["target"]}),
  )
  recipe = training.Recipe(
    optax.sgd, lambda step: 1.0, optax.identity(), ema_decay=0.2
  )
  train_step = jax.jit(
    training.make_train_step(
      training.Problem(objectives.Losses(*[loss_fn] * 4)), recipe
    ),
    donate_argnums=0,
  )
  state = training.create_state(
    {"target": jnp.array(3.0)}, {"seen": jnp.array(0.0)}, {}, recipe
  )
  averages = jax.device_get(training.evaluated(state))
  for value, decay in ((2.0, 0.1), (1.0, 2 / 11), (0.0, 0.2), (-1.0, 0.2)):
    state, _ = train_step(state, {}, small_setup.batch(1))
    assert state.inner.params["target"] == value
    latest = training.Variables(value, {"seen": value + 1})
    averages = jax.tree.map(
      lambda old, new: decay * old + (1 - decay) * new,  # noqa: B023
      averages,
      latest,
    )
    chex.assert_trees_all_close(training.evaluated(state), averages)


def test_evaluation_ignores_padding():
  state, *_ = small_setup.create("scratch")
  eval_step = jax.jit(
    training.make_eval_step(models.as_apply_fn(small_setup.TARGET))
  )
  images, *_ = small_setup.batch(4)
  logits, *_ = models.as_apply_fn(small_setup.TARGET)(
    state.inner.params["target"], state.inner.model_state, images, train=False
  )
  labels = jnp.argmax(logits, axis=-1)  # Padding would count as right.
  variables = training.evaluated(state)
  whole = eval_step(
    variables, types.EvalBatch(images[:3], labels[:3], jnp.ones(3))
  )
  padded = eval_step(
    variables,
    types.EvalBatch(images, labels, jnp.array([1.0, 1.0, 1.0, 0.0])),
  )
  chex.assert_trees_all_close(whole, padded, rtol=1e-5)
  assert whole["count"] == whole["accuracy"] == 3


def test_a_step_lowers_for_accelerators_without_the_rules_for_cpus():
  """The same program for both, with every convolution of the networks in it."""
  train_step, state, sources = setup(mode="linearized", num_inner_steps=3)
  traced = train_step.trace(state, sources, small_setup.batch(8))
  lowered = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ("cpu", "cuda", "tpu")
  }
  count = lambda platform: lowered[platform].count("stablehlo.convolution")
  assert lowered["cuda"] == lowered["tpu"]
  # On CPU some of them are products of patches.
  assert count("tpu") > count("cpu") > 0
  assert "stablehlo.while" in lowered["tpu"]  # The look-ahead stays a loop.
