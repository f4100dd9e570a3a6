"""Training methods: the auxiliary losses that they add to the task's loss.

A method's loss is L_org (the cross-entropy, or the loss of another task) plus
auxiliary losses that pull the target towards its sources. `make_losses`
combines them into four losses with one signature, `LossFn`. Their arguments are
the parameters, {"target": ..., and those of the auxiliary losses, such as
"regressors"}; the transfer weights of the batch, in place of meta-parameters;
the target's batch statistics; and a `TransferBatch`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import functools
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from l2t_jax import errors, imports, types
from l2t_jax.method import (
  attention_distillation,
  loss_functions,
  pair_sets,
  transfer,
)


class Method(NamedTuple):
  """What a value of `config.method` stands for."""

  losses: tuple[str, ...] = ()  # Names in `make_auxiliary_losses`.
  # Default pairs; "" if they have to be given; None if none are compared.
  pair_set: str | None = None
  learn_channels: bool = False  # Whether f is learned.
  learn_pairs: bool = False  # Whether g is learned.
  starts_from_source: bool = False  # Whether the source's weights are copied.
  # Whether f and g minimise L_org after a look-ahead; else they minimise the
  # loss of the real update, together with the target.
  looks_ahead: bool = True
  # The entries of `losses` that only the real update uses. The look-ahead
  # minimises the matching loss alone, also in a combination like kd+l2t_ww.
  added: tuple[str, ...] = ()
  # What is trained: the target; or, in its place, the source with a new linear
  # classifier ("source"), or that classifier alone ("classifier").
  trains: str = "target"

  @property
  def weighs_pairs(self) -> bool:
    """True if runs of this method have a transfer map."""
    return bool({"matching", "afd"} & {*self.losses})

  @property
  def searches_pairs(self) -> bool:
    """True if there are no default pairs: a table searches for them."""
    return self.pair_set == ""

  @property
  def needs_source(self) -> bool:
    return bool(self.losses) or self._continues_source

  @property
  def _continues_source(self) -> bool:
    return self.starts_from_source or self.trains != "target"

  def check_sources(self, names: Collection[str]) -> None:
    """Raise an `errors.InputError` for sources that cannot all be used.

    Args:
      names: of the sources.
    """
    if len(names) > 1 and self._continues_source:
      raise errors.InputError(
        "fine-tuning and linear probes start from one source, but there are"
        f" {len(names)}: {', '.join(names)}"
      )

  def learns(
    self, channel_weights: str, pair_weights: str, *, is_frozen: bool
  ) -> tuple[bool, bool]:
    """Return whether f and g are learned.

    Args:
      channel_weights: config.transfer.channel_weights.
      pair_weights: config.transfer.pair_weights.
      is_frozen: True if a map gives the weights.
    """
    return (
      self.learn_channels and channel_weights == "learned" and not is_frozen,
      self.learn_pairs and pair_weights == "learned" and not is_frozen,
    )


METHODS = {
  # Cross-entropy alone.
  "scratch": Method(),
  # Cross-entropy, initialised with the source's weights where shapes match.
  "finetune": Method(starts_from_source=True),
  # Baselines without a target network: the source, frozen or fine-tuned, with a
  # new linear classifier.
  "linear_probe": Method(trains="classifier"),
  "finetune_source": Method(trains="source"),
  # Learning without Forgetting, attention transfer, and both.
  "lwf": Method(("lwf",)),
  "at": Method(("attention",), "one_to_one"),
  "lwf_at": Method(("lwf", "attention"), "one_to_one"),
  # Knowledge distillation; source and target have the same classes.
  "kd": Method(("kd",)),
  # Attention-based feature distillation: pair weights learned with the target.
  "afd": Method(("afd",), "all_to_all"),
  # Adaptive feature transfer: one weight per channel of the last features.
  "aft": Method(("aft",), "single"),
  # Feature matching with fixed, uniform weights.
  "fm_single": Method(("matching",), "single"),
  "fm_one_to_one": Method(("matching",), "one_to_one"),
  "fm_all_to_all": Method(("matching",), "all_to_all"),
  # The same with pairs that `l2t_jax.table` searches for, or that
  # config.transfer.pairs lists.
  "fm_search": Method(("matching",), ""),
  # What to transfer: only channel weights are learned.
  "l2t_w_single": Method(("matching",), "single", learn_channels=True),
  "l2t_w_one_to_one": Method(("matching",), "one_to_one", learn_channels=True),
  # What and where to transfer: the paper's method.
  "l2t_ww": Method(
    ("matching",), "all_to_all", learn_channels=True, learn_pairs=True
  ),
  # l2t_ww without a look-ahead. λ is a softmax over the pairs, because the loss
  # of the real update would drive an unconstrained λ to 0.
  "l2t_ww_joint": Method(
    ("matching",),
    "all_to_all",
    learn_channels=True,
    learn_pairs=True,
    looks_ahead=False,
  ),
}


# Methods that can be combined with one that matches features.
ADDABLE = ("lwf", "at", "kd")


class SourceOutputs(NamedTuple):
  """Outputs of the sources for the auxiliary losses; not differentiated."""

  logits: dict[str, jax.Array]  # source -> [N, K_s].
  matching: transfer.SourceMaps  # Empty if no pairs are compared.


class MixedLabels(NamedTuple):
  """The two labels of each mixed image."""

  first: jax.Array  # [B].
  second: jax.Array  # [B].
  shares: jax.Array  # Weight of the first label, [B].

  def soft(self, num_classes: int) -> jax.Array:
    """Return the labels as distributions over the classes, [B, K]."""
    of = lambda labels, shares: (
      shares[:, None] * jax.nn.one_hot(labels, num_classes, dtype=shares.dtype)
    )
    return of(self.first, self.shares) + of(self.second, 1 - self.shares)


class TransferBatch(NamedTuple):
  """A mini-batch, and the outputs of the sources for its images."""

  images: jax.Array  # [B, H, W, C].
  labels: jax.Array | MixedLabels  # [B].
  unlabeled: jax.Array | None = None  # [U, H, W, C].
  source: SourceOutputs | None = None  # For all N = B + U images.
  # Images of the outer loss; None for the labelled images above.
  outer: types.Labelled | None = None


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
  """The signature of the losses of a method."""

  def __call__(
    self,
    params: types.PyTree,
    weights: transfer.TransferWeights | None,
    model_state: types.PyTree,
    batch: TransferBatch,
  ) -> tuple[chex.Array, Aux]:
    """Return (loss [], Aux); differentiable in params and weights."""


class Losses(NamedTuple):
  """The losses of a method."""

  target: LossFn  # L_org.
  # Sum of the auxiliary losses without `added`; L_wfm in the paper's method.
  auxiliary: LossFn
  total: LossFn  # L_org + auxiliary.
  update: LossFn  # The loss of the real update: total + `added`.


def get_method(name: str) -> Method:
  """Return a method by name.

  Args:
    name: a key of `METHODS`; or a combination of one that matches features with
      some of `ADDABLE`, such as "kd+l2t_ww".

  Raises:
    errors.InputError: there is no such method.
  """
  names = name.split("+")
  if unknown := [one for one in names if one not in METHODS]:
    raise errors.InputError(
      f"unknown method {unknown[0]!r}; the methods are {', '.join(METHODS)}, or"
      " a combination such as kd+l2t_ww"
    )
  if len(names) == 1:
    return METHODS[name]
  matching = [one for one in names if "matching" in METHODS[one].losses]
  others = sorted(set(names).difference(matching))
  if (
    len(matching) != 1
    or len(others) < len(names) - 1
    or (set(others).difference(ADDABLE))
  ):
    raise errors.InputError(
      f"method {name!r} is not a combination of one method that matches"
      f" features (fm_* or l2t_*) with some of {', '.join(ADDABLE)}, each once,"
      " such as kd+l2t_ww"
    )
  method = METHODS[matching[0]]
  added = tuple(loss for one in others for loss in METHODS[one].losses)
  return method._replace(losses=(*method.losses, *added), added=added)


CLASSIFICATION = types.Task(
  loss_functions.cross_entropy, loss_functions.is_right
)


def smoothed(task: types.Task, smoothing: float) -> types.Task:
  """Return a task with label smoothing, for training.

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
      f"the task {name!r} is of type {type(task).__name__}; it must be a"
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


