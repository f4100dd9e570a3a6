"""Long, bounded and stationary inner loops, and the check of hypergradients."""

import functools

import chex
import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import errors, types
from l2t_jax.method import bilevel, hypergradient_check, implicit
from tests.support import small_runs

NUM_STEPS = 7


def _hypergradient(mode="linearized", *, forward=False, **options):
  """Differentiate 7 steps with momentum, from a state that has moved."""
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  optimizer = optax.sgd(0.1, momentum=0.9)
  step = bilevel.make_inner_step(inner_loss, optimizer, mode=mode)
  state = state._replace(opt_state=optimizer.init(state.params))
  state, _ = step(state, meta_params, batch)
  options = {"num_steps": NUM_STEPS} | options
  look_ahead = lambda *start: bilevel.unroll(step, *start, **options)[0]
  _, grads = jax.jit(
    lambda meta_params: bilevel.hypergradient(
      look_ahead, outer_loss, state, meta_params, batch, forward=forward
    )
  )(meta_params)
  return flatten_util.ravel_pytree(grads)[0]


@pytest.mark.parametrize(
  "options",
  [
    {"mode": "linearized", "segment_length": 3},
    {"mode": "mixed", "segment_length": (4, 2)},
    {"mode": "reverse", "segment_length": 10},
    {"mode": "reverse", "forward": True},
    {"mode": "mixed", "differentiated_steps": NUM_STEPS},
  ],
  ids=["segments", "nested", "one_segment", "forward", "all_steps"],
)
def test_exact_ways_agree(options, x64):
  np.testing.assert_allclose(
    _hypergradient(**options), _hypergradient(), rtol=1e-12
  )


def test_truncation_comes_closer_with_more_steps(x64):
  exact = _hypergradient()
  distances = [
    np.linalg.norm(_hypergradient(differentiated_steps=k) - exact)
    for k in (1, 3, 6)
  ]
  assert distances == sorted(distances, reverse=True)
  assert distances[-1] > 1e-3 * np.linalg.norm(exact)
  # In segments, the same steps are differentiated.
  np.testing.assert_allclose(
    _hypergradient(differentiated_steps=3, segment_length=2),
    _hypergradient(differentiated_steps=3),
    rtol=1e-12,
  )


def test_losses_and_batches_of_cut_loops(x64):
  """Every step has its own batch and returns its loss, however it is cut."""
  (inner_loss, _), state, meta_params, batch = _ridge()
  step = bilevel.make_inner_step(inner_loss, optax.sgd(0.1))
  factors = jnp.linspace(0.5, 1.5, NUM_STEPS)
  batches = jax.tree.map(lambda x: jnp.stack([f * x for f in factors]), batch)
  unroll = functools.partial(bilevel.unroll, step, state, meta_params, batches)
  expected = unroll(rolled=False)
  in_numpy = functools.partial(
    bilevel.unroll, step, state, meta_params, jax.device_get(batches)
  )
  jax.tree.map(np.testing.assert_array_equal, in_numpy(), unroll())
  for options in (
    {"segment_length": 3},
    {"segment_length": (5, 2)},
    {"segment_length": (2, 2)},
    {"differentiated_steps": 2},
  ):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12),
      unroll(**options),
      expected,
    )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"segment_length": 0}, "segment_length is 0; it must be a whole number"),
    ({"segment_length": 2.5}, "segment_length is 2.5; it must be"),
    ({"num_steps": 0}, "num_steps is 0; it must be"),
    ({"num_steps": jnp.array(3)}, "num_steps is 3; it must be .* known before"),
    ({"segment_length": (4, -1)}, "segment_length is -1"),
    (
      {"segment_length": (2, 4)},
      r"segment_length is \(2, 4\); give the longest",
    ),
    ({"differentiated_steps": 0}, "differentiated_steps is 0"),
    ({"mode": "mixed", "forward": True}, "with mode='reverse'"),
  ],
)
def test_what_cannot_work(options, message):
  with pytest.raises(errors.InputError, match=message):
    _hypergradient(**options)


