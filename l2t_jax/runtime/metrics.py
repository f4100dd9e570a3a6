"""Metrics of iterations: on their way to the host, averages, bad numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import types
from l2t_jax.method import pair_sets

# Numbers of "transfer" for each pair, causes before what follows from them.
_BY_PAIR = ("distances", "pair_weights", "regressor_grad_norms")
_OF_META_UPDATE = {
  "outer_loss",
  "meta_grad_norm",
  "meta_grad_norms",
  "meta_update_norm",
}


class Packed(NamedTuple):
  """An iteration's metrics in one array: each one fetched costs its time."""

  numbers: jax.Array
  treedef: Any
  shapes: tuple[tuple[int, ...], ...]


def pack(metrics: types.PyTree) -> Packed:
  """Put metrics into one array, without waiting for them."""
  leaves, treedef = jax.tree.flatten(metrics)
  shapes = tuple(leaf.shape for leaf in leaves)
  return Packed(_concatenate(leaves), treedef, shapes)


def fetch(iterations: Sequence[Packed]) -> list[types.PyTree]:
  """Wait for packed metrics, and return them as they were, on the host."""
  fetched = jax.device_get([packed.numbers for packed in iterations])
  return [
    _unpack(numbers, packed)
    for numbers, packed in zip(fetched, iterations, strict=True)
  ]


@jax.jit
def _concatenate(leaves):
  return jnp.concatenate([leaf.ravel() for leaf in leaves])


def _unpack(numbers, packed):
  ends = np.cumsum([math.prod(shape) for shape in packed.shapes])
  leaves = [
    part.reshape(shape)
    for part, shape in zip(
      np.split(numbers, ends[:-1]), packed.shapes, strict=True
    )
  ]
  return jax.tree.unflatten(packed.treedef, leaves)


class Averages:
  """Means of metrics over iterations, each over those that have it.

  Sums are in float64 and grow by one iteration after the other, so that means
  do not depend on where a run was cut off and resumed.
  """

  def __init__(self):
    self._sums: dict[str, types.PyTree] = {}
    self._counts: dict[str, int] = {}

  def add(self, iterations: Sequence[Mapping[str, types.PyTree]]) -> None:
    """Add iterations' metrics, numbers or trees of arrays by name."""
    for name in {name: None for metrics in iterations for name in metrics}:
      values = [metrics[name] for metrics in iterations if name in metrics]
      before = [self._sums[name]] if name in self._sums else []
      self._sums[name] = jax.tree.map(_sum_in_order, *before, *values)
      self._counts[name] = self._counts.get(name, 0) + len(values)

  def means(self) -> dict[str, types.PyTree]:
    """Return each metric's mean."""
    return {
      name: jax.tree.map(lambda x, n=self._counts[name]: x / n, value)
      for name, value in self._sums.items()
    }

  def to_json(self) -> dict[str, Any]:
    """Return what `from_json` makes the same averages of."""
    return {
      "sums": jax.tree.map(lambda x: x.tolist(), self._sums),
      "counts": dict(self._counts),
    }

  @classmethod
  def from_json(cls, content: Mapping[str, Any]) -> Averages:
    """Go on where `to_json` was."""
    averages = cls()
    is_list = lambda x: isinstance(x, list)
    averages._sums = jax.tree.map(np.float64, content["sums"], is_leaf=is_list)
    averages._counts = dict(content["counts"])
    return averages


def _sum_in_order(*values):
  """Sum as if one after the other came; `np.sum` would add in pairs."""
  return np.add.accumulate(np.array(values, np.float64))[-1]


def scalars(metrics: Mapping[str, types.PyTree]) -> dict[str, float]:
  """Return the metrics that are one number."""
  return {
    name: float(value)
    for name, value in metrics.items()
    if name != "transfer" and not np.ndim(value)
  }


def bad_numbers(
  metrics: Mapping[str, types.PyTree], pairs: Sequence[pair_sets.Pair] = ()
) -> list[str]:
  """Name the quantities that are NaN or infinite, with their pairs.

  Args:
    metrics: of an iteration, as `training.make_train_step` returns them.
    pairs: of the run.
  """
  transferred = metrics.get("transfer", {})
  named = {name: transferred[name] for name in _BY_PAIR if transferred}
  named |= {name: x for name, x in metrics.items() if name != "transfer"}
  bad = []
  for name, values in named.items():
    is_bad = ~np.isfinite(values)
    if not np.ndim(values):
      bad += [f"{name} ({values})"] if is_bad else []
    elif is_bad.all() and len(pairs) > 1:
      bad.append(f"{name} of all {len(pairs)} pairs")
    else:
      where = zip(pairs, is_bad, strict=True)
      bad += [f"{name} of {pair.name}" for pair, one in where if one]
  return bad


def without_bad_numbers(
  metrics: Mapping[str, types.PyTree],
) -> dict[str, types.PyTree]:
  """Leave out what a skipped iteration, or its skipped meta update, says."""
  kept = () if metrics["skipped"] else metrics.keys() - _OF_META_UPDATE
  return {name: metrics[name] for name in ("skipped", *kept)}
