"""Mixup and CutMix, by hand."""

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import models, types
from l2t_jax.method import mixing, objectives, optimizers, training
from tests.support import small_setup


@pytest.mark.parametrize(
  ("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]
)
def test_what_is_drawn(mixup, cutmix):
  shape = np.array((200, 300))
  share, box = mixing.draw(
    np.random.default_rng(0), 20_000, shape, mixup=mixup, cutmix=cutmix
  )
  areas = np.prod((box[:, 2:] - box[:, :2]) / shape, axis=1)
  assert box.min() == 0
  assert (box.max(axis=0) <= (200, 300, 200, 300)).all()
  assert (areas >= 0).all()
  is_mixed, is_cut = share < 1, areas > 0
  assert not (is_mixed & is_cut).any()
  of_both = 0.5 if mixup and cutmix else 1.0
  if mixup:
    np.testing.assert_allclose(is_mixed.mean(), of_both, atol=0.02)
    np.testing.assert_allclose(share[is_mixed].mean(), 0.5, atol=0.01)
    # The variance of Beta(0.8, 0.8).
    np.testing.assert_allclose(share[is_mixed].var(), 1 / (4 * 2.6), rtol=0.05)
  if cutmix:
    # A side is √u, u uniform, and on average u / 4 of it is cut off.
    expected = 1 / 2 - 1 / 5 + 1 / 48
    np.testing.assert_allclose(areas.mean(), of_both * expected, rtol=0.03)


def test_images_are_mixed_with_the_one_before(x64):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(3, 4, 5, 2))
  how = types.Mixing(
    jnp.array([0.25, 1.0, 1.0]),
    jnp.array([[0, 0, 0, 0], [1, 2, 4, 5], [3, 3, 3, 3]]),
  )
  seen, shares = mixing.mix(jnp.array(images), how)
  expected = images.copy()
  expected[0] = 0.25 * images[0] + 0.75 * images[2]
  expected[1, 1:4, 2:5] = images[0, 1:4, 2:5]
  np.testing.assert_allclose(seen, expected, rtol=1e-12)
  np.testing.assert_allclose(shares, [0.25, 1 - 9 / 20, 1.0], rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_mixed_labels(smoothing, x64):
  """A weighted mean of the losses with either label."""
  rng = np.random.default_rng(0)
  logits = jnp.array(rng.normal(size=(5, 4)))
  first, second = jnp.array(rng.integers(0, 4, (2, 5)))
  shares = jnp.array(rng.random(5))
  task = objectives.smoothed(objectives.CLASSIFICATION, smoothing)
  losses = objectives.make_losses(lambda *_, **__: (logits, {}, {}), {}, task)
  batch = objectives.TransferBatch(
    logits, objectives.MixedLabels(first, second, shares)
  )
  seen, aux = losses.target({"target": {}}, None, {}, batch)
  one = lambda i, label: task.loss(logits[i : i + 1], label[i : i + 1])
  expected = [
    shares[i] * one(i, first) + (1 - shares[i]) * one(i, second)
    for i in range(5)
  ]
  np.testing.assert_allclose(seen, np.mean(expected), rtol=1e-12)
  best = logits.argmax(axis=-1)
  rights = shares * (best == first) + (1 - shares) * (best == second)
  np.testing.assert_allclose(aux.metrics["accuracy"], rights.mean())


def test_source_and_target_see_the_mixed_images(x64):
  """An iteration is one on images that were mixed before, with soft labels."""
  state, sources, pairs, target_taps = small_setup.create("fm_single")
  step = small_setup.make_train_step("fm_single", pairs, target_taps)
  mixed = small_setup.batch(4, num_unlabeled=2, mixes=True)
  plain = mixed._replace(mixing=None)
  images, shares = mixing.mix(mixed.images, mixed.mixing)
  step = jax.jit(step)
  _, seen = step(state, sources, mixed)
  _, expected = step(state, sources, plain._replace(images=images))
  np.testing.assert_allclose(
    seen["matching_loss"], expected["matching_loss"], rtol=1e-12
  )
  assert seen["target_loss"] != expected["target_loss"]
  logits, *_ = models.as_apply_fn(small_setup.TARGET)(
    state.inner.params["target"], state.inner.model_state, images, train=True
  )
  labels = jax.nn.one_hot(plain.labels, logits.shape[-1])
  shares = shares[:, None]
  soft = shares * labels + (1 - shares) * jnp.roll(labels, 1, axis=0)
  loss = -jnp.mean(jnp.sum(soft * jax.nn.log_softmax(logits), axis=-1))
  np.testing.assert_allclose(seen["target_loss"], loss, rtol=1e-7)


def test_hypergradient_with_a_strong_recipe(x64):
  """AdamW, warm-up, mixed images and smoothed labels, in every mode."""
  state, sources, pairs, target_taps = small_setup.create(pair_set="single")
  problem = small_setup.make_problem(
    "l2t_ww",
    pairs,
    target_taps,
    task=objectives.smoothed(objectives.CLASSIFICATION, 0.1),
  )
  recipe = small_setup.RECIPE._replace(
    optimizer_fn=optimizers.adamw(
      b1=0.9, b2=0.99, weight_decay=0.1, mask=optimizers.are_kernels
    ),
    learning_rate_fn=optimizers.make_schedule(
      "cosine", 0.01, epochs=4, steps_per_epoch=5, warmup_steps=7
    ),
    meta_optimizer=optax.identity(),
  )
  params, _, model_state = state.inner
  state = training.create_state(params, model_state, state.meta_params, recipe)
  batch = small_setup.batch(4, mixes=True)
  # Two iterations before, so that the moments are not 0.
  before = jax.jit(training.make_train_step(problem, recipe, update_meta=False))
  for _ in range(2):
    state, _ = before(state, sources, batch)
  data = training._with_sources(problem, sources, training._mixed(batch))
  optimizer = recipe.optimizer_fn(recipe.learning_rate_fn(state.step))

  def meta_update(mode):
    @jax.jit
    def update(meta_params):
      loss, gradient = training._look_ahead_gradient(
        problem,
        recipe._replace(mode=mode),
        optimizer,
        state.inner,
        meta_params,
        data,
      )
      return loss, flatten_util.ravel_pytree(gradient)[0]

    return update

  flat, unflatten = flatten_util.ravel_pytree(state.meta_params)
  usual = meta_update("linearized")
  _, gradient = usual(state.meta_params)
  for mode in ("reverse", "remat", "mixed"):
    np.testing.assert_allclose(
      meta_update(mode)(state.meta_params)[1], gradient, rtol=1e-8, atol=1e-14
    )
  rng = np.random.default_rng(0)
  for _ in range(3):
    direction = rng.normal(size=flat.shape)
    direction *= 1e-4 / np.linalg.norm(direction)
    above, below = (usual(unflatten(flat + s * direction))[0] for s in (1, -1))
    np.testing.assert_allclose(
      above - below, 2 * gradient @ direction, rtol=1e-5
    )