def attention(
  pairs: Sequence[pair_sets.Pair],
  *,
  beta: float,
  among: Sequence[pair_sets.Pair] = (),
) -> AuxiliaryLoss:
  """Return β times the sum over pairs of `loss_functions.attention_loss`.

  Args:
    pairs: the pairs to compare.
    beta: β.
    among: all pairs given to `transfer.prepare_source`, if `pairs` is a subset.
  """

  def loss_fn(params, weights, target, source):
    del params, weights
    losses = [
      loss_functions.attention_loss(
        transfer.source_map(source.matching, pair, among or pairs),
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
    pooled = transfer.mean_over_positions(target.features[tap])
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


def init_channel_scales(
  pairs: Sequence[pair_sets.Pair], source_taps: pair_sets.TapShapes
) -> dict[str, jax.Array]:
  """Initialise the logits of AFT's channel weights to 0, a weight of 1/2.

  Args:
    pairs: the target's taps, and the source's taps that each imitates.
    source_taps: shapes of the source's taps.

  Returns:
    target tap -> [ΣC_m], in the order of its pairs.
  """
  return {
    target: jnp.zeros(sum(source_taps[pair.source][-1] for pair in group))
    for target, group in pair_sets.by_target(pairs).items()
  }


def aft(pairs: Sequence[pair_sets.Pair], *, weight: float) -> AuxiliaryLoss:
  """Return weight times the sum over target taps of AFT's loss.

  Each term is the `loss_functions.kernel_distance` between the pooled features
  of the tap and those of its source taps, whose channels are weighted by
  sigmoid(params["aft"][tap]).
  """

  def loss_fn(params, weights, target, source):
    del weights
    losses = []
    for tap, group in pair_sets.by_target(pairs).items():
      wanted = [source.matching.pooled[pair.source] for pair in group]
      scales = jax.nn.sigmoid(params["aft"][tap])
      losses.append(
        loss_functions.kernel_distance(
          transfer.mean_over_positions(target.features[tap]),
          jnp.concatenate(wanted, axis=-1) * scales,
        )
      )
    return weight * jnp.sum(jnp.stack(losses)), {}

  return loss_fn


def afd(pairs: Sequence[pair_sets.Pair], *, weight: float) -> AuxiliaryLoss:
  """Return weight times L_AFD, see `attention_distillation`.

  Its metrics "pair_weights" and "distances" map each pair to the mean of α and
  of d over the batch.
  """

  def loss_fn(params, weights, target, source):
    del weights
    attention = attention_distillation.attention(
      params["afd"], source.matching.pooled, target.features, pairs
    )
    distances = attention_distillation.distances(
      source.matching.energies, target.features, pairs
    )
    losses = [
      jnp.mean(attention[name] * distance)
      for name, distance in distances.items()
    ]
    metrics = {
      "pair_weights": jax.tree.map(jnp.mean, attention),
      "distances": jax.tree.map(jnp.mean, distances),
    }
    return weight * jnp.sum(jnp.stack(losses)), metrics

  return loss_fn


def make_auxiliary_losses(
  method: Method,
  *,
  pairs: Sequence[pair_sets.Pair],
  attention_pairs: Sequence[pair_sets.Pair],
  head_tap: str,
  hyperparameters: Mapping[str, Mapping[str, float]],
) -> dict[str, AuxiliaryLoss]:
  """Make the losses that a method adds to L_org.

  Args:
    method: its `losses` name them.
    pairs: the pairs of features that losses compare.
    attention_pairs: the subset that attention transfer compares.
    head_tap: the target's tap that LwF's heads read.
    hyperparameters: group of the config, such as "lwf" -> name -> value.

  Returns:
    Name -> loss, for `make_losses`.
  """
  of = hyperparameters
  makers = {
    "matching": lambda: matching(pairs, **of["transfer"]),
    "attention": lambda: attention(attention_pairs, among=pairs, **of["at"]),
    "lwf": lambda: lwf(head_tap, **of["lwf"]),
    "kd": lambda: kd(**of["kd"]),
    "aft": lambda: aft(pairs, **of["aft"]),
    "afd": lambda: afd(pairs, weight=of["afd"]["weight"]),
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
  *,
  added: Collection[str] = (),
) -> Losses:
  """Build the losses of a target network in train mode.

  Unlabelled images take a forward pass of their own, so that L_org, the batch
  statistics that it is computed with, and the running statistics do not depend
  on them.

  Args:
    apply_fn: the target network.
    auxiliary: name -> loss to add to L_org.
    task: defines L_org and the metric "accuracy".
    added: names of the auxiliary losses that only the real update uses.

  Returns:
    The losses. The metrics of `target` are the scalars "target_loss" and
    "accuracy"; those of `auxiliary` are "NAME_loss" and the metrics of each
    auxiliary loss; those of `total` and `update` are all of these and "loss".
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

  def make_loss(*, with_target, without=()):
    def loss_fn(params, weights, model_state, batch):
      logits, outputs, model_state = on_all_images(params, model_state, batch)
      metrics: dict[str, Any] = {}
      if with_target:
        target_loss, metrics = on_labels(logits, batch)
      loss = jnp.zeros(())
      for name in [name for name in auxiliary if name not in without]:
        auxiliary_fn = auxiliary[name]
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
    make_loss(with_target=False, without=added),
    make_loss(with_target=True, without=added),
    make_loss(with_target=True),
  )
