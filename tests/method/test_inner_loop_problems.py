"""Inner loops over modules, optax chains and meshes, and what is refused."""

import equinox
from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import errors, types
from l2t_jax.method import bilevel, hypergradient_check
from tests.support import small_runs

NUM_IN, NUM_HIDDEN, NUM_OUT, NUM_EXAMPLES = 3, 4, 2, 8


def _linen():
  class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
      x = linen.Dense(NUM_HIDDEN, name="hidden")(x)
      x = linen.BatchNorm(use_running_average=False, name="norm")(x)
      return linen.Dense(NUM_OUT, name="logits")(jnp.tanh(x))

  network = Network()
  variables = network.init(jax.random.key(0), jnp.zeros((2, NUM_IN)))

  def apply(params, statistics, x):
    logits, new = network.apply(
      {"params": params, "batch_stats": statistics}, x, mutable="batch_stats"
    )
    return logits, new["batch_stats"]

  return apply, variables["params"], variables["batch_stats"]


def _nnx():
  class Network(nnx.Module):
    def __init__(self, rngs):
      self.hidden = nnx.Linear(NUM_IN, NUM_HIDDEN, rngs=rngs)
      self.norm = nnx.BatchNorm(NUM_HIDDEN, rngs=rngs)
      self.logits = nnx.Linear(NUM_HIDDEN, NUM_OUT, rngs=rngs)

    def __call__(self, x):
      return self.logits(jnp.tanh(self.norm(self.hidden(x))))

  graph, params, others = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

  def apply(params, others, x):
    network = nnx.merge(graph, params, others, copy=True)
    return network(x), nnx.split(network, nnx.Param, ...)[2]

  return apply, params, others


def _equinox():
  network = equinox.nn.MLP(
    NUM_IN, NUM_OUT, NUM_HIDDEN, 1, activation=jnp.tanh, key=jax.random.key(0)
  )
  params, static = equinox.partition(network, equinox.is_inexact_array)

  def apply(params, model_state, x):
    return jax.vmap(equinox.combine(params, static))(x), model_state

  return apply, params, None


def _pytree():
  rng = np.random.default_rng(0)
  params = {
    "w": jnp.asarray(rng.standard_normal((NUM_IN, NUM_OUT)), jnp.float32),
    "b": jnp.zeros(NUM_OUT),
  }
  apply = lambda params, model_state, x: (
    x @ params["w"] + params["b"],
    model_state,
  )
  return apply, params, None


