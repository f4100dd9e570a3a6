"""Metrics: transfer to the host, averages, and the names of NaN values."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.runtime import metrics


def test_bad_numbers_have_names():
  pairs = ["a->b", "c->d"]
  values = {
    "loss": np.inf,
    "accuracy": 0.5,
    "transfer": {
      "distances": np.array([np.nan, 1.0]),
      "pair_weights": np.array([1.0, 1.0]),
      "regressor_grad_norms": np.array([np.nan, np.nan]),
      "channel_weights": {},
    },
  }
  assert metrics.bad_numbers(values, pairs) == [
    "distances of a->b",
    "regressor_grad_norms of all 2 pairs",
    "loss (inf)",
  ]


def test_metrics_arrive_as_they_left():
  """For several seeds, and iterations with different metrics."""
  first = {"loss": jnp.array([1.0, 2.0]), "t": {"d": jnp.ones((2, 3))}}
  second = {"loss": jnp.array([3.0, jnp.nan]), "more": jnp.arange(2.0)}
  fetched = metrics.fetch([metrics.pack(first), metrics.pack(second)])
  jax.tree.map(np.testing.assert_array_equal, fetched, [first, second])


def test_averages_do_not_depend_on_where_they_were_cut():
  rng = np.random.default_rng(0)
  draw = lambda: {"x": rng.normal(), "t": {"y": rng.normal(size=3)}}
  values = [draw() | ({"z": 1.0} if i % 3 else {}) for i in range(40)]
  whole, cut = metrics.Averages(), metrics.Averages()
  whole.add(values)
  for some in (values[:1], values[1:9], values[9:]):
    cut.add(some)
    cut = metrics.Averages.from_json(json.loads(json.dumps(cut.to_json())))
  jax.tree.map(np.testing.assert_array_equal, cut.means(), whole.means())
  np.testing.assert_allclose(
    whole.means()["x"], np.mean([one["x"] for one in values]), rtol=1e-6
  )
  assert whole.means()["z"] == 1
