"""One iteration of the method, and evaluation, as pure functions.

One iteration, all of it on one mini-batch (paper, algorithm 1):

  1. real update: one step of the inner optimizer with L_org + L_wfm;
  2. look-ahead from there: T steps with L_wfm alone, then one with L_org;
  3. meta update: Adam with the gradient of L_org after the look-ahead with
     respect to the parameters of f and g, through all T + 1 steps;
  4. the look-ahead is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from l2t_jax import bilevel, objectives, transfer, types

OptimizerFn = Callable[[chex.Numeric], optax.GradientTransformation]


class Source(NamedTuple):
  """A source network's variables; always in eval mode."""

  params: types.PyTree
  model_state: types.PyTree


def sgd(*, momentum: float, weight_decay: float) -> OptimizerFn:
  """SGD as in PyTorch: L2 in the gradient of every parameter, heavy ball.

  Returns:
    learning rate -> optax transformation.
  """

  def optimizer_fn(learning_rate):
    return optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.sgd(learning_rate, momentum=momentum),
    )

  return optimizer_fn


def adam_l2(
  learning_rate: float, weight_decay: float
) -> optax.GradientTransformation:
  """Adam with L2 in the gradient (not decoupled), as torch.optim.Adam."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay), optax.adam(learning_rate)
  )


def cosine_by_epoch(
  learning_rate: float, *, epochs: int, steps_per_epoch: int
) -> Callable[[chex.Numeric], chex.Numeric]:
  """Cosine from the learning rate to 0, constant within an epoch.

  Args:
    learning_rate: in the first epoch.
    epochs: length of the run.
    steps_per_epoch: iterations an epoch.

  Returns:
    iteration (from 0) -> learning rate.
  """
  schedule = optax.cosine_decay_schedule(learning_rate, decay_steps=epochs)
  return lambda step: schedule(step // steps_per_epoch)


def create_state(
  key: chex.PRNGKey,
  target_variables: tuple[types.PyTree, types.PyTree],
  *,
  method: objectives.Method,
  pairs: Sequence[transfer.Pair],
  source_taps: transfer.TapShapes,
  target_taps: transfer.TapShapes,
  optimizer_fn: OptimizerFn,
  meta_optimizer: optax.GradientTransformation,
) -> types.TrainState:
  """Initialise regressors, meta-parameters and both optimizers.

  Args:
    key: for the regressors and the meta-parameters.
    target_variables: (params, model_state) of the target network.
    method: decides which meta-networks exist.
    pairs: the set C; empty for no transfer.
    source_taps: shapes of the source's taps.
    target_taps: shapes of the target's taps.
    optimizer_fn: of the real update and the look-ahead.
    meta_optimizer: of the meta update.
  """
  params, model_state = target_variables
  regressor_key, meta_key = jax.random.split(key)
  params = {"target": params, "regressors": {}}
  meta_params: types.PyTree = {}
  if pairs:
    params["regressors"] = transfer.init_regressors(
      regressor_key, pairs, source_taps, target_taps
    )
    meta_params = transfer.init_meta_params(
      meta_key,
      pairs,
      source_taps,
      learn_channels=method.learn_channels,
      learn_pairs=method.learn_pairs,
    )
  return types.TrainState(
    step=jnp.zeros((), jnp.int32),
    inner=types.InnerState(params, optimizer_fn(0.0).init(params), model_state),
    meta_params=meta_params,
    meta_opt_state=meta_optimizer.init(meta_params),
  )


def make_train_step(
  target_fn: types.ApplyFn,
  source_fn: types.ApplyFn | None,
  *,
  pairs: Sequence[transfer.Pair],
  target_taps: transfer.TapShapes,
  beta: float,
  num_inner_steps: int,
  learning_rate_fn: Callable[[chex.Numeric], chex.Numeric],
  optimizer_fn: OptimizerFn,
  meta_optimizer: optax.GradientTransformation,
  mode: str,
  rolled: bool,
) -> Callable[
  [types.TrainState, Source | None, types.Batch],
  tuple[types.TrainState, dict[str, types.PyTree]],
]:
  """Build one iteration of the method; the caller jits it.

  A state without meta-parameters takes the real update alone.

  Args:
    target_fn: the target network.
    source_fn: the source network; None where, and only where, there are no
      pairs.
    pairs: the set C; empty for no transfer.
    target_taps: shapes of the target's taps.
    beta: β, weight of the matching loss.
    num_inner_steps: T, matching steps of the look-ahead.
    learning_rate_fn: iteration -> learning rate of the inner optimizer.
    optimizer_fn: the inner optimizer, from its learning rate.
    meta_optimizer: of the meta update.
    mode: how the hypergradient is computed, one of `bilevel.MODES`.
    rolled: whether the matching steps are a rolled loop.

  Returns:
    `train_step(state, source, batch) -> (state, metrics)`. Metrics are the
    scalars "loss", "target_loss", "matching_loss" and "accuracy" of the batch
    before the real update, "outer_loss" after the look-ahead and
    "meta_grad_norm"; and, where there are pairs, "transfer": "pair_weights"
    and "distances" (Σ_c w_c d_c), [P] in the order of the pairs, and
    "channel_weights", pair -> [C_m], all of them means over the batch.
  """
  losses = objectives.make_losses(target_fn, pairs, beta=beta)

  def train_step(state, source, batch):
    optimizer = optimizer_fn(learning_rate_fn(state.step))
    data = with_source(source, batch)
    weights = weights_of(state.meta_params, data)
    inner, metrics = real_update(optimizer, state.inner, weights, data)
    meta_params, meta_opt_state = state.meta_params, state.meta_opt_state
    if jax.tree.leaves(meta_params):
      # With a rate that is no tracer, so that it can be probed.
      bilevel.check_differentiable(optimizer_fn(1.0), inner.params)
      outer_loss, grads = bilevel.hypergradient(
        look_ahead(optimizer), losses.target, inner, meta_params, data
      )
      updates, meta_opt_state = meta_optimizer.update(
        grads, meta_opt_state, meta_params
      )
      meta_params = optax.apply_updates(meta_params, updates)
      metrics |= {
        "outer_loss": outer_loss,
        "meta_grad_norm": optax.tree.norm(grads),
      }
    state = types.TrainState(state.step + 1, inner, meta_params, meta_opt_state)
    return state, metrics

  def with_source(source, batch):
    """Run the source: once a batch, outside of all that is differentiated."""
    if source_fn is None:
      return objectives.TransferBatch(batch.images, batch.labels, None)
    _, features, _ = source_fn(
      source.params, source.model_state, batch.images, train=False
    )
    maps = transfer.prepare_source(features, pairs, target_taps)
    return objectives.TransferBatch(batch.images, batch.labels, maps)

  def weights_of(meta_params, data):
    if not pairs:
      return None
    return transfer.transfer_weights(meta_params, data.source.pooled, pairs)

  def real_update(optimizer, inner, weights, data):
    grads, (model_state, metrics) = jax.grad(losses.total, has_aux=True)(
      inner.params, weights, inner.model_state, data
    )
    inner = bilevel.apply_gradients(optimizer, inner, grads, model_state)
    if pairs:
      stack = lambda values: jnp.stack([values[p.name] for p in pairs])
      mean = lambda x: jnp.mean(x, axis=0)
      metrics["transfer"] = {
        "pair_weights": stack(jax.tree.map(mean, weights.pair)),
        "distances": stack(metrics.pop("distances")),
        "channel_weights": jax.tree.map(mean, weights.channel),
      }
    return inner, metrics

  def look_ahead(optimizer):
    # Jitted, so that T steps are traced and lowered as one.
    matching_step = jax.jit(
      bilevel.make_inner_step(losses.matching, optimizer, mode=mode)
    )
    target_step = jax.jit(
      bilevel.make_inner_step(losses.target, optimizer, mode=mode)
    )

    def run(inner, meta_params, data):
      # w and λ do not depend on the target: once for all steps.
      weights = weights_of(meta_params, data)
      inner, _ = bilevel.unroll(
        matching_step,
        inner,
        weights,
        data,
        num_steps=num_inner_steps,
        rolled=rolled,
      )
      inner, _ = target_step(inner, weights, data)
      return inner

    return run

  return train_step


def make_eval_step(
  target_fn: types.ApplyFn,
) -> Callable[[types.InnerState, types.EvalBatch], dict[str, chex.Array]]:
  """Build the evaluation of one batch in eval mode; the caller jits it.

  Returns:
    `eval_step(inner, batch)` -> sums over the images that are no padding:
    {"loss", "correct", "count"}.
  """

  def eval_step(inner, batch):
    logits, _, _ = target_fn(
      inner.params["target"], inner.model_state, batch.images, train=False
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch.labels
    )
    correct = jnp.argmax(logits, axis=-1) == batch.labels
    return {
      "loss": jnp.sum(batch.mask * losses),
      "correct": jnp.sum(batch.mask * correct),
      "count": jnp.sum(batch.mask),
    }

  return eval_step
