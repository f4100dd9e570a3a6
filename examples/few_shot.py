"""Learn where to start, so that five steps on three images suffice (MAML).

    python -m examples.few_shot

A task is to tell three classes of scikit-learn's digits apart, given one image
of each. The meta-parameters are the initial parameters of a small network: they
are judged by its loss on other images of the task after five steps of SGD, for
32 tasks at once. The classes 0 to 5 are for learning, 6 to 9 for the test.
Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", ICML 2017
(arXiv 1703.03400).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import l2t_jax as l2t
from l2t_jax.method import loss_functions

WAYS, SHOTS, NUM_QUERIES, WIDTH = 3, 1, 15, 64
INNER_STEPS, META_STEPS, NUM_TASKS = 5, 500, 32
LEARNED, HELD_OUT = range(6), range(6, 10)


def draw_tasks(rng, x, y, classes, number):
  """Return ((x, y) to train on, (x, y) to judge by), a leading axis of tasks."""

  def rows():
    ways = rng.choice(list(classes), WAYS, replace=False)
    chosen = [rng.permutation(np.flatnonzero(y == way)) for way in ways]
    return [each[: SHOTS + NUM_QUERIES] for each in chosen]

  images = x[np.array([rows() for _ in range(number)])]
  parts = np.split(images, [SHOTS], axis=2)  # Of [tasks, WAYS, images, 64].
  labels = [np.repeat(np.arange(WAYS), part.shape[2]) for part in parts]
  return tuple(
    (part.reshape(number, -1, 64), np.tile(label, (number, 1)))
    for part, label in zip(parts, labels, strict=True)
  )


def init(key):
  sizes = [64, WIDTH, WIDTH, WAYS]
  keys = jax.random.split(key, 3)
  return [
    (jax.random.normal(key, (n, m)) / np.sqrt(n), jnp.zeros(m))
    for key, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
  ]


def logits_of(params, x):
  for w, b in params[:-1]:
    x = jnp.tanh(x @ w + b)
  w, b = params[-1]
  return x @ w + b


def loss_on(part):
  """Return the loss on the images to train on (0) or to judge by (1)."""

  def loss_fn(params, meta_params, model_state, task):
    del meta_params
    x, y = task[part]
    loss = loss_functions.cross_entropy(logits_of(params, x), y)
    return loss, model_state

  return loss_fn


STEP = l2t.make_inner_step(loss_on(0), optax.sgd(0.3))
STATE = l2t.InnerState(None, optax.sgd(0.3).init(None), None)


def look_ahead(state, meta_params, task):
  """Take some steps from where the meta-parameters are."""
  start = state._replace(params=meta_params)
  return l2t.unroll(STEP, start, None, task, num_steps=INNER_STEPS)[0]


@jax.jit
def accuracy(meta_params, tasks):
  """Return the mean accuracy after training on each task."""

  def one(task):
    params = look_ahead(STATE, meta_params, task).params
    x, y = task[1]
    return jnp.mean(jnp.argmax(logits_of(params, x), axis=-1) == y)

  return jnp.mean(jax.vmap(one)(tasks))


def main(seed: int = 0) -> dict[str, float]:
  """Learn a start; print and return what it is worth."""
  digits, rng = datasets.load_digits(), np.random.default_rng(seed)
  data = (digits.data.astype(np.float32) / 16, digits.target)
  meta_optimizer = optax.adam(1e-3)

  @jax.jit
  def meta_step(meta_params, meta_state, tasks):
    gradient = lambda task: l2t.hypergradient(
      look_ahead, loss_on(1), STATE, meta_params, task
    )[1]
    grads = jax.tree.map(lambda g: g.mean(0), jax.vmap(gradient)(tasks))
    updates, meta_state = meta_optimizer.update(grads, meta_state)
    return optax.apply_updates(meta_params, updates), meta_state

  random = learned = init(jax.random.key(seed))
  meta_state = meta_optimizer.init(learned)
  for _ in range(META_STEPS):
    tasks = draw_tasks(rng, *data, LEARNED, NUM_TASKS)
    learned, meta_state = meta_step(learned, meta_state, tasks)
  tests = draw_tasks(rng, *data, HELD_OUT, 500)
  results = {}
  for name, start in (("random", random), ("learned", learned)):
    results[name] = float(accuracy(start, tests))
    print(f"accuracy on new classes from a {name} start: {results[name]:.1%}")
  return results


if __name__ == "__main__":
  main()
