"""One iteration of the method, and evaluation, as pure functions.

An iteration uses one mini-batch (paper, algorithm 1):

  1. real update: one step of the inner optimizer with L_org + L_wfm;
  2. look-ahead from the result: T steps with L_wfm alone, then one with L_org;
  3. meta update: one step of Adam with the gradient of L_org after the
     look-ahead with respect to the parameters of f and g, through all T + 1
     steps;
  4. the look-ahead is discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from l2t_jax import errors, types
from l2t_jax.method import (
  bilevel,
  mixing,
  objectives,
  optimizers,
  pair_sets,
  transfer,
)

WeightsFn = Callable[
  [types.PyTree, Mapping[str, chex.Array]], transfer.TransferWeights
]

# The loss of the T steps of the look-ahead.
#   auxiliary: L_wfm, followed by one step with L_org; the paper's scheme.
#   total: L_org + L_wfm, without a further step; the usual bilevel scheme.
#   none: no look-ahead. The meta update minimises the loss of the real update,
#     L_org + L_wfm.
LOOK_AHEAD_LOSSES = ("auxiliary", "total", "none")


class Variables(NamedTuple):
  """The variables of a network: parameters and batch statistics."""

  params: types.PyTree
  model_state: types.PyTree


class Problem(NamedTuple):
  """What is learned and from which sources."""

  losses: objectives.Losses  # The target's losses.
  # Name -> source network. Taps are named "NAME/tap", or "tap" if the only
  # source is named "".
  source_fns: Mapping[str, types.ApplyFn] = {}
  pairs: tuple[pair_sets.Pair, ...] = ()  # The set C.
  target_taps: pair_sets.TapShapes = {}  # noqa: RUF012
  # (meta_params, pooled features) -> w and λ; None if no loss reads them.
  weights_fn: WeightsFn | None = None


class Recipe(NamedTuple):
  """How a problem is trained."""

  # Learning rate -> optimizer of the real update and of the look-ahead.
  optimizer_fn: optimizers.OptimizerFn
  learning_rate_fn: Callable[[chex.Numeric], chex.Numeric]  # Iteration -> rate.
  meta_optimizer: optax.GradientTransformation
  num_inner_steps: int = 2  # T.
  look_ahead_loss: str = "auxiliary"  # One of `LOOK_AHEAD_LOSSES`.
  # How the hypergradient is computed, one of `bilevel.MODES`.
  mode: str = "linearized"
  rolled: bool = True  # Whether the T steps are a `lax.scan`.
  # Whether an iteration whose loss or gradient is NaN or infinite changes only
  # the count of iterations. A meta update that is not finite is always skipped.
  skip_bad_numbers: bool = False
  # Decay rate per iteration of the moving average of the target that is
  # evaluated; 0 for none.
  ema_decay: float = 0.0


def create_state(
  params: types.PyTree,
  model_state: types.PyTree,
  meta_params: types.PyTree,
  recipe: Recipe,
) -> types.TrainState:
  """Create the state before the first iteration.

  Args:
    params: {"target": ..., and the parameters of the auxiliary losses, such as
      "regressors"}.
    model_state: the target's batch statistics.
    meta_params: parameters of f and g; empty if none is learned.
    recipe: contains the two optimizers to initialise.
  """
  optimizer = recipe.optimizer_fn(0.0)
  state = types.TrainState(
    step=jnp.zeros((), jnp.int32),
    inner=types.InnerState(params, optimizer.init(params), model_state),
    meta_params=meta_params,
    meta_opt_state=recipe.meta_optimizer.init(meta_params),
  )
  return start_average(state, recipe)


def start_average(state: types.TrainState, recipe: Recipe) -> types.TrainState:
  """Initialise the moving average, if there is one, with the target."""
  if not recipe.ema_decay:
    return state
  # A copy: the state is donated, and no buffer can be donated twice.
  return state._replace(average=jax.tree.map(jnp.copy, evaluated(state)))


def evaluated(state: types.TrainState) -> Variables:
  """Return the variables of the target that are evaluated and exported."""
  if state.average is not None:
    return state.average
  return Variables(state.inner.params["target"], state.inner.model_state)


def make_train_step(
  problem: Problem, recipe: Recipe, *, update_meta: bool = True
) -> Callable[
  [types.TrainState, Mapping[str, Variables], types.Batch],
  tuple[types.TrainState, dict[str, types.PyTree]],
]:
  """Build one iteration of the method; the caller jits it.

  Without meta-parameters an iteration is only the real update.

  Args:
    problem: what is learned.
    recipe: how it is learned.
    update_meta: whether to do the look-ahead and the meta update.

  Returns:
    `train_step(state, sources, batch) -> (state, metrics)`, where `sources`
    maps the name of each source to its variables. The metrics, with P the
    number of pairs and [P] in their order, are

      * the scalars of `objectives.make_losses` before the real update, and
        "grad_norm" of the gradient of the real update's loss;
      * with a meta update: "outer_loss" after the look-ahead, if there is one
        (of `batch.outer`, if it is given, else of the labelled images),
        "meta_grad_norm", "meta_grad_norms" of the part of each pair, [P], and
        "meta_update_norm";
      * with `skip_bad_numbers`: "skipped", 1 or 0;
      * with transfer weights: "transfer", a dict of "pair_weights" [P],
        "distances" (Σ_c w_c d_c) [P] and "channel_weights", pair -> [C_m], all
        of them means over the batch, and, if there are regressors,
        "regressor_grad_norms" [P].

  Raises:
    errors.InputError: the look-ahead loss is unknown; or, when the step is
      traced, the mode is, or `bilevel.check_differentiable` refuses the
      optimizer.
  """
  if recipe.look_ahead_loss not in LOOK_AHEAD_LOSSES:
    raise errors.InputError(
      f"unknown look-ahead loss {recipe.look_ahead_loss!r}; use one of"
      f" {', '.join(LOOK_AHEAD_LOSSES)}"
    )

  def train_step(state, sources, batch):
    optimizer = recipe.optimizer_fn(recipe.learning_rate_fn(state.step))
    data = _with_sources(problem, sources, _mixed(batch))
    weights = _weights_of(problem, state.meta_params, data)
    # Step 1, the real update.
    looks_ahead = recipe.look_ahead_loss != "none"
    (grads, *weight_grads), (model_state, metrics) = jax.grad(
      problem.losses.update,
      argnums=(0,) if looks_ahead else (0, 1),
      has_aux=True,
    )(state.inner.params, weights, state.inner.model_state, data)
    inner = bilevel.apply_gradients(optimizer, state.inner, grads, model_state)
    _record_update(metrics, problem.pairs, weights, data.source, grads)
    average = _update_average(recipe, state, inner)
    is_good = jnp.bool_(True)
    if recipe.skip_bad_numbers:
      # The sum is finite only if both are.
      is_good = jnp.isfinite(metrics["loss"] + metrics["grad_norm"])
      inner, average = _choose(
        is_good, (inner, average), (state.inner, state.average)
      )
      metrics["skipped"] = 1.0 - is_good
    meta = (state.meta_params, state.meta_opt_state)
    if update_meta and jax.tree.leaves(state.meta_params):
      if looks_ahead:
        metrics["outer_loss"], meta_grads = _look_ahead_gradient(
          problem, recipe, optimizer, inner, state.meta_params, data
        )
      else:
        # Chain rule: the gradient of the real update's loss with respect to w
        # and λ, pulled back to the parameters of f and g.
        _, pullback = jax.vjp(
          lambda meta_params: _weights_of(problem, meta_params, data),
          state.meta_params,
        )
        (meta_grads,) = pullback(*weight_grads)
      updated, meta_metrics = _meta_update(problem, recipe, meta, meta_grads)
      metrics |= meta_metrics
      # Never apply a NaN, which Adam's moments would keep. The update can
      # overflow even if the hypergradient is finite.
      is_finite = jnp.isfinite(
        metrics["meta_grad_norm"] + metrics["meta_update_norm"]
      )
      meta = _choose(is_good & is_finite, updated, meta)
    return types.TrainState(state.step + 1, inner, *meta, average), metrics

  return train_step


def _mixed(batch):
  """Apply mixup and CutMix to the labelled images, if the batch says so."""
  data = objectives.TransferBatch(
    batch.images, batch.labels, batch.unlabeled, outer=batch.outer
  )
  if batch.mixing is None:
    return data
  images, shares = mixing.mix(batch.images, batch.mixing)
  first, second = batch.labels, jnp.roll(batch.labels, 1)
  labels = objectives.MixedLabels(first, second, shares)
  return data._replace(images=images, labels=labels)


def _with_sources(problem, sources, data):
  """Run the sources: once per batch, and without differentiation."""
  if not problem.source_fns:
    return data
  images = data.images
  if data.unlabeled is not None:
    images = jnp.concatenate([images, data.unlabeled])
  logits, features = run_sources(problem.source_fns, sources, images)
  maps = transfer.prepare_source(features, problem.pairs, problem.target_taps)
  outputs = objectives.SourceOutputs(jax.lax.stop_gradient(logits), maps)
  return data._replace(source=outputs)


def _weights_of(problem, meta_params, data):
  if problem.weights_fn is None:
    return None
  return problem.weights_fn(meta_params, data.source.matching.pooled)


def _record_update(metrics, pairs, weights, source, grads):
  """Add the gradient's norm and what was transferred to `metrics`."""
  metrics["grad_norm"] = optax.tree.norm(grads)
  if "distances" not in metrics:  # No pairs are weighted.
    return
  stack = lambda values: jnp.stack([values[pair.name] for pair in pairs])
  metrics["transfer"] = {"distances": stack(metrics.pop("distances"))}
  if weights is None:  # AFD weighs pairs, but not channels.
    uniform = lambda x: jnp.full(x.shape[-1], 1 / x.shape[-1], x.dtype)
    metrics["transfer"] |= {
      "pair_weights": stack(metrics.pop("pair_weights")),
      "channel_weights": {
        pair.name: uniform(source.matching.pooled[pair.source])
        for pair in pairs
      },
    }
    return
  mean = lambda x: jnp.mean(x, axis=0)
  metrics["transfer"] |= {
    "pair_weights": stack(jax.tree.map(mean, weights.pair)),
    "regressor_grad_norms": stack(
      {name: optax.tree.norm(g) for name, g in grads["regressors"].items()}
    ),
    "channel_weights": jax.tree.map(mean, weights.channel),
  }


