"""Paired differences over seeds."""

import csv

import numpy as np
import pytest
from scipy import stats

from l2t_jax.results import statistics, table_picture, tables
from tests.results import test_tables


def test_a_difference_by_hand():
  """Differences 1, 2, 3: t of 0.975 with 2 degrees of freedom is 4.3027."""
  values = {0: 2.0, 1: 5.0, 2: 4.0, 7: 9.0}
  reference = {2: 1.0, 1: 3.0, 0: 1.0, 8: 0.0}
  found = statistics.paired_difference(values, reference)
  assert found.mean == pytest.approx(2.0)
  assert found.values == (1.0, 2.0, 3.0)
  half = 4.302653 / np.sqrt(3)
  assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


def test_too_few_seeds_have_no_interval():
  assert statistics.paired_difference({0: 1.0}, {1: 1.0}) is None
  found = statistics.paired_difference({0: 1.5}, {0: 1.0})
  assert found == (0.5, None, (0.5,))
  assert found.low is found.high is None


def test_it_is_the_interval_of_the_paired_t_test():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 9))
  found = statistics.paired_difference(dict(enumerate(a)), dict(enumerate(b)))
  expected = stats.ttest_rel(a, b).confidence_interval(statistics.CONFIDENCE)
  assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_covers_as_often_as_it_says():
  rng = np.random.default_rng(1)
  covered = 0
  for _ in range(2_000):
    shared = rng.normal(scale=5, size=6)  # What pairing takes away.
    a = dict(enumerate(shared + rng.normal(loc=0.3, size=6)))
    b = dict(enumerate(shared))
    found = statistics.paired_difference(a, b)
    covered += found.low <= 0.3 <= found.high
  assert 0.935 <= covered / 2_000 <= 0.965


def test_tables_show_differences_to_the_reference():
  cells = [
    test_tables._cell("scratch", "a", (60.0, 61.0, 62.0)),
    test_tables._cell("lwf", "a", (62.0, 63.0, 65.0)),
    test_tables._cell("kd", "a", (61.0,), num_seeds=3),
  ]
  grid = tables.make_grid(cells, "scratch")
  compared = stats.ttest_1samp([2.0, 2.0, 3.0], 0.0).confidence_interval(0.95)
  low, high = f"{compared.low:.1f}", f"{compared.high:.1f}"
  text = tables.to_markdown(grid)
  assert "| method | test % | validation % | minus scratch |" in text
  assert f"| +2.3 [{low}, {high}] |" in text
  assert "| +1.0 |" in text
  assert "over the seeds that both have (1 or 3)" in text
  scratch, lwf, kd = csv.DictReader(tables.to_csv(grid).splitlines())
  assert scratch["reference"] == scratch["difference"] == ""
  assert lwf["reference"] == "scratch"
  assert float(lwf["difference_low"]) == pytest.approx(compared.low, abs=1e-4)
  assert (lwf["paired_seeds"], kd["paired_seeds"], kd["difference_low"]) == (
    "3",
    "1",
    "",
  )
  # Of several columns, they have a table of their own.
  cells += [cell._replace(column="b", in_percent=False) for cell in cells[:2]]
  text = tables.to_markdown(tables.make_grid(cells, "scratch"))
  assert "**Test accuracy minus that of scratch**" in text
  assert "| `lwf` | +2.3 [" in text
  assert "| +0.023 [" in text


def test_without_a_reference_nothing_is_compared():
  cells = [test_tables._cell("scratch", "a", (60.0, 61.0))]
  assert "minus" not in tables.to_markdown(tables.make_grid(cells))


def test_the_picture_shows_intervals_around_differences():
  cells = [
    test_tables._cell("scratch", "a", (60.0, 61.0, 62.0)),
    test_tables._cell("lwf", "a", (62.0, 63.0, 65.0)),
  ]
  fig = table_picture.draw(cells, "scratch")
  (ax,) = fig.axes
  whisker, mean, seeds, zero = ax.get_lines()
  half = 4.302653 * np.std([2, 2, 3], ddof=1) / np.sqrt(3)
  np.testing.assert_allclose(
    whisker.get_xdata(), [7 / 3 - half, 7 / 3 + half], rtol=1e-6
  )
  assert mean.get_xdata() == pytest.approx(7 / 3)
  np.testing.assert_allclose(seeds.get_xdata(), [2, 2, 3])
  assert list(zero.get_xdata()) == [0, 0]
  assert ax.get_xlim()[0] < 0 < ax.get_xlim()[1]
  assert [tick.get_text() for tick in ax.get_yticklabels()] == ["lwf"]
  texts = [text.get_text() for text in fig.texts]
  assert "Test accuracy minus that of scratch, seed by seed" in texts