@pytest.mark.parametrize("mode", bilevel.MODES)
def test_early_steps_are_constant_in_closed_over_values(mode):
  """As they are in the meta-parameters that a loss gets as an argument."""
  optimizer = optax.sgd(0.1)
  state = types.InnerState(jnp.ones(3), optimizer.init(jnp.ones(3)), None)

  def end(learned, is_closed_over):
    def loss_fn(params, meta_params, model_state, batch):
      scale = learned if is_closed_over else meta_params
      return scale * jnp.sum(jnp.sin(params) ** 2), model_state

    step = bilevel.make_inner_step(loss_fn, optimizer, mode=mode)
    given = None if is_closed_over else learned
    ahead, _ = bilevel.unroll(
      step, state, given, None, num_steps=6, differentiated_steps=2
    )
    return jnp.sum(ahead.params)

  slopes = [jax.grad(end)(1.0, closed_over) for closed_over in (True, False)]
  np.testing.assert_allclose(*slopes, rtol=1e-6)


def test_forward_mode_keeps_the_dtype_of_meta_params():
  meta_params = jnp.array(0.5, jnp.bfloat16)
  loss_fn = lambda params, meta_params, *_: (meta_params * params**2, None)
  step = bilevel.make_inner_step(loss_fn, optax.sgd(0.125), mode="reverse")
  state = types.InnerState(jnp.ones(()), optax.sgd(0.125).init(1.0), None)
  look_ahead = lambda *start: step(*start)[0]
  outer_loss = lambda params, *_: (params, None)
  _, slope = bilevel.hypergradient(
    look_ahead, outer_loss, state, meta_params, None, forward=True
  )
  assert slope.dtype == jnp.bfloat16
  assert slope == -0.25


