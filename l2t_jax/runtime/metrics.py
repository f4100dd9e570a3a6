"""Metrics of iterations: their transfer to the host, averages, NaN values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import flatten_util
import numpy as np

from l2t_jax import types

# Metrics in "transfer" with one value per pair, causes of NaN values first.
_PER_PAIR = ("distances", "pair_weights", "regressor_grad_norms")
# Metrics of a meta update; they are dropped if only that update is skipped.
_META_UPDATE = {
  "outer_loss",
  "meta_grad_norm",
  "meta_grad_norms",
  "meta_update_norm",
}


class Packed(NamedTuple):
  """Metrics flattened into one array, so that one transfer fetches them."""

  numbers: jax.Array
  like: types.PyTree  # Shapes of the metrics, as `jax.typeof` returns them.


def pack(metrics: types.PyTree) -> Packed:
  """Flatten metrics on the device without waiting for them."""
  return Packed(_ravel(metrics), jax.tree.map(jax.typeof, metrics))


def fetch(iterations: Sequence[Packed]) -> list[types.PyTree]:
  """Wait for packed metrics and return them as NumPy arrays."""
  fetched = jax.device_get([packed.numbers for packed in iterations])
  return [
    _unravel(numbers, packed.like)
    for numbers, packed in zip(fetched, iterations, strict=True)
  ]


@jax.jit
def _ravel(metrics):
  return flatten_util.ravel_pytree(metrics)[0]


def _unravel(numbers, like):
  """Undo `_ravel` with NumPy; JAX's function would use arrays on a device."""
  ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(like)])
  parts = iter(np.split(numbers, ends[:-1]))
  return jax.tree.map(lambda leaf: next(parts).reshape(leaf.shape), like)


class Averages:
  """The mean of each metric over the iterations that have it.

  Sums are float64 and follow the order of iterations, so that means do not
  depend on where a run was interrupted and resumed.
  """

  def __init__(self):
    self._sums: dict[str, types.PyTree] = {}
    self._counts: dict[str, int] = {}

  def add(self, iterations: Sequence[Mapping[str, types.PyTree]]) -> None:
    """Add the metrics of iterations, name -> number or tree of arrays."""
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
    """Return the sums and counts as JSON, for `from_json`."""
    return {
      "sums": jax.tree.map(lambda x: x.tolist(), self._sums),
      "counts": dict(self._counts),
    }

  @classmethod
  def from_json(cls, content: Mapping[str, Any]) -> Averages:
    """Restore averages from `to_json`."""
    averages = cls()
    is_list = lambda x: isinstance(x, list)
    averages._sums = jax.tree.map(np.float64, content["sums"], is_leaf=is_list)
    averages._counts = dict(content["counts"])
    return averages


def _sum_in_order(*values):
  """Sum one value after the other; `np.sum` would add pairwise."""
  return np.add.accumulate(np.array(values, np.float64))[-1]


def scalars(metrics: Mapping[str, types.PyTree]) -> dict[str, float]:
  """Return the metrics that are single numbers."""
  return {
    name: float(value)
    for name, value in metrics.items()
    if name != "transfer" and not np.ndim(value)
  }


def bad_numbers(
  metrics: Mapping[str, types.PyTree], pair_names: Sequence[str] = ()
) -> list[str]:
  """Name the metrics that are NaN or infinite, with their pairs.

  Args:
    metrics: metrics of one iteration, as the training step returns them.
    pair_names: names of the pairs, in the order of the metrics' entries.
  """
  transferred = metrics.get("transfer", {})
  named = {name: transferred[name] for name in _PER_PAIR if name in transferred}
  named |= {name: x for name, x in metrics.items() if name != "transfer"}
  bad = []
  for name, values in named.items():
    is_bad = ~np.isfinite(values)
    if not np.ndim(values):
      bad += [f"{name} ({values})"] if is_bad else []
    elif is_bad.all() and len(pair_names) > 1:
      bad.append(f"{name} of all {len(pair_names)} pairs")
    else:
      where = zip(pair_names, is_bad, strict=True)
      bad += [f"{name} of {pair}" for pair, one in where if one]
  return bad


def without_bad_numbers(
  metrics: Mapping[str, types.PyTree],
) -> dict[str, types.PyTree]:
  """Drop the metrics of a skipped iteration, or of a skipped meta update.

  Args:
    metrics: metrics of one iteration, some of which are NaN or infinite.
  """
  kept = () if metrics["skipped"] else metrics.keys() - _META_UPDATE
  return {name: metrics[name] for name in ("skipped", *kept)}
