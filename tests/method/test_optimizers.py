"""Optimizers and schedules, against PyTorch, optax and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import errors
from l2t_jax.method import optimizers


def without_arguments():
  """Return what is no optimizer of a learning rate."""


def no_optimizer(learning_rate):
  """Return what is no optax transformation."""
  return learning_rate


def lion(learning_rate):
  """Return an optimizer of one's own."""
  return optax.lion(learning_rate)


def _params():
  rng = np.random.default_rng(0)
  return {
    "dense": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
    "norm": {"scale": rng.normal(size=2)},
    "stacked": {"bias": rng.normal(size=(4, 2)), "weight": np.ones((2, 2))},
  }


def _run(optimizer_fn, gradients, rates):
  """Return the parameters after some updates."""
  params = jax.tree.map(jnp.asarray, _params())
  state = optimizer_fn(0.0).init(params)
  for grads, rate in zip(gradients, rates, strict=True):
    updates, state = optimizer_fn(rate).update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _gradients(count=20):
  rng = np.random.default_rng(1)
  draw = lambda x: rng.normal(size=np.shape(x))
  return [jax.tree.map(draw, _params()) for _ in range(count)]


@pytest.mark.parametrize("decayed", optimizers.DECAYED)
@pytest.mark.parametrize("name", optimizers.NAMES)
def test_optimizers_are_those_of_pytorch(name, decayed, x64):
  torch = pytest.importorskip("torch")
  gradients, rates = _gradients(), 0.01 + 0.001 * np.arange(20)
  seen = _run(
    optimizers.make(
      name, momentum=0.9, b2=0.99, weight_decay=0.1, decayed=decayed
    ),
    gradients,
    rates,
  )
  leaves, treedef = jax.tree.flatten(_params())
  decays = [
    decayed == "all" or part
    for part in jax.tree.leaves(
      {
        "dense": {"kernel": True, "bias": False},
        "norm": {"scale": False},
        "stacked": {"bias": False, "weight": True},
      }
    )
  ]
  tensors = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in leaves]
  groups = [
    {"params": [tensor], "weight_decay": 0.1 if part else 0.0}
    for tensor, part in zip(tensors, decays, strict=True)
  ]
  if name == "sgd":
    optimizer = torch.optim.SGD(groups, momentum=0.9)
  else:
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
  for grads, rate in zip(gradients, rates, strict=True):
    for group in optimizer.param_groups:
      group["lr"] = rate
    for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
      tensor.grad = torch.tensor(grad)
    optimizer.step()
  expected = treedef.unflatten([tensor.detach().numpy() for tensor in tensors])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), seen, expected
  )


def test_adamw_takes_pytorchs_steps_where_gradients_are_tiny(x64):
  """As those of a ConvNeXt are, behind a layer scale of 1e-6."""
  torch = pytest.importorskip("torch")
  grads = 10.0 ** -np.arange(5, 12)
  optimizer = optimizers.adamw(b1=0.9, b2=0.999, weight_decay=0.0)(1.0)
  seen, _ = optimizer.update(
    jnp.array(grads), optimizer.init(jnp.zeros(7)), jnp.zeros(7)
  )
  tensor = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
  tensor.grad = torch.tensor(grads)
  torch.optim.AdamW([tensor], lr=1.0, weight_decay=0.0).step()
  np.testing.assert_allclose(seen, tensor.detach().numpy(), rtol=1e-4)


def test_adamw_differs_from_optax_only_at_0():
  optimizer = optimizers.adamw(b1=0.9, b2=0.999, weight_decay=0.1)
  usual = lambda rate: optax.adamw(rate, weight_decay=0.1)
  rates = [0.01] * 20
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
    _run(optimizer, _gradients(), rates),
    _run(usual, _gradients(), rates),
  )

  def updated(make):
    state = make(0.1).init(jnp.zeros(1))
    return jax.jacobian(lambda g: make(0.1).update(g, state, jnp.zeros(1))[0])

  assert not np.isfinite(updated(usual)(jnp.zeros(1))).all()
  assert np.isfinite(updated(optimizer)(jnp.zeros(1))).all()