def test_memory_of_a_long_loop_grows_slowly():
  """16 times as many steps need less than 2.5 times the memory."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)

  def loss_fn(params, meta_params, model_state, batch):
    hidden = jnp.tanh(jnp.tanh(batch @ params["w1"]) @ params["w2"])
    weights = jax.nn.sigmoid(meta_params)
    return jnp.mean(weights * jnp.sum(hidden**2, axis=-1)), model_state

  params = {"w1": jnp.ones((32, 64)) / 8, "w2": jnp.ones((64, 64)) / 8}
  optimizer = optax.sgd(0.1, momentum=0.9)
  state = types.InnerState(params, optimizer.init(params), None)
  step = bilevel.make_inner_step(loss_fn, optimizer)

  def memory(num_steps, segment_length):
    look_ahead = lambda *start: bilevel.unroll(
      step, *start, num_steps=num_steps, segment_length=segment_length
    )[0]
    gradient = jax.jit(
      lambda meta_params: bilevel.hypergradient(
        look_ahead, loss_fn, state, meta_params, x
      )
    )
    compiled = gradient.lower(jnp.zeros(64)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = memory(16, 4), memory(256, (64, 8))
  assert long < 2.5 * short
  assert memory(256, ()) > 4 * long


def _ridge():
  """Return (losses, state, meta_params, batch) of a ridge regression."""
  rng = np.random.default_rng(0)
  x, held_out = rng.normal(size=(2, 40, 6))
  solution = rng.normal(size=6)
  y = x @ solution + rng.normal(size=40)

  def inner_loss(params, meta_params, model_state, batch):
    x, y, *_ = batch
    penalty = jnp.sum(jnp.exp(meta_params["log_decay"]) * params**2)
    return jnp.mean((x @ params - y) ** 2) + penalty, model_state

  def outer_loss(params, meta_params, model_state, batch):
    *_, x, y = batch
    loss = jnp.mean((x @ params - y) ** 2)
    return loss + 0.1 * meta_params["offset"] ** 2, model_state

  state = types.InnerState(jnp.zeros(6), optax.sgd(0.1).init(0.0), None)
  meta_params = {"log_decay": jnp.linspace(-3.0, 0.0, 6), "offset": 2.0}
  batch = tuple(map(jnp.asarray, (x, y, held_out, held_out @ solution)))
  return (inner_loss, outer_loss), state, meta_params, batch


def _solve(state, meta_params, batch):
  """Minimise the inner loss in closed form: no derivative goes through it."""
  x, y, *_ = jax.lax.stop_gradient(batch)
  decay = jnp.diag(jnp.exp(jax.lax.stop_gradient(meta_params["log_decay"])))
  solution = jnp.linalg.solve(x.T @ x / len(y) + decay, x.T @ y / len(y))
  return state._replace(params=solution)


@pytest.mark.parametrize(
  "options",
  [{}, {"solver": "neumann", "scale": 0.2, "max_iterations": 1000}],
  ids=["cg", "neumann"],
)
def test_implicit_derivative_in_closed_form(options, x64):
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  look_ahead = implicit.at_stationary_point(
    _solve, inner_loss, tolerance=1e-12, **options
  )
  loss, grads = bilevel.hypergradient(
    look_ahead, outer_loss, state, meta_params, batch
  )

  def closed_form(meta_params):
    x, y, *_ = batch
    decay = jnp.diag(jnp.exp(meta_params["log_decay"]))
    solution = jnp.linalg.solve(x.T @ x / len(y) + decay, x.T @ y / len(y))
    return outer_loss(solution, meta_params, None, batch)[0]

  expected = jax.value_and_grad(closed_form)(meta_params)
  np.testing.assert_allclose(loss, expected[0], rtol=1e-12)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8),
    grads,
    expected[1],
  )


@pytest.mark.parametrize("transform", [lambda function: function, jax.jit])
def test_implicit_derivative_of_a_loop_and_a_loss_that_close_over(
  transform, x64
):
  """Over φ, over data, and over integers."""
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  options = {"tolerance": 1e-12}
  _, expected = bilevel.hypergradient(
    implicit.at_stationary_point(_solve, inner_loss, **options),
    outer_loss,
    state,
    meta_params,
    batch,
  )

  @transform
  def gradient(meta_params, batch, one):
    def look_ahead(state, meta_params, unused):
      loop = lambda state, *_: _solve(state, meta_params, batch)
      loss = lambda params, _, model_state, unused: inner_loss(
        params, jax.tree.map(lambda x: one * x, meta_params), model_state, batch
      )
      point = implicit.at_stationary_point(loop, loss, **options)
      return transform(point)(state, None, None)

    closed_outer_loss = lambda *args: outer_loss(*args[:3], batch)
    return bilevel.hypergradient(
      look_ahead, closed_outer_loss, state, meta_params, None
    )[1]

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8),
    gradient(meta_params, batch, 1),
    expected,
  )


def test_second_derivatives_of_an_implicit_derivative(x64):
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  point = implicit.at_stationary_point(_solve, inner_loss, tolerance=1e-12)
  gradient = lambda meta_params: bilevel.hypergradient(
    point, outer_loss, state, meta_params, batch
  )[1]

  def closed_form(meta_params):
    x, y, *_ = batch
    decay = jnp.diag(jnp.exp(meta_params["log_decay"]))
    solution = jnp.linalg.solve(x.T @ x / len(y) + decay, x.T @ y / len(y))
    return outer_loss(solution, meta_params, None, batch)[0]

  chex.assert_trees_all_close(
    jax.jacrev(gradient)(meta_params),
    jax.jacrev(jax.grad(closed_form))(meta_params),
    rtol=1e-7,
  )


def test_implicit_derivative_of_a_loop_outside_of_jax(x64):
  (inner_loss, outer_loss), *start = _ridge()

  def solve(state, meta_params, batch):
    x, y = map(np.asarray, batch[:2])
    decay = np.diag(np.exp(np.asarray(meta_params["log_decay"])))
    solution = np.linalg.solve(x.T @ x / len(y) + decay, x.T @ y / len(y))
    return state._replace(params=jnp.asarray(solution))

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
    *(
      bilevel.hypergradient(
        implicit.at_stationary_point(loop, inner_loss, tolerance=1e-12),
        outer_loss,
        *start,
      )
      for loop in (solve, _solve)
    ),
  )


def test_implicit_comes_closer_with_the_tolerance(x64):
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()

  def error(tolerance):
    look_ahead = implicit.at_stationary_point(
      _solve,
      inner_loss,
      solver="neumann",
      scale=0.05,
      tolerance=tolerance,
      max_iterations=1000,
    )
    comparison = hypergradient_check.check_hypergradient(
      look_ahead, outer_loss, state, meta_params, batch
    )
    return comparison.error

  errors_seen = [error(tolerance) for tolerance in (0.3, 1e-2, 1e-4)]
  assert errors_seen == sorted(errors_seen, reverse=True)
  assert errors_seen[0] > 1e-3 and errors_seen[-1] < 1e-3


def test_an_unsolved_system_gives_nan(x64):
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  for options in ({}, {"solver": "neumann", "scale": 0.05}):
    look_ahead = implicit.at_stationary_point(
      _solve, inner_loss, tolerance=1e-9, max_iterations=2, **options
    )
    _, grads = bilevel.hypergradient(
      look_ahead, outer_loss, state, meta_params, batch
    )
    assert np.isnan(grads["log_decay"]).all()
  with pytest.raises(errors.InputError, match="'lu'; use one of cg, neumann"):
    implicit.at_stationary_point(_solve, inner_loss, solver="lu")
  for options in ({"damping": -1.0}, {"tolerance": 0.0}, {"max_iterations": 0}):
    with pytest.raises(errors.InputError, match="damping 0 or more"):
      implicit.at_stationary_point(_solve, inner_loss, **options)


def test_a_loop_that_depends_on_the_data(x64):
  """It ends where the parameters are near 1, after 6 steps, for any bound."""
  loss_fn = lambda params, meta_params, model_state, batch: (
    meta_params * jnp.sum((params - 1) ** 2) / 2,
    model_state,
  )
  optimizer = optax.sgd(0.5)
  step = bilevel.make_inner_step(loss_fn, optimizer)
  far = lambda state: jnp.abs(state.params[0] - 1) > 0.02
  bounded = bilevel.only_while(step, far)
  state = types.InnerState(jnp.zeros(1), optimizer.init(jnp.zeros(1)), None)

  def end(step, num_steps, meta_params):
    after, losses = bilevel.unroll(
      step, state, meta_params, None, num_steps=num_steps
    )
    return after.params[0], losses

  grad = lambda *args: jax.jit(
    jax.value_and_grad(functools.partial(end, *args), has_aux=True)
  )(jnp.array(1.0))
  (expected, losses), slope = grad(step, 6)
  for num_steps in (9, 30):
    (seen, seen_losses), seen_slope = grad(bounded, num_steps)
    np.testing.assert_allclose(seen, expected, rtol=1e-12)
    np.testing.assert_allclose(seen_slope, slope, rtol=1e-12)
    np.testing.assert_allclose(seen_losses[:6], losses, rtol=1e-12)
    assert np.isnan(seen_losses[6:]).all()


def test_truncation_would_count_steps_that_are_not_taken():
  (inner_loss, _), state, meta_params, batch = _ridge()
  step = bilevel.make_inner_step(inner_loss, optax.sgd(0.1))
  bounded = bilevel.only_while(step, lambda state: state.params[0] < 1)
  with pytest.raises(errors.InputError, match="that only_while does not take"):
    bilevel.unroll(
      bounded, state, meta_params, batch, num_steps=8, differentiated_steps=2
    )


def test_tasks_under_vmap(x64):
  """One start for several tasks: the mean of their hypergradients."""
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  step = bilevel.make_inner_step(inner_loss, optax.sgd(0.1))
  look_ahead = lambda *start: bilevel.unroll(
    step, *start, num_steps=5, segment_length=2
  )[0]
  one = lambda batch: bilevel.hypergradient(
    look_ahead, outer_loss, state, meta_params, batch
  )
  tasks = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x + 1]), batch)
  together = jax.jit(jax.vmap(one))(tasks)
  for index in range(3):
    alone = one(jax.tree.map(lambda x: x[index], tasks))  # noqa: B023
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x[index], y, rtol=1e-10),  # noqa: B023
      together,
      alone,
    )


def test_the_check_names_what_is_wrong():
  """In float64, although the arguments are not."""
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  assert state.params.dtype == jnp.float32
  step = bilevel.make_inner_step(inner_loss, optax.sgd(0.1))
  check = lambda look_ahead: hypergradient_check.check_hypergradient(
    look_ahead, outer_loss, state, meta_params, batch, num_directions=3
  )
  right = check(lambda *start: bilevel.unroll(step, *start, num_steps=4)[0])
  assert right.dtype == "float64"
  assert right.error < 1e-7
  assert right.leaves == ("log_decay",) * 3 + ("offset",)
  wrong = check(
    lambda *start: bilevel.unroll(
      step, *start, num_steps=4, differentiated_steps=1
    )[0]
  )
  assert (wrong.errors[:3] > 1e-3).all() and (wrong.errors[3:] < 1e-7).all()
  assert str(wrong).splitlines()[1].startswith("  log_decay: ")


@pytest.mark.parametrize("wraps", ["result", "input"])
def test_the_check_knows_that_a_loss_rounds(wraps):
  """Differences of rounded values need longer steps."""

  def loss_fn(params, meta_params, model_state, batch):
    if wraps == "input":
      batch = batch.astype(jnp.float32).astype(params.dtype)
      params = params.astype(jnp.float32).astype(params.dtype)
    loss = jnp.sum((batch * params - meta_params) ** 2)
    return loss.astype(jnp.float32) if wraps == "result" else loss, model_state

  step = bilevel.make_inner_step(loss_fn, optax.sgd(0.1))
  comparison = hypergradient_check.check_hypergradient(
    lambda *start: bilevel.unroll(step, *start, num_steps=3)[0],
    loss_fn,
    types.InnerState(jnp.ones(3), optax.sgd(0.1).init(jnp.ones(3)), None),
    jnp.array(0.7),
    jnp.linspace(0.1, 1.3, 3),
  )
  assert "convert values to float32" in str(comparison)
  assert comparison.error < 1e-2


def test_the_check_allows_casts_that_do_not_round():
  """Of images, of masks, and within JAX's random numbers."""

  def loss_fn(params, meta_params, model_state, batch):
    images = batch["images"].astype(jnp.float32) / 255
    images += batch["floats"].astype(jnp.float32)
    mask = (batch["labels"] > 0).astype(jnp.float32)
    noise = jax.random.uniform(batch["key"], (3,), jnp.float32)
    return jnp.sum(mask * (images * params - noise * meta_params) ** 2), None

  step = bilevel.make_inner_step(loss_fn, optax.sgd(0.1))
  comparison = hypergradient_check.check_hypergradient(
    lambda *start: bilevel.unroll(step, *start, num_steps=4)[0],
    loss_fn,
    types.InnerState(jnp.ones(3), optax.sgd(0.1).init(jnp.ones(3)), None),
    jnp.array(0.7),
    {
      "images": jnp.arange(3, dtype=jnp.uint8),
      "floats": jnp.linspace(0.1, 1.3, 3),
      "labels": jnp.arange(3),
      "key": jax.random.key(0),
    },
  )
  assert comparison.dtype == "float64", str(comparison)
  assert comparison.error < 1e-5