def _problem(make_network, optimizer, mode="linearized"):
  """Return the arguments of `hypergradient`; φ weighs the examples."""
  apply, params, model_state = make_network()
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.standard_normal((2, NUM_EXAMPLES, NUM_IN)), jnp.float32)
  y = jnp.asarray(rng.integers(0, NUM_OUT, (2, NUM_EXAMPLES)))

  def inner_loss(params, meta_params, model_state, batch):
    (x, _), (y, _) = batch
    logits, model_state = apply(params, model_state, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(jax.nn.sigmoid(meta_params) * losses), model_state

  def outer_loss(params, meta_params, model_state, batch):
    del meta_params
    (_, x), (_, y) = batch
    logits, model_state = apply(params, model_state, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(losses), model_state

  step = bilevel.make_inner_step(inner_loss, optimizer, mode=mode)
  look_ahead = lambda *start: bilevel.unroll(step, *start, num_steps=3)[0]
  state = types.InnerState(params, optimizer.init(params), model_state)
  return look_ahead, outer_loss, state, jnp.zeros(NUM_EXAMPLES), (x, y)


def _check(*problem):
  """Compare with central differences; the derivative is not 0."""
  comparison = hypergradient_check.check_hypergradient(*problem)
  assert comparison.error < (1e-2 if comparison.reason else 1e-5), comparison
  assert np.abs(comparison.derivatives).min() > 1e-6
  return comparison


@pytest.mark.parametrize("make_network", [_linen, _nnx, _equinox])
def test_modules(make_network):
  """A module's arrays are params and model_state; its loss puts it together."""
  problem = _problem(make_network, optax.sgd(0.3, momentum=0.9))
  assert _check(*problem).dtype == "float64"


_WARM_UP = optax.warmup_cosine_decay_schedule(0.1, 0.5, 1, 4)
_CHAINS = {
  "schedule": optax.sgd(_WARM_UP, momentum=0.9),
  "mask": optax.chain(
    optax.add_decayed_weights(0.1, mask={"w": True, "b": False}), optax.sgd(0.3)
  ),
  "mask_function": optax.adamw(
    0.1, eps_root=1e-8, mask=lambda params: jax.tree.map(jnp.ndim, params)
  ),
  "inject_hyperparams": optax.inject_hyperparams(optax.sgd)(_WARM_UP, 0.9),
  "frozen_part": optax.multi_transform(
    {"learned": optax.sgd(0.3), "frozen": optax.set_to_zero()},
    {"w": "learned", "b": "frozen"},
  ),
  "clipped_adam": optax.chain(
    optax.clip_by_global_norm(0.1), optax.adam(0.1, eps_root=1e-8)
  ),
  "every_second_step": optax.MultiSteps(optax.sgd(0.3), 2),
}


@pytest.mark.parametrize("optimizer", _CHAINS.values(), ids=_CHAINS)
def test_optax_chains(optimizer, x64):
  _check(*_problem(_pytree, optimizer))


def test_a_rate_in_the_state_of_the_optimizer(x64):
  """What inject_hyperparams keeps in opt_state may be a meta-parameter."""
  optimizer = optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)
  unrolled, outer_loss, state, weights, batch = _problem(_pytree, optimizer)

  def look_ahead(state, meta_params, batch):
    hyperparams = state.opt_state.hyperparams | {
      "learning_rate": jnp.exp(meta_params["log_rate"])
    }
    opt_state = state.opt_state._replace(hyperparams=hyperparams)
    return unrolled(
      state._replace(opt_state=opt_state), meta_params["weights"], batch
    )

  meta_params = {"log_rate": jnp.array(-1.0), "weights": weights}
  _check(look_ahead, outer_loss, state, meta_params, batch)


def test_batches_over_a_mesh():
  """Four devices that share a batch compute what one does."""
  program = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from l2t_jax import types
from l2t_jax.method import bilevel
from tests.method import test_inner_loop_problems as problems

*_, state, meta_params, batch = problems._problem(problems._linen, optax.sgd(1))
mesh = jax.make_mesh((4,), ("batch",))
shard = lambda x, *axes: jax.device_put(
  x, NamedSharding(mesh, PartitionSpec(*axes))
)
replicate = lambda tree: jax.tree.map(shard, tree)
for mode in ("linearized", "mixed"):
  look_ahead, outer_loss, *_ = problems._problem(
    problems._linen, optax.sgd(1), mode
  )
  gradient = jax.jit(
    lambda *arguments: bilevel.hypergradient(look_ahead, outer_loss, *arguments)
  )
  alone = gradient(state, meta_params, batch)
  shared = gradient(
    replicate(state),
    shard(meta_params, "batch"),
    jax.tree.map(lambda x: shard(x, None, "batch"), batch),
  )
  assert len(shared[1].sharding.device_set) == 4
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), shared, alone
  )

# The devices run programs of their own and average their losses.
sgd = optax.sgd(0.1)
params = np.array([1.0, 2.0])
x = np.arange(8.0).reshape(4, 2)
state = types.InnerState(params, sgd.init(params), None)


def gradient(mode, mean):
  def loss_fn(params, meta_params, model_state, batch):
    outputs = jax.numpy.sin(meta_params * batch @ params)
    return mean(jax.numpy.mean(outputs**2)), model_state

  step = bilevel.make_inner_step(loss_fn, sgd, mode=mode)
  look_ahead = lambda *start: bilevel.unroll(step, *start, num_steps=2)[0]
  return lambda meta_params, batch: bilevel.hypergradient(
    look_ahead, loss_fn, state, meta_params, batch
  )


for mode in bilevel.MODES:
  own_programs = jax.shard_map(
    gradient(mode, lambda loss: jax.lax.pmean(loss, "batch")),
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec("batch")),
    out_specs=PartitionSpec(),
  )
  np.testing.assert_allclose(
    jax.jit(own_programs)(np.array([0.1, 0.2]), shard(x, "batch"))[1],
    jax.jit(gradient(mode, lambda loss: loss))(np.array([0.1, 0.2]), x)[1],
    rtol=1e-12,
  )