def _update_average(recipe, state, inner):
  """Return the moving average after the real update, if there is one.

  The decay rate of iteration n is at most n / (n + 9), as in TensorFlow's
  ExponentialMovingAverage: without this limit the initial values would dominate
  the average for a long time.
  """
  if not recipe.ema_decay:
    return None
  count = state.step + 1
  decay = jnp.minimum(recipe.ema_decay, count / (count + 9))

  def move(old, new):
    if not jnp.issubdtype(new.dtype, jnp.floating):  # A counter or PRNG key.
      return new
    moved = old + ((1 - decay) * (new - old)).astype(old.dtype)
    return jnp.where(old == new, new, moved)  # Constants can be -inf.

  latest = Variables(inner.params["target"], inner.model_state)
  return jax.tree.map(move, state.average, latest)


def _look_ahead_gradient(problem, recipe, optimizer, inner, meta_params, data):
  """Do step 2; return (L_org after the look-ahead, its gradient)."""
  target_loss = _without_metrics(problem.losses.target)

  def outer_loss(params, weights, model_state, data):
    if data.outer is not None:
      data = objectives.TransferBatch(*data.outer)
    return target_loss(params, weights, model_state, data)

  return bilevel.hypergradient(
    _make_look_ahead(problem, recipe, optimizer),
    outer_loss,
    inner,
    meta_params,
    data,
  )


