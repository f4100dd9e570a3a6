"""One iteration of the method, and evaluation, as pure functions.

One iteration, all of it on one mini-batch (paper, algorithm 1):

  1. real update: one step of the inner optimizer with L_org + L_wfm;
  2. look-ahead from there: T steps with L_wfm alone, then one with L_org;
  3. meta update: Adam with the gradient of L_org after the look-ahead with
     respect to the parameters of f and g, through all T + 1 steps;
  4. the look-ahead is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from l2t_jax import errors, types
from l2t_jax.method import bilevel, objectives, optimizers, pair_sets, transfer

WeightsFn = Callable[
  [types.PyTree, Mapping[str, chex.Array]], transfer.TransferWeights
]

# What the T steps of the look-ahead minimise.
#   auxiliary: L_wfm, and one step with L_org follows them; the paper's scheme.
#   total: L_org + L_wfm, and nothing follows; the usual bilevel scheme.
LOOK_AHEAD_LOSSES = ("auxiliary", "total")


class Source(NamedTuple):
  """A source network's variables; always in eval mode."""

  params: types.PyTree
  model_state: types.PyTree


def create_state(
  params: types.PyTree,
  model_state: types.PyTree,
  meta_params: types.PyTree,
  *,
  optimizer_fn: optimizers.OptimizerFn,
  meta_optimizer: optax.GradientTransformation,
) -> types.TrainState:
  """Put initial values and both optimizers' first states together.

  Args:
    params: {"target": ..., and what the auxiliary losses train along, such as
      "regressors"}.
    model_state: of the target network.
    meta_params: of f and g; empty where none is learned.
    optimizer_fn: of the real update and the look-ahead.
    meta_optimizer: of the meta update.
  """
  return types.TrainState(
    step=jnp.zeros((), jnp.int32),
    inner=types.InnerState(params, optimizer_fn(0.0).init(params), model_state),
    meta_params=meta_params,
    meta_opt_state=meta_optimizer.init(meta_params),
  )


