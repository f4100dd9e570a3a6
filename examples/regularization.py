"""Learn the regularisation of a convex model by implicit differentiation.

    python -m examples.regularization

The features of a softmax regression on scikit-learn's digits are the pixels,
the products of vertical and of horizontal neighbours, and as many columns of
noise. Each of these four groups has its own L2 penalty (a grid would need
10,000 fits per fold). The outer loss is that of cross-validation. L-BFGS finds
the minimum of each fold and is not differentiated: the implicit function
theorem gives the hypergradient. The baseline is scikit-learn's cross-validation
of a single penalty.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets, linear_model, model_selection

import l2t_jax as l2t
from l2t_jax.method import loss_functions

NUM_LABELLED, NUM_FOLDS, NUM_CLASSES = 300, 5, 10
INNER_STEPS, META_STEPS = 60, 40


def load(seed):
  """Return labelled and test images, (x [N, 256], y [N])."""
  digits, rng = datasets.load_digits(), np.random.default_rng(seed)
  order = rng.permutation(len(digits.target))
  pixels, y = digits.images[order] / 16, digits.target[order]
  products = [pixels * np.roll(pixels, 1, axis) for axis in (1, 2)]
  groups = [pixels, *products, rng.random(pixels.shape)]
  x = np.stack(groups, axis=1).reshape(len(y), -1).astype(np.float32)
  n = NUM_LABELLED
  return (x[:n], y[:n]), (x[n:], y[n:])


def in_folds(x, y):
  """Return (training, held-out) (x, y), each with a leading axis of folds."""
  of_fold = np.arange(NUM_LABELLED) % NUM_FOLDS
  is_test = of_fold == np.arange(NUM_FOLDS)[:, None]
  rows = lambda keep: np.nonzero(keep)[1].reshape(NUM_FOLDS, -1)
  return tuple((x[r], y[r]) for r in (rows(~is_test), rows(is_test)))


def cross_entropy(params, x, y):
  return loss_functions.cross_entropy(x @ params["w"] + params["b"], y)


def penalised(params, log_decay, model_state, batch):
  """The inner loss."""
  decay = jnp.exp(jnp.repeat(log_decay, 64))[:, None]
  # Without a penalty on the biases, the minimum would not be unique.
  penalty = jnp.sum(decay * params["w"] ** 2) + 1e-4 * jnp.sum(params["b"] ** 2)
  return cross_entropy(params, *batch[0]) + penalty, model_state


def held_out(params, log_decay, model_state, batch):
  """The outer loss."""
  del log_decay
  return cross_entropy(params, *batch[1]), model_state


def minimise(state, log_decay, batch):
  """Minimise the inner loss."""
  optimizer = optax.lbfgs()
  loss_fn = lambda params: penalised(params, log_decay, None, batch)[0]

  def step(carry, _):
    params, opt_state = carry
    value, grad = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(
      grad, opt_state, params, value=value, grad=grad, value_fn=loss_fn
    )
    return (optax.apply_updates(params, updates), opt_state), None

  start = (state.params, optimizer.init(state.params))
  (params, _), _ = jax.lax.scan(step, start, length=INNER_STEPS)
  return state._replace(params=params)


def main(seed: int = 0) -> dict[str, float]:
  """Learn four penalties, cross-validate one; print and return accuracies."""
  labelled, (x, y) = load(seed)
  folds = in_folds(*labelled)
  look_ahead = l2t.at_stationary_point(
    minimise, penalised, tolerance=1e-2, max_iterations=1000
  )
  params = {"w": jnp.zeros((256, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)}
  state = l2t.InnerState(params, None, None)
  meta_optimizer = optax.adam(0.2)

  @jax.jit
  def meta_step(log_decay, meta_state):
    gradient = lambda fold: l2t.hypergradient(
      look_ahead, held_out, state, log_decay, fold
    )[1]
    grad = jnp.mean(jax.vmap(gradient)(folds), axis=0)
    updates, meta_state = meta_optimizer.update(grad, meta_state)
    return optax.apply_updates(log_decay, updates), meta_state

  log_decay = jnp.full(4, jnp.log(1e-2))
  meta_state = meta_optimizer.init(log_decay)
  for _ in range(META_STEPS):
    log_decay, meta_state = meta_step(log_decay, meta_state)
  params = jax.jit(minimise)(state, log_decay, (labelled, None)).params
  learned = np.mean(np.argmax(x @ params["w"] + params["b"], axis=-1) == y)
  model = linear_model.LogisticRegression(max_iter=1000)
  grid = {"C": np.logspace(-4, 4, 10)}
  peer = model_selection.GridSearchCV(model, grid, scoring="neg_log_loss")
  peer.fit(*labelled)
  validated = np.mean(peer.predict(x) == y)
  print(f"logarithms of the four penalties: {np.round(log_decay, 1)}")
  print(f"test accuracy with four learned penalties      {learned:.1%}")
  print(f"test accuracy with one that is cross-validated {validated:.1%}")
  return {"learned": float(learned), "cross_validated": float(validated)}


if __name__ == "__main__":
  main()