"""
  result = small_runs.run_python("-c", program)
  assert result.returncode == 0, result.stderr[-2000:]


_WITHOUT_STATE = lambda params, *_: jnp.sum(params["w"])


@pytest.mark.parametrize(
  ("loss_fn", "change", "message"),
  [
    (_WITHOUT_STATE, {}, r"returned 1 value.* must return \(loss, model_s"),
    (lambda *args: (1.0, None, 2), {}, "returned 3 values"),
    (lambda *args: (None, 1.0), {}, "a loss that is not a scalar"),
    (lambda *args: (jnp.ones(1), None), {}, "a loss that is not a scalar"),
    (lambda *args: (1.0, 2.0), {}, "a model_state of another structure"),
    (
      None,
      {"opt_state": optax.adam(0.1).init({"w": 1.0})},
      r"start with optimizer.init\(params\)",
    ),
    (
      None,
      {"opt_state": optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(3)})},
      r"start with optimizer.init\(params\)",
    ),
    (
      None,
      {"params": {"w": jnp.ones(2), "activation": jnp.tanh}},
      "at activation; only arrays of floating-point numbers",
    ),
    (None, {"params": jnp.arange(3)}, "has int32 at its root"),
  ],
  ids=[
    "no_model_state",
    "three_values",
    "swapped",
    "vector",
    "new_model_state",
    "opt_state",
    "opt_state_of_other_shapes",
    "function",
    "integers",
  ],
)
def test_states_and_losses_that_do_not_fit(loss_fn, change, message):
  loss_fn = loss_fn or (
    lambda params, meta_params, model_state, batch: (0.0, model_state)
  )
  optimizer = optax.sgd(0.1, momentum=0.9)
  step = bilevel.make_inner_step(loss_fn, optimizer)
  params = {"w": jnp.ones(2)}
  state = types.InnerState(params, optimizer.init(params), None)
  with pytest.raises(errors.InputError, match=message):
    step(state._replace(**change), jnp.zeros(()), None)


def test_an_outer_loss_without_model_state():
  look_ahead, _, *arguments = _problem(_pytree, optax.sgd(0.1))
  with pytest.raises(errors.InputError, match="must return"):
    bilevel.hypergradient(look_ahead, _WITHOUT_STATE, *arguments)


@pytest.mark.parametrize(
  "optimizer", [optax.lion(0.1), optax.sign_sgd(0.1)], ids=["lion", "sign_sgd"]
)
def test_updates_that_are_signs(optimizer):
  """Their derivative is 0, and nothing would be learned without a word."""
  problem = _problem(_pytree, optimizer)
  with pytest.raises(errors.InputError, match="hypergradient would be 0"):
    bilevel.hypergradient(*problem)


def test_a_schedule_that_starts_at_zero():
  """No update in the first step is no sign."""
  _check(*_problem(_pytree, optax.sgd(lambda count: 0.1 * count)))


@pytest.mark.parametrize(
  "batches",
  [(jnp.ones((2, 3)), jnp.ones((4, 3))), (jnp.ones(2), 1.0), jnp.ones((0, 3))],
)
def test_batches_without_a_common_axis(batches):
  step = lambda state, meta_params, batch: (state, 0.0)
  with pytest.raises(errors.InputError, match="axis of at least one step; if"):
    bilevel.unroll(step, None, None, batches)


@pytest.mark.parametrize(
  "optimizer", [optax.lbfgs(), optax.polyak_sgd()], ids=["lbfgs", "polyak_sgd"]
)
def test_optimizers_that_need_the_loss(optimizer):
  with pytest.raises(errors.InputError, match="needs more than gradients"):
    bilevel.hypergradient(*_problem(_pytree, optimizer))


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(
  ("meta_params", "message"),
  [
    ({"count": 3}, "meta_params has int at count"),
    ({"w": jnp.ones(2, jnp.complex64)}, "has complex64 at w"),
    ({}, "has no arrays"),
  ],
)
def test_meta_params_without_a_derivative(meta_params, message, forward):
  look_ahead, outer_loss, state, _, batch = _problem(_pytree, optax.sgd(0.1))
  with pytest.raises(errors.InputError, match=message):
    bilevel.hypergradient(
      look_ahead, outer_loss, state, meta_params, batch, forward=forward
    )


def test_a_condition_that_is_no_bool():
  *_, state, meta_params, batch = _problem(_pytree, optax.sgd(0.1))
  step = lambda state, meta_params, batch: (state, jnp.zeros(()))
  bounded = bilevel.only_while(step, lambda state: jnp.ones(1))
  with pytest.raises(
    errors.InputError, match=r"returned float32 \[1\]; it must"
  ):
    bounded(state, meta_params, batch)