def test_the_check_knows_a_derivative_of_zero():
  """A softmax does not change with a shift, but both sides are rounded."""
  rng = np.random.default_rng(0)

  def loss_fn(params, shift, model_state, batch):
    losses = jax.nn.log_softmax(batch @ params + 0.3 * shift)[:, 0]
    return -jnp.mean(losses), model_state

  step = bilevel.make_inner_step(loss_fn, optax.sgd(0.1))
  params = jnp.asarray(rng.normal(size=(5, 3)))
  comparison = hypergradient_check.check_hypergradient(
    lambda *start: bilevel.unroll(step, *start, num_steps=2)[0],
    loss_fn,
    types.InnerState(params, optax.sgd(0.1).init(params), None),
    jnp.array(0.7),
    jnp.asarray(rng.normal(size=(8, 5))),
  )
  assert comparison.derivatives[0] != comparison.differences[0]
  assert comparison.error == 0


def test_a_look_ahead_with_a_default_argument():
  (inner_loss, outer_loss), *start = _ridge()
  solve = lambda state, meta_params, batch, unused=3: _solve(
    state, meta_params, batch
  )
  of = lambda look_ahead: bilevel.hypergradient(
    implicit.at_stationary_point(look_ahead, inner_loss), outer_loss, *start
  )
  jax.tree.map(np.testing.assert_array_equal, of(solve), of(_solve))


