"""Shared by the meta-training examples: a network, digits and the meta-loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import l2t_jax as l2t
from l2t_jax.method import loss_functions


def init(key, sizes):
  """Return parameters of a multilayer perceptron, a list of (w, b)."""
  keys = jax.random.split(key, len(sizes) - 1)
  # He initialisation.
  return [
    (jax.random.normal(key, (n, m)) * np.sqrt(2 / n), jnp.zeros(m))
    for key, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
  ]


def logits_of(params, x):
  *hidden, (w, b) = params
  for w_k, b_k in hidden:
    x = jax.nn.relu(x @ w_k + b_k)
  return x @ w + b


def cross_entropy(params, data):
  x, y = data
  return loss_functions.cross_entropy(logits_of(params, x), y)


def loss_on(part):
  """Return the loss on a task's training part (0) or held-out part (1)."""

  def loss_fn(params, meta_params, model_state, task):
    del meta_params
    return cross_entropy(params, task[part]), model_state

  return loss_fn


def halves_of_digits():
  """Return two halves of scikit-learn's digits, each (x [N, 64], y [N])."""
  digits = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(digits.target))
  x, y = np.float32(digits.data[order] / 16), digits.target[order]
  half = len(y) // 2
  return (x[:half], y[:half]), (x[half:], y[half:])


def kinds_of_digits():
  """Return images [digit, kind, N, 8, 8]: eight rotations and reflections."""
  digits = datasets.load_digits()
  images = np.float32(digits.images / 16)
  by_digit = np.stack([images[digits.target == d][:170] for d in range(10)])
  turned = [np.rot90(by_digit, k, axes=(2, 3)) for k in range(4)]
  return np.stack([*turned, *(x[..., ::-1] for x in turned)], axis=1)


def stack(items):
  """Return one pytree whose arrays have a leading axis of items."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)


def meta_train(look_ahead, outer_loss, optimizer, meta_params, tasks):
  """Take one meta-step per item of `tasks`.

  Args:
    look_ahead: see `l2t.hypergradient`.
    outer_loss: the loss to minimise, as a mean over tasks.
    optimizer: optimizer of the meta-parameters.
    meta_params: the initial meta-parameters.
    tasks: an iterable of (states, batches), with a leading axis of tasks.

  Returns:
    The meta-parameters after the last step.
  """

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def meta_step(meta_params, opt_state, states, batches):
    gradient = lambda state, batch: l2t.hypergradient(
      look_ahead, outer_loss, state, meta_params, batch
    )[1]
    # All tasks of an item run side by side.
    grads = jax.tree.map(
      lambda x: jnp.mean(x, axis=0), jax.vmap(gradient)(states, batches)
    )
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(meta_params, updates), opt_state

  # Copied, because the step donates its arguments and the caller keeps these.
  meta_params = jax.tree.map(jnp.array, meta_params)
  opt_state = optimizer.init(meta_params)
  for states, batches in tasks:
    meta_params, opt_state = meta_step(meta_params, opt_state, states, batches)
  return meta_params


def accuracy_after(look_ahead, meta_params, states, batches):
  """Return the mean accuracy on the held-out parts of tasks."""

  @jax.jit
  def mean(meta_params, states, batches):
    def one(state, batch):
      params = look_ahead(state, meta_params, batch).params
      x, y = batch[1]
      return jnp.mean(jnp.argmax(logits_of(params, x), axis=-1) == y)

    return jnp.mean(jax.vmap(one)(states, batches))

  return float(mean(meta_params, states, batches))
