"""Hypergradients are exact in every mode, for any loss and optimizer."""

import contextlib
import functools

import chex
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import errors, types
from l2t_jax.method import bilevel, optimizers
from tests.support import small_runs, small_setup

NUM_IN, NUM_HIDDEN, NUM_OUT = 3, 4, 2
_CUSTOM_GRADIENT = bilevel._custom_gradient


def inner_loss(params, meta_params, model_state, batch):
  """A small network with batch norm; each example has a learned weight."""
  images, labels = batch
  hidden = images @ params["w1"] + params["b1"]
  mean, var = hidden.mean(axis=0), hidden.var(axis=0)
  hidden = (hidden - mean) / jnp.sqrt(var + 1e-5)
  hidden = jnp.tanh(hidden * params["scale"])
  logits = hidden @ params["w2"]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  weights = jax.nn.softplus(images @ meta_params["u"] + meta_params["v"])
  model_state = {"mean": 0.9 * model_state["mean"] + 0.1 * mean}
  return jnp.mean(weights * losses), model_state


def outer_loss(params, meta_params, model_state, batch):
  """Like the inner loss, but unweighted and with a term in meta_params."""
  uniform = jax.tree.map(jnp.zeros_like, meta_params)
  loss, model_state = inner_loss(params, uniform, model_state, batch)
  return loss + 0.1 * jnp.sum(meta_params["v"] ** 2), model_state


