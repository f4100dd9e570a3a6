"""Training methods: the auxiliary losses that they add to the task's loss.

A method's loss is L_org (the cross-entropy, or the loss of another task) plus
auxiliary losses that pull the target towards its sources. `make_losses`
combines them into three losses with one signature, `LossFn`. Their arguments
are the parameters, {"target": ..., and those of the auxiliary losses, such as
"regressors"}; the transfer weights of the batch, in place of meta-parameters;
the target's batch statistics; and a `TransferBatch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from l2t_jax import errors, imports, types
from l2t_jax.method import loss_functions, pair_sets, transfer


class Method(NamedTuple):
  """The meaning of a value of `config.method`."""

  losses: tuple[str, ...] = ()  # Names in `make_auxiliary_losses`.
  pair_set: str | None = None  # Default pairs; None if no pairs are compared.
  learn_channels: bool = False  # Whether f is learned.
  learn_pairs: bool = False  # Whether g is learned.
  starts_from_source: bool = False  # Whether the source's weights are copied.

  @property
  def needs_source(self) -> bool:
    return bool(self.losses) or self.starts_from_source


METHODS = {
  # Cross-entropy alone.
  "scratch": Method(),
  # The same, starting from the source's weights where shapes agree.
  "finetune": Method(starts_from_source=True),
  # Learning without Forgetting, attention transfer, and both.
  "lwf": Method(("lwf",)),
  "at": Method(("attention",), "one_to_one"),
  "lwf_at": Method(("lwf", "attention"), "one_to_one"),
  # Knowledge distillation; source and target have the same classes.
  "kd": Method(("kd",)),
  # Feature matching with fixed, uniform weights.
  "fm_single": Method(("matching",), "single"),
  "fm_one_to_one": Method(("matching",), "one_to_one"),
  "fm_all_to_all": Method(("matching",), "all_to_all"),
  # What to transfer: only channel weights are learned.
  "l2t_w_single": Method(("matching",), "single", learn_channels=True),
  "l2t_w_one_to_one": Method(("matching",), "one_to_one", learn_channels=True),
  # What and where to transfer: the paper's method.
  "l2t_ww": Method(
    ("matching",), "all_to_all", learn_channels=True, learn_pairs=True
  ),
}


class SourceOutputs(NamedTuple):
  """Outputs of the sources for the auxiliary losses; constants."""

  logits: dict[str, jax.Array]  # source -> [N, K_s].
  matching: transfer.SourceMaps  # Empty if no pairs are compared.


class MixedLabels(NamedTuple):
  """The labels of mixed images, each of which has two."""

  first: jax.Array  # [B].
  second: jax.Array  # [B].
  shares: jax.Array  # Of the first, [B].

  def soft(self, num_classes: int) -> jax.Array:
    """Return the labels as distributions over the classes, [B, K]."""
    of = lambda labels, shares: (
      shares[:, None] * jax.nn.one_hot(labels, num_classes, dtype=shares.dtype)
    )
    return of(self.first, self.shares) + of(self.second, 1 - self.shares)


class TransferBatch(NamedTuple):
  """A mini-batch with the outputs of the sources for it."""

  images: jax.Array  # [B, H, W, C].
  labels: jax.Array | MixedLabels  # [B].
  unlabeled: jax.Array | None = None  # [U, H, W, C].
  source: SourceOutputs | None = None  # For all N = B + U images.


class TargetOutputs(NamedTuple):
  """Outputs of the target in train mode: labelled images, then unlabelled."""

  logits: jax.Array  # [N, K].
  features: dict[str, jax.Array]  # tap -> [N, H, W, C].


class AuxiliaryLoss(Protocol):
  """A loss that does not read labels."""

  def __call__(
    self,
    params: types.PyTree,
    weights: transfer.TransferWeights | None,
    target: TargetOutputs,
    source: SourceOutputs,
  ) -> tuple[chex.Array, dict[str, Any]]:
    """Return (loss [], metrics).

    Differentiable in params, weights and target.
    """


class Aux(NamedTuple):
  """What a loss returns in addition to its value."""

  model_state: types.PyTree  # The target's batch statistics after the batch.
  metrics: dict[str, Any]  # Name -> scalar, or pair -> scalar.


class LossFn(Protocol):
  """The signature of the three losses of a method."""

  def __call__(
    self,
    params: types.PyTree,
    weights: transfer.TransferWeights | None,
    model_state: types.PyTree,
    batch: TransferBatch,
  ) -> tuple[chex.Array, Aux]:
    """Return (loss [], Aux); differentiable in params and weights."""


class Losses(NamedTuple):
  """The three losses of a method."""

  target: LossFn  # L_org.
  auxiliary: LossFn  # Sum of the auxiliary losses; L_wfm in the paper's method.
  total: LossFn  # L_org + auxiliary.


def get_method(name: str) -> Method:
  """Return a method by name; raise `errors.InputError` if it is unknown."""
  if name not in METHODS:
    raise errors.InputError(
      f"unknown method {name!r}; the methods are {', '.join(METHODS)}"
    )
  return METHODS[name]


CLASSIFICATION = types.Task(
  loss_functions.cross_entropy, loss_functions.is_right
)


def smoothed(task: types.Task, smoothing: float) -> types.Task:
  """Return a classification whose loss smooths labels, for training.

  Args:
    task: `CLASSIFICATION`, or any other task if there is no smoothing.
    smoothing: see `loss_functions.cross_entropy`.
  """
  if not smoothing:
    return task
  return task._replace(
    loss=functools.partial(loss_functions.cross_entropy, smoothing=smoothing)
  )


def get_task(name: str) -> types.Task:
  """Return a task by name.

  Args:
    name: "classification", or "package.module:NAME", a `types.Task` to import.

  Raises:
    errors.InputError: there is no such task.
  """
  if name == "classification":
    return CLASSIFICATION
  if ":" not in name:
    raise errors.InputError(
      f"unknown task {name!r}; it must be classification, or a"
      " l2t_jax.types.Task of your own as 'package.module:NAME'"
    )
  task = imports.by_name(name, "task")
  if not isinstance(task, types.Task):
    raise errors.InputError(
      f"the task {name!r} is a {type(task).__name__}; it must be a"
      " l2t_jax.types.Task"
    )
  return task


def init_heads(
  key: chex.PRNGKey, num_features: int, num_classes: Mapping[str, int]
) -> dict[str, types.PyTree]:
  """Initialise LwF's second heads, one per source, as PyTorch does.

  Args:
    key: PRNG key; consumed.
    num_features: number of channels of the feature that the heads read.
    num_classes: source -> number of its classes.

  Returns:
    source -> {kernel [num_features, K_s], bias [K_s]}.
  """
  keys = jax.random.split(key, len(num_classes))
  return {
    name: transfer.torch_linear(head_key, num_features, number)
    for head_key, (name, number) in zip(keys, num_classes.items(), strict=True)
  }


def matching(pairs: Sequence[pair_sets.Pair], *, beta: float) -> AuxiliaryLoss:
  """Return L_wfm, `transfer.matching_loss` with params["regressors"].

  Its metric "distances" is pair -> mean over the batch of Σ_c w_c d_c.
  """

  def loss_fn(params, weights, target, source):
    distances = transfer.channel_distances(
      params["regressors"], target.features, source.matching, pairs
    )
    metrics = {
      name: jnp.mean(jnp.sum(weights.channel[name] * distance, axis=-1))
      for name, distance in distances.items()
    }
    loss = transfer.matching_loss(distances, weights, beta=beta)
    return loss, {"distances": metrics}

  return loss_fn


def attention(pairs: Sequence[pair_sets.Pair], *, beta: float) -> AuxiliaryLoss:
  """Return β times the sum over pairs of `loss_functions.attention_loss`."""

  def loss_fn(params, weights, target, source):
    del params, weights
    losses = [
      loss_functions.attention_loss(
        transfer.source_map(source.matching, pair, pairs),
        target.features[pair.target],
      )
      for pair in pairs
    ]
    return beta * jnp.sum(jnp.stack(losses)), {}

  return loss_fn


def lwf(tap: str, *, temperature: float, weight: float) -> AuxiliaryLoss:
  """Return LwF's loss: weight times a sum over sources.

  Each term is the `loss_functions.softened_cross_entropy` of a second head,
  params["heads"][source], which is linear in the mean over positions of the
  target's `tap`.
  """

  def loss_fn(params, weights, target, source):
    del weights
    feature = transfer.at_least_float32(target.features[tap])
    pooled = jnp.mean(feature, axis=(1, 2))
    losses = [
      loss_functions.softened_cross_entropy(
        transfer.linear(params["heads"][name], pooled),
        logits,
        temperature=temperature,
      )
      for name, logits in source.logits.items()
    ]
    return weight * jnp.sum(jnp.stack(losses)), {}

  return loss_fn


def kd(*, temperature: float, weight: float) -> AuxiliaryLoss:
  """Return weight times the sum over sources of the distillation loss."""

  def loss_fn(params, weights, target, source):
    del params, weights
    losses = [
      loss_functions.distillation_loss(
        target.logits, logits, temperature=temperature
      )
      for logits in source.logits.values()
    ]
    return weight * jnp.sum(jnp.stack(losses)), {}

  return loss_fn


def make_auxiliary_losses(
  method: Method,
  *,
  pairs: Sequence[pair_sets.Pair],
  head_tap: str,
  hyperparameters: Mapping[str, Mapping[str, float]],
) -> dict[str, AuxiliaryLoss]:
  """Make the losses that a method adds to L_org.

  Args:
    method: its `losses` are keys of the dict below.
    pairs: the pairs of features that losses compare.
    head_tap: the target's tap that LwF's heads read.
    hyperparameters: group of the config, such as "lwf" -> name -> value.

  Returns:
    Name -> loss, for `make_losses`.
  """
  of = hyperparameters
  makers = {
    "matching": lambda: matching(pairs, **of["transfer"]),
    "attention": lambda: attention(pairs, **of["at"]),
    "lwf": lambda: lwf(head_tap, **of["lwf"]),
    "kd": lambda: kd(**of["kd"]),
  }
  return {name: makers[name]() for name in method.losses}


def task_loss(
  task: types.Task, outputs: chex.Array, labels: chex.Array
) -> chex.Array:
  """Compute L_org []; raise `errors.InputError` if it is not a scalar."""
  loss = task.loss(transfer.at_least_float32(outputs), labels)
  if jnp.shape(loss):
    raise errors.InputError(
      f"the task's loss returned an array of shape {list(jnp.shape(loss))} for"
      f" {len(labels)} images; it must return a scalar, such as the mean"
    )
  return loss


def task_accuracy(
  task: types.Task, outputs: chex.Array, labels: chex.Array
) -> chex.Array:
  """Compute accuracies [B]; raise `errors.InputError` for other shapes."""
  accuracy = task.accuracy(transfer.at_least_float32(outputs), labels)
  if jnp.shape(accuracy) != (len(labels),):
    raise errors.InputError(
      f"the task's accuracy returned the shape {list(jnp.shape(accuracy))} for"
      f" {len(labels)} images; it must return one value per image"
    )
  return accuracy


def make_losses(
  apply_fn: types.ApplyFn,
  auxiliary: Mapping[str, AuxiliaryLoss],
  task: types.Task = CLASSIFICATION,
) -> Losses:
  """Build the losses of a target network in train mode.

  Unlabelled images pass through the target separately: L_org, the batch
  statistics that it is computed with, and the running statistics are the same
  with and without them.

  Args:
    apply_fn: the target network.
    auxiliary: name -> loss to add to L_org.
    task: defines L_org and the metric "accuracy".

  Returns:
    The losses. The metrics of `target` are the scalars "target_loss" and
    "accuracy"; those of `auxiliary` are "NAME_loss" and the metrics of each
    auxiliary loss; those of `total` are all of these and "loss".
  """

  def forward(params, model_state, images):
    return apply_fn(params["target"], model_state, images, train=True)

  def on_all_images(params, model_state, batch):
    """Return (logits of the labelled images, TargetOutputs, model_state)."""
    logits, features, new_state = forward(params, model_state, batch.images)
    outputs = TargetOutputs(logits, features)
    if batch.unlabeled is not None:
      *more, _ = forward(params, model_state, batch.unlabeled)
      outputs = jax.tree.map(
        lambda *parts: jnp.concatenate(parts), outputs, TargetOutputs(*more)
      )
    return logits, outputs, new_state

  def on_labels(logits, batch):
    labels = batch.labels
    if isinstance(labels, MixedLabels):
      loss = task_loss(task, logits, labels.soft(logits.shape[-1]))
      first, second = (task_accuracy(task, logits, each) for each in labels[:2])
      accuracy = labels.shares * first + (1 - labels.shares) * second
    else:
      loss = task_loss(task, logits, labels)
      accuracy = task_accuracy(task, logits, labels)
    return loss, {"target_loss": loss, "accuracy": jnp.mean(accuracy)}

  def target(params, weights, model_state, batch):
    del weights
    logits, _, model_state = forward(params, model_state, batch.images)
    loss, metrics = on_labels(logits, batch)
    return loss, Aux(model_state, metrics)

  def make_loss(*, with_target):
    def loss_fn(params, weights, model_state, batch):
      logits, outputs, model_state = on_all_images(params, model_state, batch)
      metrics: dict[str, Any] = {}
      if with_target:
        target_loss, metrics = on_labels(logits, batch)
      loss = jnp.zeros(())
      for name, auxiliary_fn in auxiliary.items():
        one, more = auxiliary_fn(params, weights, outputs, batch.source)
        loss += one
        metrics |= {f"{name}_loss": one, **more}
      if with_target:
        loss += target_loss
        metrics["loss"] = loss
      return loss, Aux(model_state, metrics)

    return loss_fn

  return Losses(
    target,
    make_loss(with_target=False),
    make_loss(with_target=True),
  )