def make_train_step(
  losses: objectives.Losses,
  source_fns: Mapping[str, types.ApplyFn],
  *,
  pairs: Sequence[pair_sets.Pair],
  target_taps: pair_sets.TapShapes,
  weights_fn: WeightsFn | None,
  look_ahead_loss: str,
  num_inner_steps: int,
  learning_rate_fn: Callable[[chex.Numeric], chex.Numeric],
  optimizer_fn: optimizers.OptimizerFn,
  meta_optimizer: optax.GradientTransformation,
  mode: str,
  rolled: bool,
  update_meta: bool = True,
  skip_bad_numbers: bool = False,
) -> Callable[
  [types.TrainState, Mapping[str, Source], types.Batch],
  tuple[types.TrainState, dict[str, types.PyTree]],
]:
  """Build one iteration of the method; the caller jits it.

  A state without meta-parameters takes the real update alone.

  Args:
    losses: of the target, from `objectives.make_losses`.
    source_fns: name -> source network; empty for no transfer. The names stand
      in those of the taps ("NAME/tap"), but for a single source named "".
    pairs: the set C; empty where none are compared.
    target_taps: shapes of the target's taps.
    weights_fn: (meta_params, pooled) -> `transfer.TransferWeights`; None where
      the losses read no such weights.
    look_ahead_loss: what the T steps of the look-ahead minimise, one of
      `LOOK_AHEAD_LOSSES`.
    num_inner_steps: T.
    learning_rate_fn: iteration -> learning rate of the inner optimizer.
    optimizer_fn: the inner optimizer, from its learning rate.
    meta_optimizer: of the meta update.
    mode: how the hypergradient is computed, one of `bilevel.MODES`.
    rolled: whether the T steps are a rolled loop.
    update_meta: whether there is a look-ahead and a meta update at all.
    skip_bad_numbers: whether an iteration whose loss or gradient is NaN or
      infinite leaves everything but the count of iterations as it was. A meta
      update that is not finite never takes place.

  Returns:
    `train_step(state, sources, batch) -> (state, metrics)`. Metrics are the
    scalars of `objectives.make_losses` before the real update and "grad_norm"
    of their gradient; "outer_loss" after the look-ahead, "meta_grad_norm",
    "meta_grad_norms" of each pair's part of it, [P] in the order of the pairs,
    and "meta_update_norm" of what the meta optimizer makes of it;
    with `skip_bad_numbers` "skipped", 1 or 0; and, where there are weights,
    "transfer": "pair_weights" and "distances" (Σ_c w_c d_c), [P], and
    "channel_weights", pair -> [C_m], all of them means over the batch, and
    "regressor_grad_norms", [P].
  """
  if look_ahead_loss not in LOOK_AHEAD_LOSSES:
    raise errors.InputError(
      f"unknown look-ahead loss {look_ahead_loss!r}; use one of"
      f" {', '.join(LOOK_AHEAD_LOSSES)}"
    )

  def train_step(state, sources, batch):
    optimizer = optimizer_fn(learning_rate_fn(state.step))
    data = with_sources(sources, batch)
    weights = weights_of(state.meta_params, data)
    inner, metrics = real_update(optimizer, state.inner, weights, data)
    is_good = jnp.bool_(True)
    if skip_bad_numbers:
      is_good = jnp.isfinite(metrics["loss"] + metrics["grad_norm"])
      inner = _choose(is_good, inner, state.inner)
      metrics["skipped"] = 1.0 - is_good
    meta_params, meta_opt_state = state.meta_params, state.meta_opt_state
    if update_meta and jax.tree.leaves(meta_params):
      # With a rate that is no tracer, so that it can be probed.
      bilevel.check_differentiable(optimizer_fn(1.0), inner.params)
      outer_loss, grads = bilevel.hypergradient(
        look_ahead(optimizer), losses.target, inner, meta_params, data
      )
      by_pair = jnp.stack(
        [
          optax.tree.norm([part[pair.name] for part in grads.values()])
          for pair in pairs
        ]
      )
      metrics |= {
        "outer_loss": outer_loss,
        "meta_grad_norm": jnp.sqrt(jnp.sum(jnp.square(by_pair))),
        "meta_grad_norms": by_pair,
      }
      updates, new_opt_state = meta_optimizer.update(
        grads, meta_opt_state, meta_params
      )
      metrics["meta_update_norm"] = optax.tree.norm(updates)
      meta_params, meta_opt_state = _choose(
        is_good
        & jnp.isfinite(metrics["meta_grad_norm"] + metrics["meta_update_norm"]),
        (optax.apply_updates(meta_params, updates), new_opt_state),
        (meta_params, meta_opt_state),
      )
    state = types.TrainState(state.step + 1, inner, meta_params, meta_opt_state)
    return state, metrics

  def with_sources(sources, batch):
    """Run the sources: once a batch, outside of all that is differentiated."""
    if not source_fns:
      return objectives.TransferBatch(*batch)
    images = batch.images
    if batch.unlabeled is not None:
      images = jnp.concatenate([images, batch.unlabeled])
    logits, features = run_sources(source_fns, sources, images)
    maps = transfer.prepare_source(features, pairs, target_taps)
    outputs = objectives.SourceOutputs(jax.lax.stop_gradient(logits), maps)
    return objectives.TransferBatch(*batch)._replace(source=outputs)

  def weights_of(meta_params, data):
    if weights_fn is None:
      return None
    return weights_fn(meta_params, data.source.matching.pooled)

  def real_update(optimizer, inner, weights, data):
    grads, (model_state, metrics) = jax.grad(losses.total, has_aux=True)(
      inner.params, weights, inner.model_state, data
    )
    metrics["grad_norm"] = optax.tree.norm(grads)
    inner = bilevel.apply_gradients(optimizer, inner, grads, model_state)
    if weights is not None:
      stack = lambda values: jnp.stack([values[p.name] for p in pairs])
      mean = lambda x: jnp.mean(x, axis=0)
      metrics["transfer"] = {
        "pair_weights": stack(jax.tree.map(mean, weights.pair)),
        "distances": stack(metrics.pop("distances")),
        "regressor_grad_norms": stack(
          {name: optax.tree.norm(g) for name, g in grads["regressors"].items()}
        ),
        "channel_weights": jax.tree.map(mean, weights.channel),
      }
    return inner, metrics

  def total(params, weights, model_state, data):
    loss, (model_state, _) = losses.total(params, weights, model_state, data)
    return loss, model_state

  def look_ahead(optimizer):
    # Jitted, so that T steps are traced and lowered as one.
    make_step = lambda loss_fn: jax.jit(
      bilevel.make_inner_step(loss_fn, optimizer, mode=mode)
    )
    staged = look_ahead_loss == "auxiliary"
    inner_step = make_step(losses.auxiliary if staged else total)
    target_step = make_step(losses.target)

    def run(inner, meta_params, data):
      # w and λ do not depend on the target: once for all steps.
      weights = weights_of(meta_params, data)
      inner, _ = bilevel.unroll(
        inner_step,
        inner,
        weights,
        data,
        num_steps=num_inner_steps,
        rolled=rolled,
      )
      if staged:
        inner, _ = target_step(inner, weights, data)
      return inner

    return run

  return train_step


def run_sources(
  source_fns: Mapping[str, types.ApplyFn],
  sources: Mapping[str, Source],
  images: chex.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Run the sources in eval mode.

  Args:
    source_fns: name of a source -> its function.
    sources: name of a source -> its variables.
    images: [B, H, W, C].

  Returns:
    (logits, features): name of a source -> [B, its classes], and what pairs
    call a tap -> its features.
  """
  logits: dict[str, jax.Array] = {}
  features: dict[str, jax.Array] = {}
  for name, source_fn in source_fns.items():
    logits[name], taps, _ = source_fn(
      sources[name].params, sources[name].model_state, images, train=False
    )
    features |= {pair_sets.tap_name(name, tap): x for tap, x in taps.items()}
  return logits, features


def _choose(condition, tree, otherwise):
  """Return one of two trees, by a traced bool."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, otherwise)


def make_eval_step(
  target_fn: types.ApplyFn, task: types.Task = objectives.CLASSIFICATION
) -> Callable[[types.InnerState, types.EvalBatch], dict[str, chex.Array]]:
  """Build the evaluation of one batch in eval mode; the caller jits it.

  Returns:
    `eval_step(inner, batch)` -> sums over the images that are no padding:
    {"loss", "accuracy", "count"}.
  """

  def eval_step(inner, batch):
    logits, _, _ = target_fn(
      inner.params["target"], inner.model_state, batch.images, train=False
    )
    # Image by image, so that padding can be left out.
    losses = jax.vmap(
      lambda *one: objectives.task_loss(task, *(x[None] for x in one))
    )(logits, batch.labels)
    accuracies = objectives.task_accuracy(task, logits, batch.labels)
    return {
      "loss": jnp.sum(batch.mask * losses),
      "accuracy": jnp.sum(batch.mask * accuracies),
      "count": jnp.sum(batch.mask),
    }

  return eval_step
