"""Paired differences between methods, over the seeds that both have."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import special

CONFIDENCE = 0.95


class Difference(NamedTuple):
  """The mean of paired differences, with a confidence interval."""

  mean: float
  half_width: float | None  # Of the interval; None for fewer than two seeds.
  values: tuple[float, ...]  # One per seed that both have.

  @property
  def low(self) -> float | None:
    return None if self.half_width is None else self.mean - self.half_width

  @property
  def high(self) -> float | None:
    return None if self.half_width is None else self.mean + self.half_width


def paired_difference(
  values: Mapping[Any, float], reference: Mapping[Any, float]
) -> Difference | None:
  """Compare two methods seed by seed.

  The interval is the one of the paired t-test: Student's t with n - 1 degrees
  of freedom, for n differences that are assumed to be normally distributed. It
  covers the variation between seeds alone, not that between splits or settings.

  Args:
    values: seed, or another key of a pair -> value of one method.
    reference: the same for the other method.

  Returns:
    values - reference, with the interval of confidence `CONFIDENCE`; None if no
    seed has both.
  """
  seeds = [seed for seed in values if seed in reference]
  if not seeds:
    return None
  differences = np.array([values[s] - reference[s] for s in seeds])
  count = len(seeds)
  half_width = None
  if count > 1:
    quantile = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    half_width = float(quantile * differences.std(ddof=1) / math.sqrt(count))
  return Difference(
    float(differences.mean()), half_width, tuple(differences.tolist())
  )
