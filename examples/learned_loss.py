"""Learn a loss that is robust to wrong labels, over 400 inner steps.

    python -m examples.learned_loss

40 % of the training labels are wrong, and it is not known which. With p the
predicted probability of the given label, the loss is

    exp(φ_0) (-log p) + Σ_k exp(φ_k) (1 - p)^k,    k = 1, 2, 3, 4, 6, 8,

which includes cross-entropy and the mean absolute error. Meta-training
differentiates through 400 steps of Adam, in segments; the outer loss is the
cross-entropy on correct labels. The learned loss is then used on other images,
for which no correct labels are available. The baselines are cross-entropy and a
loss designed for this case, generalised cross-entropy (1 - p^q) / q (Zhang and
Sabuncu, NeurIPS 2018).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import meta_training
import l2t_jax as l2t
from l2t_jax import types

SIZES = [64, 64, 10]
NUM_LABELLED, NUM_HELD_OUT, BATCH_SIZE = 400, 400, 32
INNER_STEPS, META_STEPS, NUM_TRAININGS = 400, 40, 4
POWERS = np.array([1, 2, 3, 4, 6, 8])


def draw(rng, x, y):
  """Return an initial state and ((x, y) per step, (x, y) held out)."""
  order = rng.permutation(len(y))
  labelled, held_out, _ = np.split(
    order, [NUM_LABELLED, NUM_LABELLED + NUM_HELD_OUT]
  )
  wrong = rng.random(NUM_LABELLED) < 0.4
  noise = np.where(wrong, rng.integers(1, 10, NUM_LABELLED), 0)
  labels = (y[labelled] + noise) % 10
  rows = rng.integers(NUM_LABELLED, size=(INNER_STEPS, BATCH_SIZE))
  params = meta_training.init(jax.random.key(rng.integers(2**31)), SIZES)
  state = types.InnerState(params, None, None)
  batches = (x[labelled][rows], labels[rows])
  return state, (batches, (x[held_out], y[held_out]))


def learned_loss(p, meta_params):
  scales = jnp.exp(meta_params)
  powers = jnp.power(1 - p[:, None], POWERS)
  return -scales[0] * jnp.log(p) + powers @ scales[1:]


def train_on(loss):
  """Return a look-ahead whose loss is a function of (p [B], meta_params)."""
  # eps_root keeps Adam differentiable at a zero gradient.
  optimizer = optax.adam(3e-3, eps_root=1e-12)

  def inner_loss(params, meta_params, model_state, batch):
    x, y = batch
    p = jax.nn.softmax(meta_training.logits_of(params, x))
    p = jnp.take_along_axis(p, y[:, None], axis=1)[:, 0]
    # The derivative of log p is infinite at 0.
    return jnp.mean(loss(jnp.maximum(p, 1e-12), meta_params)), model_state

  step = l2t.make_inner_step(inner_loss, optimizer)

  def look_ahead(state, meta_params, batch):
    state = state._replace(opt_state=optimizer.init(state.params))
    # 20 is the square root of the 400 steps, for the least memory.
    return l2t.unroll(step, state, meta_params, batch[0], segment_length=20)[0]

  return look_ahead


def main(seed: int = 0) -> dict[str, float]:
  """Learn a loss; print and return accuracies after training with it."""
  known, new = meta_training.halves_of_digits()
  rng = np.random.default_rng(seed)
  draws = lambda number, data: meta_training.stack(
    [draw(rng, *data) for _ in range(number)]
  )
  meta_params = meta_training.meta_train(
    train_on(learned_loss),
    meta_training.loss_on(1),
    optax.adam(0.1),
    jnp.full(1 + len(POWERS), -2.0),
    (draws(NUM_TRAININGS, known) for _ in range(META_STEPS)),
  )
  trainings = draws(10, new)

  accuracy = lambda loss: meta_training.accuracy_after(
    train_on(loss), meta_params, *trainings
  )
  results = {
    "cross-entropy": accuracy(lambda p, _: -jnp.log(p)),
    "mean absolute error": accuracy(lambda p, _: 1 - p),
    "generalised, q = 0.7": accuracy(lambda p, _: (1 - p**0.7) / 0.7),
    "learned": accuracy(learned_loss),
  }
  print(f"exp(φ): {np.round(np.exp(meta_params), 2)}")
  for name, value in results.items():
    print(f"test accuracy with {name:20} {value:.1%}")
  return results


if __name__ == "__main__":
  main()
