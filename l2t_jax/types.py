"""Shared types: batches, states, tasks, and the signatures of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax

# Any nested container of arrays.
PyTree = Any


class Mixing(NamedTuple):
  """How each image of a batch is mixed with its predecessor in the batch.

  The first image is mixed with the last one.
  """

  # [B] float32: weight of an image's own pixels outside of the box.
  share: chex.Array
  # [B, 4] int32: top, left, bottom and right of a box that the predecessor
  # covers; bottom and right are exclusive.
  box: chex.Array


class Labelled(NamedTuple):
  """Images with their labels."""

  images: jax.Array  # [B, H, W, C] float32, normalised.
  labels: jax.Array  # As in Batch.


class Batch(NamedTuple):
  """A mini-batch of labelled images and, optionally, further ones."""

  images: jax.Array  # [B, H, W, C] float32, normalised.
  # [B] int32, 0 .. num_classes - 1; or [B, ...] targets of another task.
  labels: jax.Array
  unlabeled: jax.Array | None = None  # [U, H, W, C], or None.
  mixing: Mixing | None = None  # For the labelled images; None for no mixing.
  # Images of the outer loss, without augmentation; None for the images above.
  outer: Labelled | None = None


class EvalBatch(NamedTuple):
  """A batch of a fixed size, in which the last images may be padding."""

  images: chex.Array  # [B, H, W, C] float32, normalised.
  labels: chex.Array  # As in Batch.
  mask: chex.Array  # [B] float32, 1 for an image, 0 for padding.


class InnerState(NamedTuple):
  """The state that one step of inner training updates."""

  params: PyTree  # Updated by the inner optimizer.
  opt_state: PyTree  # State of the inner optimizer, such as momentum.
  model_state: PyTree  # Batch statistics; not differentiated.


class TrainState(NamedTuple):
  """The complete state of training, as a checkpoint stores it."""

  step: jax.Array  # [] int32, iterations done.
  inner: InnerState  # Target and regressors after the last real update.
  meta_params: PyTree  # Parameters of f and g; empty if none is learned.
  meta_opt_state: PyTree  # Adam's moments for meta_params.
  # Moving averages of the target's parameters and batch statistics, which are
  # evaluated in their place; None to evaluate the target itself.
  average: PyTree = None


class Task(NamedTuple):
  """What the target learns from labelled images: a loss and an accuracy.

  Both take (outputs, labels): the network's outputs, [B, ...], logits in
  classification, and the labels of the data, [B, ...].
  """

  loss: Callable[[chex.Array, chex.Array], chex.Array]  # L_org, -> [], a mean.
  # -> [B], one value per image; higher is better. It selects the best epoch and
  # is recorded as "accuracy".
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
    """Return (loss [], new model_state).

    It must be differentiable in params and meta_params.
    """


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
