"""Learn an initialisation that adapts in five steps on three images (MAML).

    python -m examples.few_shot

A task is to classify images of three classes, given one image per class. The
classes are scikit-learn's digits, rotated, mirrored and placed at random: 0, 1,
2, 3, 8 and 9 are for meta-training, 4 to 7 are new classes for the test. The
meta-parameters are the initial parameters of a small network. The outer loss is
its loss on other images of the task after five steps of SGD (Finn, Abbeel and
Levine, ICML 2017, arXiv 1703.03400). The baseline is the usual one: a network
that was pre-trained on all known classes and gets a new last layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import meta_training
import l2t_jax as l2t
from l2t_jax import types

WAYS, NUM_QUERIES, NUM_TASKS = 3, 10, 16
INNER_STEPS, META_STEPS, PRETRAINING_STEPS = 5, 600, 2000
SIZE, HIDDEN = 10, [128, 128]
# The look-ahead starts from the meta-parameters, not from a state.
NO_STATE = types.InnerState(None, None, None)


def placed(rng, images):
  """Place each image [..., 8, 8] at random in an empty one, [..., 100]."""
  flat = images.reshape(-1, 8, 8)
  result = np.zeros((len(flat), SIZE, SIZE), np.float32)
  rows, columns = rng.integers(SIZE - 7, size=(2, len(flat), 1)) + np.arange(8)
  each = np.arange(len(flat))[:, None, None]
  result[each, rows[:, :, None], columns[:, None, :]] = flat
  return result.reshape(*images.shape[:-2], SIZE**2)


def draw_tasks(rng, images, number):
  """Return training and held-out (x, y), each with a leading axis of tasks."""
  digits = rng.permuted(np.tile(np.arange(len(images)), (number, 1)), axis=1)
  digits = digits[:, :WAYS, None]
  kinds = rng.integers(images.shape[1], size=digits.shape)
  # The first image of a class is for training, the others are held out.
  order = np.argsort(rng.random((number, WAYS, images.shape[2])))
  x = placed(rng, images[digits, kinds, order[..., : 1 + NUM_QUERIES]])
  y = np.broadcast_to(np.arange(WAYS)[:, None], x.shape[:3])
  flat = lambda part: part.reshape(number, -1, *part.shape[3:])
  return tuple(
    (flat(x[:, :, part]), flat(y[:, :, part]))
    for part in (slice(1), slice(1, None))
  )


def adapt(rate):
  """Return a look-ahead that starts training at the meta-parameters."""
  optimizer = optax.sgd(rate)
  step = l2t.make_inner_step(meta_training.loss_on(0), optimizer)

  def look_ahead(state, start, task):
    state = types.InnerState(start, optimizer.init(start), None)
    return l2t.unroll(step, state, start, task, num_steps=INNER_STEPS)[0]

  return look_ahead


def pretrain(rng, images):
  """Train on all known classes: meta-training with a look-ahead of 0 steps."""
  images = images.reshape(-1, *images.shape[2:])

  def draw():
    y = rng.integers(len(images), size=(1, 128))
    x = placed(rng, images[y, rng.integers(images.shape[1], size=y.shape)])
    return NO_STATE, (None, (x, y))

  *hidden, _ = meta_training.meta_train(
    lambda state, params, batch: state._replace(params=params),
    meta_training.loss_on(1),
    optax.adam(1e-3),
    meta_training.init(jax.random.key(1), [SIZE**2, *HIDDEN, len(images)]),
    (draw() for _ in range(PRETRAINING_STEPS)),
  )
  return [*hidden, (jnp.zeros((HIDDEN[-1], WAYS)), jnp.zeros(WAYS))]


def main(seed: int = 0) -> dict[str, float]:
  """Learn an initialisation; print and return accuracies on new classes."""
  kinds = meta_training.kinds_of_digits()
  known, new = kinds[[0, 1, 2, 3, 8, 9]], kinds[[4, 5, 6, 7]]
  rng = np.random.default_rng(seed)
  random = meta_training.init(jax.random.key(seed), [SIZE**2, *HIDDEN, WAYS])
  learned = meta_training.meta_train(
    adapt(0.3),
    meta_training.loss_on(1),
    optax.adam(1e-3),
    random,
    ((NO_STATE, draw_tasks(rng, known, NUM_TASKS)) for _ in range(META_STEPS)),
  )
  tests = draw_tasks(rng, new, 500)
  # The baselines get their best learning rate on the test tasks.
  best = lambda start, *rates: max(
    meta_training.accuracy_after(adapt(rate), start, NO_STATE, tests)
    for rate in rates
  )
  results = {
    "random": best(random, 0.03, 0.1, 0.3, 1.0),
    "pretrained": best(pretrain(rng, known), 0.003, 0.01, 0.03, 0.1, 0.3),
    "learned": best(learned, 0.3),
  }
  for name, value in results.items():
    print(f"accuracy on new classes from a {name} start: {value:.1%}")
  return results


if __name__ == "__main__":
  main()
