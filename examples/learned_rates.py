"""Learn a learning rate and a weight decay for each array of a network.

    python -m examples.learned_rates

A network of four layers is trained for 50 steps on 200 of scikit-learn's
digits. Each of its eight arrays has its own learning rate and weight decay.
These are sixteen meta-parameters: a grid of five values for each would have
1.5e11 points. They are learned on one half of the digits and tested on the
other half. The baseline is the best point of a grid of one rate and one decay
for all arrays, even selected on the test runs themselves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import meta_training
import l2t_jax as l2t
from l2t_jax import types

SIZES = [64, 64, 64, 64, 10]
NUM_LABELLED, NUM_HELD_OUT, BATCH_SIZE = 200, 400, 20
INNER_STEPS, META_STEPS, NUM_TRAININGS = 50, 100, 4
# Clipped, because a few runs have hypergradients with ten times the usual norm.
META_OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(0.1),
  optax.adam(optax.cosine_decay_schedule(0.15, META_STEPS)),
)


def draw(rng, x, y):
  """Return an initial state and ((x, y) per step, (x, y) held out)."""
  order = rng.permutation(len(y))
  labelled, held_out = np.split(order[: NUM_LABELLED + NUM_HELD_OUT], [200])
  rows = rng.choice(labelled, (INNER_STEPS, BATCH_SIZE))
  params = meta_training.init(jax.random.key(rng.integers(2**31)), SIZES)
  state = types.InnerState(params, None, None)
  return state, ((x[rows], y[rows]), (x[held_out], y[held_out]))


def inner_loss(params, meta_params, model_state, batch):
  decays = jax.tree.map(
    lambda p, decay: jnp.exp(decay) * jnp.sum(p**2) / 2,
    params,
    meta_params["decay"],
  )
  loss = meta_training.cross_entropy(params, batch)
  return loss + sum(jax.tree.leaves(decays)), model_state


def look_ahead(state, meta_params, batch):
  """Train by SGD with momentum, with one learning rate per array."""
  rates = jax.tree.map(jnp.exp, meta_params["rate"])
  scale = lambda grads, _: jax.tree.map(lambda g, r: -r * g, grads, rates)
  optimizer = optax.chain(optax.trace(0.9), optax.stateless(scale))
  state = state._replace(opt_state=optimizer.init(state.params))
  step = l2t.make_inner_step(inner_loss, optimizer)
  return l2t.unroll(step, state, meta_params, batch[0])[0]


def equal(rate, decay):
  """Return meta-parameters with the same rate and decay for each array."""
  params = meta_training.init(jax.random.key(0), SIZES)
  fill = lambda value: jax.tree.map(lambda _: jnp.log(value), params)
  return {"rate": fill(rate), "decay": fill(decay)}


def main(seed: int = 0) -> dict[str, float]:
  """Learn rates and decays; print and return the resulting accuracies."""
  known, new = meta_training.halves_of_digits()
  rng = np.random.default_rng(seed)
  draws = lambda number, data: meta_training.stack(
    [draw(rng, *data) for _ in range(number)]
  )
  learned = meta_training.meta_train(
    look_ahead,
    meta_training.loss_on(1),
    META_OPTIMIZER,
    equal(0.03, 1e-3),
    (draws(NUM_TRAININGS, known) for _ in range(META_STEPS)),
  )
  trainings = draws(20, new)

  accuracy = lambda meta_params: meta_training.accuracy_after(
    look_ahead, meta_params, *trainings
  )
  grid = [
    accuracy(equal(rate, decay))
    for rate in (0.01, 0.02, 0.03, 0.05, 0.1)
    for decay in (1e-4, 1e-3, 1e-2)
  ]
  results = {"grid": max(grid), "learned": accuracy(learned)}
  for name in ("rate", "decay"):
    values = [[f"{float(jnp.exp(x)):.2g}" for x in wb] for wb in learned[name]]
    print(f"{name} of each layer's (weights, biases): {values}")
  print(f"test accuracy with the best of the grid      {results['grid']:.1%}")
  print(
    f"test accuracy with learned rates and decays  {results['learned']:.1%}"
  )
  return results


if __name__ == "__main__":
  main()