def test_an_optimizer_of_ones_own_is_clipped():
  optimizer_fn = optimizers.make(
    f"{__name__}:lion", momentum=0.9, b2=0.9, weight_decay=9.0, clip_norm=1e-9
  )
  seen = _run(optimizer_fn, _gradients(1), [0.1])
  expected = _run(lion, _gradients(1), [0.1])
  jax.tree.map(np.testing.assert_array_equal, seen, expected)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("adam", "unknown optimizer 'adam'; it must be one of sgd, adamw, or"),
    ("optax:nothing", "cannot import the optimizer 'optax:nothing'"),
    (f"{__name__}:without_arguments", "cannot be made of a learning rate"),
    (f"{__name__}:no_optimizer", "returns a float; it must return an optax"),
    (optax.adamw, "optimizer.name is of type function; it must be a"),
  ],
)
def test_what_is_no_optimizer(name, message):
  with pytest.raises(errors.InputError, match=message):
    optimizers.make(name, momentum=0.9, b2=0.9, weight_decay=0.0)


def noisy(learning_rate):
  """Return an optimizer whose state cannot be saved."""
  return optax.noisy_sgd(learning_rate)


def untraced(learning_rate):
  """Return an optimizer of a rate that has a value."""
  return optax.sgd(float(learning_rate))


def larger_arrays(learning_rate):
  """Return an optimizer that refuses small arrays."""
  scale = jnp.ones((3, 2))
  return optax.chain(
    optax.stateless(
      lambda grads, params: (
        grads | {"dense": {"kernel": scale * grads["dense"]["kernel"]}}
      )
    ),
    optax.sgd(learning_rate),
  )


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("noisy", "keeps a random key in its state"),
    ("untraced", "at a traced learning rate: Concretization"),
  ],
)
def test_optimizers_that_cannot_train_are_refused(name, message):
  params = jax.tree.map(jnp.asarray, _params())
  with pytest.raises(errors.InputError, match=message):
    optimizers.check(globals()[name], params)


def test_optimizers_that_can_train_are_not_refused():
  params = jax.tree.map(jnp.asarray, _params())
  for optimizer_fn in (lion, larger_arrays, optax.contrib.muon):
    optimizers.check(optimizer_fn, params)


def test_a_short_schedule_of_steps_has_both():
  """After a warm-up, the epochs that are left need not be whole."""
  rate = optimizers.make_schedule(
    "step", 1.0, epochs=4, steps_per_epoch=4, warmup_steps=6
  )
  np.testing.assert_allclose(rate(15), 0.01, rtol=1e-6)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_warm_up_comes_before_the_schedule(name):
  make = lambda epochs, **warmup: optimizers.make_schedule(
    name, 0.2, epochs=epochs, steps_per_epoch=3, **warmup
  )
  rates = [float(make(6, warmup_steps=6)(step)) for step in range(18)]
  np.testing.assert_allclose(rates[:6], 0.2 * np.arange(1, 7) / 6, rtol=1e-6)
  np.testing.assert_allclose(
    rates[6:], [make(4)(step) for step in range(12)], rtol=1e-6
  )
  joined = optax.join_schedules(
    [lambda step: 0.2 * (step + 1) / 4, make(6 - 4 / 3)], [4]
  )
  traced = jax.jit(make(6, warmup_steps=4))
  np.testing.assert_allclose(
    [traced(step) for step in range(18)],
    [joined(step) for step in range(18)],
    rtol=1e-6,
  )


def test_clipping(x64):
  """As in optax if gradients are large, and differentiable at 0."""
  clip = optimizers.clip_by_global_norm(2.0)
  apply = lambda grads: clip.update(grads, clip.init(grads))[0]
  grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
  np.testing.assert_allclose(apply(grads)["a"], [1.2, 0.0])
  np.testing.assert_allclose(apply(grads)["b"], 1.6)
  small = {"a": jnp.array([0.3, 0.0]), "b": jnp.array(0.4)}
  jax.tree.map(np.testing.assert_array_equal, apply(small), small)
  zero = jnp.zeros(3)
  np.testing.assert_array_equal(jax.jacobian(apply)(zero), np.eye(3))
