"""The vocabulary: states, batches and the functions that a user hands in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax

# Any nested container of arrays.
PyTree = Any


class Batch(NamedTuple):
  """One mini-batch of labelled images, with others that have no labels."""

  images: jax.Array  # [B, H, W, C] float32, normalised.
  # [B] int32, 0 .. num_classes - 1; or [B, ...], what another task reads.
  labels: jax.Array
  unlabeled: jax.Array | None = None  # [U, H, W, C], or None.


class EvalBatch(NamedTuple):
  """A batch of fixed size whose last images may be padding."""

  images: jax.Array  # [B, H, W, C] float32, normalised.
  labels: jax.Array  # As in Batch.
  mask: jax.Array  # [B] float32, 1 for an image, 0 for padding.


class InnerState(NamedTuple):
  """What one step of inner training reads and writes."""

  params: PyTree  # What the inner optimizer updates.
  opt_state: PyTree  # Its state: the momentum buffer is in here.
  model_state: PyTree  # Carried but not differentiated: batch statistics.


class TrainState(NamedTuple):
  """Everything that a run needs to go on; what a checkpoint holds."""

  step: jax.Array  # [] int32, iterations done.
  inner: InnerState  # Target and regressors after the last real update.
  meta_params: PyTree  # Parameters of f and g; empty where none is learned.
  meta_opt_state: PyTree  # Adam's moments for meta_params.


class Task(NamedTuple):
  """What the target learns from labelled images: L_org, and how it is judged.

  Outputs are what the network returns in the place of logits, [B, ...]; labels
  are what the data hold for each image, [B, ...].
  """

  loss: Callable[[chex.Array, chex.Array], chex.Array]  # -> [], a mean.
  # -> [B], one value an image, more being better: what the best epoch is chosen
  # by, and recorded as "accuracy".
  accuracy: Callable[[chex.Array, chex.Array], chex.Array]


class InnerLossFn(Protocol):
  """A loss that the inner optimizer minimises."""

  def __call__(
    self,
    params: PyTree,
    meta_params: PyTree,
    model_state: PyTree,
    batch: PyTree,
  ) -> tuple[chex.Array, PyTree]:
    """Return (loss [], new model_state); differentiable in the first two."""


class ApplyFn(Protocol):
  """A network as a pure function."""

  def __call__(
    self,
    params: PyTree,
    model_state: PyTree,
    images: chex.Array,
    *,
    train: bool,
  ) -> tuple[chex.Array, dict[str, chex.Array], PyTree]:
    """Return (logits [B, K], features, new model_state).

    The features are a dict: name -> [B, H, W, C].
    """