@pytest.mark.parametrize("options", [{"num_directions": 0}, {"epsilon": 0.0}])
def test_a_check_of_nothing(options):
  (inner_loss, outer_loss), *arguments = _ridge()
  step = bilevel.make_inner_step(inner_loss, optax.sgd(0.1))
  look_ahead = lambda *start: bilevel.unroll(step, *start, num_steps=2)[0]
  with pytest.raises(
    errors.InputError, match="at least 1, and above 0 or None"
  ):
    hypergradient_check.check_hypergradient(
      look_ahead, outer_loss, *arguments, **options
    )


def test_a_look_ahead_that_returns_the_losses_too():
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  step = bilevel.make_inner_step(inner_loss, optax.sgd(0.1))
  look_ahead = lambda *start: bilevel.unroll(step, *start, num_steps=2)
  with pytest.raises(errors.InputError, match="the first of what `unroll`"):
    bilevel.hypergradient(look_ahead, outer_loss, state, meta_params, batch)


def test_the_check_of_functions_in_float32():
  (inner_loss, outer_loss), state, meta_params, batch = _ridge()
  step = bilevel.make_inner_step(inner_loss, optax.sgd(0.1))

  def look_ahead(state, meta_params, batch):
    if state.params.dtype != jnp.float32:
      raise TypeError("not in this type")
    return bilevel.unroll(step, state, meta_params, batch, num_steps=4)[0]

  comparison = hypergradient_check.check_hypergradient(
    look_ahead, outer_loss, state, meta_params, batch
  )
  assert comparison.dtype == "float32"
  assert "TypeError: not in this type" in str(comparison)
  assert comparison.error < 1e-2


def test_it_needs_nothing_but_jax_and_optax():
  """The library may be copied out of this package."""
  program = """
import sys
from l2t_jax.method import bilevel, hypergradient_check, implicit
own = {name for name in sys.modules if name.startswith("l2t_jax")}
print(sorted(own), "flax" in sys.modules)
"""
  result = small_runs.run_python("-c", program)
  assert result.stdout.strip() == (
    "['l2t_jax', 'l2t_jax.errors', 'l2t_jax.method',"
    " 'l2t_jax.method.bilevel', 'l2t_jax.method.hypergradient_check',"
    " 'l2t_jax.method.implicit', 'l2t_jax.types'] False"
  )