def _meta_update(problem, recipe, meta, grads):
  """Do step 3; return ((meta_params, meta_opt_state), metrics)."""
  meta_params, meta_opt_state = meta
  # Each parameter of f and g belongs to one pair: the norms of all pairs make
  # up the global norm.
  by_pair = jnp.stack(
    [
      optax.tree.norm([part[pair.name] for part in grads.values()])
      for pair in problem.pairs
    ]
  )
  updates, meta_opt_state = recipe.meta_optimizer.update(
    grads, meta_opt_state, meta_params
  )
  metrics = {
    "meta_grad_norm": jnp.sqrt(jnp.sum(jnp.square(by_pair))),
    "meta_grad_norms": by_pair,
    "meta_update_norm": optax.tree.norm(updates),
  }
  return (optax.apply_updates(meta_params, updates), meta_opt_state), metrics


def _make_look_ahead(problem, recipe, optimizer):
  """Build step 2: (inner state, meta_params, data) -> inner state."""
  # Jitted, so that the T steps are traced and lowered once.
  make_step = lambda loss_fn: jax.jit(
    bilevel.make_inner_step(
      _without_metrics(loss_fn), optimizer, mode=recipe.mode
    )
  )
  staged = recipe.look_ahead_loss == "auxiliary"
  losses = problem.losses
  inner_step = make_step(losses.auxiliary if staged else losses.total)
  target_step = make_step(losses.target)

  def look_ahead(inner, meta_params, data):
    # w and λ do not depend on the target and are the same in all steps.
    weights = _weights_of(problem, meta_params, data)
    inner, _ = bilevel.unroll(
      inner_step,
      inner,
      weights,
      data,
      num_steps=recipe.num_inner_steps,
      rolled=recipe.rolled,
    )
    if staged:
      inner, _ = target_step(inner, weights, data)
    return inner

  return look_ahead


def _without_metrics(loss_fn: objectives.LossFn) -> types.InnerLossFn:
  """Adapt a loss to `bilevel`, whose losses return no metrics."""

  def inner_loss(params, weights, model_state, batch):
    loss, aux = loss_fn(params, weights, model_state, batch)
    return loss, aux.model_state

  return inner_loss


def run_sources(
  source_fns: Mapping[str, types.ApplyFn],
  sources: Mapping[str, Variables],
  images: chex.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Run the sources in eval mode.

  Args:
    source_fns: source -> its network.
    sources: source -> its variables.
    images: [B, H, W, C].

  Returns:
    (logits, features): source -> [B, K_s]; and tap, by its name in pairs, ->
    [B, h, w, C_m].
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
  """Return `tree` if a traced condition is true, else `otherwise`."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, otherwise)


def make_eval_step(
  target_fn: types.ApplyFn, task: types.Task = objectives.CLASSIFICATION
) -> Callable[[Variables, types.EvalBatch], dict[str, chex.Array]]:
  """Build the evaluation of one batch in eval mode; the caller jits it.

  Args:
    target_fn: the target network.
    task: defines the loss and the accuracy.

  Returns:
    `eval_step(variables, batch) -> {"loss", "accuracy", "count"}`, sums [] over
    the images that are not padding. The variables are those that `evaluated`
    returns.
  """

  def eval_step(variables, batch):
    logits, _, _ = target_fn(
      variables.params, variables.model_state, batch.images, train=False
    )
    # One loss per image, so that the mask can leave out padding.
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
