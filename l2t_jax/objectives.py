"""Training methods as losses with one signature, `types.InnerLossFn`.

Every loss reads `params = {"target": ..., "regressors": ...}`, the transfer
weights of the batch in the place of the meta-parameters, the target's batch
statistics, and a `TransferBatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from l2t_jax import transfer, types


class Method(NamedTuple):
  """What a value of `config.method` stands for."""

  pair_set: str | None  # The pairs that it names; None: no transfer.
  learn_channels: bool = False  # Whether f is learned.
  learn_pairs: bool = False  # Whether g is learned.


METHODS = {
  # Cross-entropy alone.
  "scratch": Method(None),
  # Feature matching with fixed, uniform weights.
  "fm_single": Method("single"),
  "fm_one_to_one": Method("one_to_one"),
  "fm_all_to_all": Method("all_to_all"),
  # What to transfer: channel weights alone are learned.
  "l2t_w_single": Method("single", learn_channels=True),
  "l2t_w_one_to_one": Method("one_to_one", learn_channels=True),
  # What and where: the paper's method.
  "l2t_ww": Method("all_to_all", learn_channels=True, learn_pairs=True),
}


class TransferBatch(NamedTuple):
  """A mini-batch with what the matching reads of the source."""

  images: jax.Array  # [B, H, W, C].
  labels: jax.Array  # [B].
  source: transfer.SourceMaps | None  # None: no transfer.


class Losses(NamedTuple):
  """The three losses of the method."""

  target: types.InnerLossFn  # L_org.
  matching: types.InnerLossFn  # L_wfm.
  total: Any  # L_org + L_wfm, with metrics; see `make_losses`.


def get_method(name: str) -> Method:
  """Look a method up; raise `types.InputError` for an unknown name."""
  if name not in METHODS:
    raise types.InputError(
      f"unknown method {name!r}; the methods are {', '.join(METHODS)}"
    )
  return METHODS[name]


def cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Mean softmax cross-entropy of logits [B, K] and labels [B]; in nats."""
  chex.assert_rank([logits, labels], [2, 1])
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  )


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Share of the images whose largest logit is their label's, [B, K], [B]."""
  return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def make_losses(
  apply_fn: types.ApplyFn, pairs: Sequence[transfer.Pair], *, beta: float
) -> Losses:
  """Build the losses of a target network in train mode.

  Args:
    apply_fn: the target network.
    pairs: the set C; empty for no transfer.
    beta: β, weight of the matching loss.

  Returns:
    The losses. What `total` returns beside the loss is
    (model_state, metrics), metrics being scalars but for
    "distances", pair -> mean over the batch of Σ_c w_c d_c.
  """

  def forward(params, model_state, batch):
    return apply_fn(params["target"], model_state, batch.images, train=True)

  def distances(params, features, batch):
    return transfer.channel_distances(
      params["regressors"], features, batch.source, pairs
    )

  def target(params, weights, model_state, batch):
    del weights
    logits, _, model_state = forward(params, model_state, batch)
    return cross_entropy(logits, batch.labels), model_state

  def matching(params, weights, model_state, batch):
    _, features, model_state = forward(params, model_state, batch)
    distance = distances(params, features, batch)
    return transfer.matching_loss(distance, weights, beta=beta), model_state

  def total(params, weights, model_state, batch):
    logits, features, model_state = forward(params, model_state, batch)
    target_loss = cross_entropy(logits, batch.labels)
    metrics = {
      "target_loss": target_loss,
      "accuracy": accuracy(logits, batch.labels),
    }
    loss = target_loss
    if pairs:
      distance = distances(params, features, batch)
      match = transfer.matching_loss(distance, weights, beta=beta)
      loss += match
      metrics["matching_loss"] = match
      metrics["distances"] = {
        name: jnp.mean(jnp.sum(weights.channel[name] * d, axis=-1))
        for name, d in distance.items()
      }
    metrics["loss"] = loss
    return loss, (model_state, metrics)

  return Losses(target, matching, total)
