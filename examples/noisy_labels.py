"""Learn which labels to trust, with a custom inner loop.

    python -m examples.noisy_labels

40 % of the training labels are wrong. Each training example has a learned
weight (the meta-parameters). A softmax regression is trained by Adam on the
weighted loss. The outer loss, on 100 examples whose labels are known to be
correct, is differentiated through the training. The network, the data set and
the losses are all defined here, outside of the library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import l2t_jax as l2t
from l2t_jax import types

NUM_TRAIN, NUM_CLEAN, NUM_CLASSES = 500, 100, 10
INNER_STEPS, META_STEPS = 20, 60
# eps_root keeps Adam differentiable at a zero gradient.
OPTIMIZER = optax.adam(0.1, eps_root=1e-8)


def load(seed):
  """Return training, clean and test (x [N, 64], y [N]), and the noise mask."""
  digits = datasets.load_digits()
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(digits.target))
  x, y = digits.data[order] / 16.0, digits.target[order]
  train, clean, test = np.split(
    np.arange(len(y)), [NUM_TRAIN, NUM_TRAIN + NUM_CLEAN]
  )
  wrong = rng.random(NUM_TRAIN) < 0.4
  labels = np.where(
    wrong, (y[train] + rng.integers(1, NUM_CLASSES, NUM_TRAIN)) % 10, y[train]
  )
  return (x[train], labels), (x[clean], y[clean]), (x[test], y[test]), wrong


def losses_of(params, x, y):
  logits = x @ params["w"] + params["b"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def weighted_loss(params, meta_params, model_state, batch):
  """The inner loss: each training example has its learned weight."""
  (x, y), _ = batch
  weights = jax.nn.sigmoid(meta_params)
  return jnp.mean(weights * losses_of(params, x, y)), model_state


def clean_loss(params, meta_params, model_state, batch):
  """The outer loss: how well the trusted examples are classified."""
  del meta_params
  _, (x, y) = batch
  return jnp.mean(losses_of(params, x, y)), model_state


def look_ahead(state, meta_params, batch):
  step = l2t.make_inner_step(weighted_loss, OPTIMIZER)
  return l2t.unroll(step, state, meta_params, batch, num_steps=INNER_STEPS)[0]


def accuracy(params, data):
  x, y = data
  return float(jnp.mean(jnp.argmax(x @ params["w"] + params["b"], -1) == y))


def main(seed: int = 0) -> dict[str, float]:
  """Train with equal and with learned weights; print and return results."""
  train, clean, test, wrong = load(seed)
  params = {"w": jnp.zeros((64, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)}
  start = types.InnerState(params, OPTIMIZER.init(params), model_state=None)
  meta_optimizer = optax.adam(0.3)
  meta_params = jnp.zeros(NUM_TRAIN)
  meta_state = meta_optimizer.init(meta_params)

  @jax.jit
  def meta_step(meta_params, meta_state, batch):
    loss, grads = l2t.hypergradient(
      look_ahead, clean_loss, start, meta_params, batch
    )
    updates, meta_state = meta_optimizer.update(grads, meta_state)
    return optax.apply_updates(meta_params, updates), meta_state, loss

  train_with = jax.jit(look_ahead)
  batch = (train, clean)
  equal = accuracy(train_with(start, meta_params, batch).params, test)
  for i in range(META_STEPS):
    meta_params, meta_state, loss = meta_step(meta_params, meta_state, batch)
    if i % 10 == 0:
      print(f"meta step {i:2d}: loss on the clean examples {loss:.3f}")
  learned = accuracy(train_with(start, meta_params, batch).params, test)
  weights = np.asarray(jax.nn.sigmoid(meta_params))
  results = {
    "accuracy_equal": equal,
    "accuracy_learned": learned,
    "weight_right": float(weights[~wrong].mean()),
    "weight_wrong": float(weights[wrong].mean()),
  }
  print(f"test accuracy with equal weights    {equal:.1%}")
  print(f"test accuracy with learned weights  {learned:.1%}")
  print(
    f"mean weight of right labels {results['weight_right']:.2f},"
    f" of wrong labels {results['weight_wrong']:.2f}"
  )
  return results


if __name__ == "__main__":
  main()