def problem():
  """Return (state, meta_params, batch) in the current precision."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  params = {
    "w1": draw(NUM_IN, NUM_HIDDEN),
    "b1": draw(NUM_HIDDEN),
    "scale": 1 + 0.1 * draw(NUM_HIDDEN),
    "w2": draw(NUM_HIDDEN, NUM_OUT),
  }
  meta_params = {"u": draw(NUM_IN), "v": draw()}
  batch = (draw(6, NUM_IN), jnp.asarray(rng.integers(0, NUM_OUT, 6)))
  return params, meta_params, {"mean": jnp.zeros(NUM_HIDDEN)}, batch


def sgd():
  return optimizers.sgd(momentum=0.9, weight_decay=1e-2)(0.3)


def make_look_ahead(mode, num_steps, optimizer=None, rolled=False):
  step = bilevel.make_inner_step(inner_loss, optimizer or sgd(), mode=mode)

  def look_ahead(state, meta_params, batch):
    return bilevel.unroll(
      step, state, meta_params, batch, num_steps=num_steps, rolled=rolled
    )[0]

  return look_ahead


def warm_state(params, model_state, optimizer, meta_params, batch):
  """A state whose momentum buffer is not zero."""
  state = types.InnerState(params, optimizer.init(params), model_state)
  step = bilevel.make_inner_step(inner_loss, optimizer)
  return step(state, meta_params, batch)[0]


def gradient_and_differences(look_ahead, optimizer=None, epsilon=1e-5):
  """Return the hypergradient and central differences, both flat."""
  params, meta_params, model_state, batch = problem()
  optimizer = optimizer or sgd()
  state = warm_state(params, model_state, optimizer, meta_params, batch)

  @jax.jit
  def value_and_grad(meta_params):
    return bilevel.hypergradient(
      look_ahead, outer_loss, state, meta_params, batch
    )

  _, grads = value_and_grad(meta_params)
  flat, unflatten = jax.flatten_util.ravel_pytree(meta_params)
  value = lambda flat: float(value_and_grad(unflatten(flat))[0])
  directions = epsilon * np.eye(flat.size)
  differences = [
    (value(flat + d) - value(flat - d)) / (2 * epsilon) for d in directions
  ]
  return jax.flatten_util.ravel_pytree(grads)[0], np.array(differences)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("mode", bilevel.MODES)
def test_hypergradient_equals_central_differences(mode, num_steps, x64):
  gradient, differences = gradient_and_differences(
    make_look_ahead(mode, num_steps)
  )
  np.testing.assert_allclose(gradient, differences, rtol=1e-6)


@pytest.mark.parametrize("mode", bilevel.MODES)
def test_hypergradient_through_adamw(mode, x64):
  optimizer = optimizers.adamw(b1=0.9, b2=0.99, weight_decay=0.1)(0.05)
  gradient, differences = gradient_and_differences(
    make_look_ahead(mode, 2, optimizer), optimizer
  )
  np.testing.assert_allclose(gradient, differences, rtol=1e-5)


@pytest.mark.parametrize("dropped", [0, 1], ids=["hessian", "mixed"])
def test_without_one_of_its_products_it_does_not(dropped, x64, monkeypatch):
  """The tolerance above is tight enough to notice if a term is missing."""

  def incomplete(loss_fn, prepare):
    def drop(product_fn, along):
      products = list(product_fn(along))
      products[dropped] = jax.tree.map(jnp.zeros_like, products[dropped])
      return products

    def prepare_less(*args):
      *results, product_fn = prepare(*args)
      return *results, jax.tree_util.Partial(drop, product_fn)

    return _CUSTOM_GRADIENT(loss_fn, prepare_less)

  monkeypatch.setattr(bilevel, "_custom_gradient", incomplete)
  gradient, differences = gradient_and_differences(make_look_ahead("mixed", 2))
  assert np.max(np.abs(gradient / differences - 1)) > 1e-3


@pytest.mark.parametrize("mode", bilevel.MODES)
def test_rolled_equals_unrolled(mode, x64):
  one, _ = gradient_and_differences(make_look_ahead(mode, 3))
  other, _ = gradient_and_differences(make_look_ahead(mode, 3, rolled=True))
  np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize(
  "options", [{}, {"rolled": False}, {"segment_length": 2}]
)
@pytest.mark.parametrize("mode", bilevel.MODES)
def test_a_loss_may_close_over_traced_values(mode, options, x64):
  """Some of them are differentiated, and some are integers."""
  params, meta_params, model_state, batch = problem()
  state = types.InnerState(params, sgd().init(params), model_state)

  @jax.jit
  def loss_after(meta_params, scale, batch):
    def loss_fn(params, _, model_state, __):
      loss, model_state = inner_loss(params, meta_params, model_state, batch)
      return scale * loss, model_state

    step = jax.jit(bilevel.make_inner_step(loss_fn, sgd(), mode=mode))
    ahead, _ = bilevel.unroll(step, state, None, None, num_steps=4, **options)
    return outer_loss(ahead.params, meta_params, ahead.model_state, batch)[0]

  test_util.check_grads(
    lambda *learned: loss_after(*learned, batch),
    (meta_params, 1.5),
    order=1,
    modes=["rev"],
  )
  both = jax.grad(loss_after, argnums=(0, 1))(meta_params, 1.5, batch)
  alone = jax.grad(loss_after)(meta_params, 1.5, batch)
  chex.assert_trees_all_close(alone, both[0], rtol=1e-12)


@pytest.mark.parametrize("mode", ["mixed", "linearized"])
def test_the_hypergradient_is_differentiable(mode, x64):
  params, meta_params, model_state, batch = problem()
  state = types.InnerState(params, sgd().init(params), model_state)
  look_ahead = make_look_ahead(mode, 3, rolled=True)

  @jax.jit
  def square(meta_params):
    _, grads = bilevel.hypergradient(
      look_ahead, outer_loss, state, meta_params, batch
    )
    return optax.tree.norm(grads, squared=True)

  test_util.check_grads(square, (meta_params,), order=1, modes=["rev"])


@pytest.mark.parametrize(
  "optimizer",
  [
    optax.adam(0.1, eps_root=1e-8),
    optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3, nesterov=True)),
  ],
  ids=["adam", "clipped"],
)
@pytest.mark.parametrize("mode", bilevel.MODES)
def test_any_differentiable_optimizer(mode, optimizer, x64):
  gradient, differences = gradient_and_differences(
    make_look_ahead(mode, 2, optimizer), optimizer
  )
  np.testing.assert_allclose(gradient, differences, rtol=1e-5)


@pytest.mark.parametrize(
  "optimizer",
  [
    optax.adam(0.1),
    optax.radam(0.1),
    optax.multi_transform(
      {"one": optax.sgd(0.1), "other": optax.adam(0.1)},
      {"w1": "one", "b1": "one", "scale": "one", "w2": "other"},
    ),
    optax.stateless(lambda grads, _: jax.tree.map(lambda x: x / abs(x), grads)),
  ],
  ids=["adam", "radam", "one_of_two", "nan"],
)
def test_optimizers_without_a_slope_are_refused(optimizer):
  params, meta_params, model_state, batch = problem()
  step = bilevel.make_inner_step(inner_loss, optimizer)
  state = types.InnerState(params, optimizer.init(params), model_state)
  with pytest.raises(errors.InputError, match="eps_root=1e-24"):
    step(state, meta_params, batch)


def only_on_large_arrays():
  scale = jnp.ones((NUM_IN, NUM_HIDDEN))
  return optax.stateless(
    lambda grads, params: grads | {"w1": scale * grads["w1"]}
  )


@pytest.mark.parametrize(
  "optimizer",
  [optax.sm3(0.1), optax.contrib.muon(0.1, eps=1e-3), only_on_large_arrays()],
  ids=["sm3", "muon", "only_on_large_arrays"],
)
def test_optimizers_with_a_slope_are_not_refused(optimizer):
  params = {"w1": jnp.ones((NUM_IN, NUM_HIDDEN)), "w2": jnp.ones((2, 1))}
  bilevel.check_differentiable(optimizer, params)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_optimizers_of_single_numbers(shape):
  params = {"a": jnp.ones(shape), "b": jnp.ones(shape)}
  clip = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
  bilevel.check_differentiable(clip, params)
  bilevel.check_differentiable(clip, params["a"])
  with pytest.raises(errors.InputError, match="eps_root=1e-24"):
    bilevel.check_differentiable(optax.adam(0.1), params)


@pytest.mark.parametrize(
  ("make_optimizer", "message"),
  [
    (optax.adam, "eps_root=1e-24"),
    (optax.lion, "do not change with the gradient's size"),
    (functools.partial(optax.adam, eps_root=1e-24), None),
  ],
)
def test_a_learned_rate_does_not_hide_an_optimizer_without_a_slope(
  make_optimizer, message
):
  params, meta_params, model_state, batch = problem()

  def look_ahead(state, log_rate, batch):
    optimizer = make_optimizer(jnp.exp(log_rate))
    step = bilevel.make_inner_step(inner_loss, optimizer)
    state = state._replace(opt_state=optimizer.init(state.params))
    return step(state, meta_params, batch)[0]

  gradient = lambda log_rate: bilevel.hypergradient(
    look_ahead,
    lambda params, _, *others: inner_loss(params, meta_params, *others),
    types.InnerState(params, None, model_state),
    log_rate,
    batch,
  )
  refused = pytest.raises(errors.InputError, match=message)
  with refused if message else contextlib.nullcontext():
    jax.eval_shape(gradient, jnp.array(-2.0))


@pytest.mark.parametrize("mode", ["linearized", "mixed"])
def test_integers_among_meta_parameters(mode):
  """They would end in an error of JAX that does not name them."""

  def loss_fn(params, meta_params, model_state, batch):
    return meta_params["rate"] * params**2 * meta_params["count"], model_state

  step = bilevel.make_inner_step(loss_fn, optax.sgd(0.1), mode=mode)
  state = types.InnerState(jnp.array(2.0), optax.sgd(0.1).init(0.0), None)

  def loss(rate):
    meta_params = {"rate": rate, "count": jnp.array(2)}
    return bilevel.unroll(step, state, meta_params, None, num_steps=2)[0].params

  with pytest.raises(errors.InputError, match="int32 at count; put it into"):
    jax.grad(loss)(1.0)


def test_adam_is_refused_in_training_too():
  """Although the learning rate is traced there."""
  state, source, pairs, target_taps = small_setup.create()
  opt_state = optax.adam(0.1).init(state.inner.params)
  state = state._replace(inner=state.inner._replace(opt_state=opt_state))
  train_step = small_setup.make_train_step(
    "l2t_ww", pairs, target_taps, optimizer_fn=optax.adam
  )
  with pytest.raises(errors.InputError, match="eps_root=1e-24"):
    jax.eval_shape(train_step, state, source, small_setup.batch(4))


def test_losses_keep_their_dtype(x64):
  loss_fn = lambda params, *others: (params**2, others[1])
  step = bilevel.make_inner_step(loss_fn, sgd())
  one = jnp.float32(1)
  state = types.InnerState(one, sgd().init(one), None)
  for options in ({}, {"segment_length": 2}, {"differentiated_steps": 2}):
    _, losses = bilevel.unroll(step, state, one, None, num_steps=3, **options)
    assert losses.dtype == jnp.float32


def test_an_optimizer_is_checked_once_for_each_shape(monkeypatch):
  checked = []
  monkeypatch.setattr(
    bilevel,
    "check_differentiable",
    lambda optimizer, params: checked.append(params["w"].shape),
  )
  loss = lambda params, *rest: (jnp.sum(params["w"] ** 2), rest[1])
  step = bilevel.make_inner_step(loss, sgd())
  for size in (2, 3):
    params = {"w": jnp.ones(size)}
    state = types.InnerState(params, sgd().init(params), None)
    for _ in range(3):
      state, _ = step(state, jnp.ones(()), None)
  assert checked == [(2,), (3,)]


def test_it_needs_no_flax():
  program = "import sys; from l2t_jax.method import bilevel, transfer; "
  program += "sys.exit('flax' in sys.modules)"
  assert small_runs.run_python("-c", program).returncode == 0


def test_unknown_mode_is_refused():
  with pytest.raises(errors.InputError, match="'forward'; use one of reverse"):
    bilevel.make_inner_step(inner_loss, sgd(), mode="forward")


@pytest.mark.parametrize("rolled", [False, True])
def test_one_batch_per_step(rolled, x64):
  """Stacked batches give the same as single steps on each of them."""
  params, meta_params, model_state, (images, labels) = problem()
  state = types.InnerState(params, sgd().init(params), model_state)
  step = bilevel.make_inner_step(inner_loss, sgd())
  batches = (jnp.stack([images, 2 * images]), jnp.stack([labels, 1 - labels]))
  end, losses = bilevel.unroll(step, state, meta_params, batches, rolled=rolled)
  one, loss_one = step(state, meta_params, (images, labels))
  two, loss_two = step(one, meta_params, (2 * images, 1 - labels))
  chex.assert_trees_all_close(end, two, rtol=1e-12)
  np.testing.assert_allclose(losses, [loss_one, loss_two], rtol=1e-12)


@pytest.mark.parametrize("mode", bilevel.MODES)
def test_batch_and_model_state_are_constants(mode):
  params, meta_params, model_state, (images, labels) = problem()
  state = types.InnerState(params, sgd().init(params), model_state)
  step = bilevel.make_inner_step(inner_loss, sgd(), mode=mode)

  def end(images, running):
    start = state._replace(model_state=running)
    after, loss = step(start, meta_params, (images, labels))
    # The loss and the new model_state are metrics, not differentiated.
    return sum(jnp.sum(x) for x in jax.tree.leaves((after, loss)))

  grads = jax.grad(end, argnums=(0, 1))(images, model_state)
  chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


def test_mixed_keeps_no_more_than_the_inputs_of_a_step():
  params, meta_params, model_state, batch = problem()
  state = types.InnerState(params, sgd().init(params), model_state)

  def kept(mode):
    step = bilevel.make_inner_step(inner_loss, sgd(), mode=mode)
    end = lambda meta_params: step(state, meta_params, batch)[0].params
    _, pullback = jax.vjp(end, meta_params)
    return sum(np.size(leaf) for leaf in jax.tree.leaves(pullback))

  inputs = sum(
    np.size(x)
    for x in jax.tree.leaves((params, meta_params, model_state, batch))
  )
  assert kept("mixed") <= 2 * inputs < kept("reverse")
