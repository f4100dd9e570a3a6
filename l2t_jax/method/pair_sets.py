"""The set C: which source tap is compared with which target tap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

from l2t_jax import errors

# Names of taps in order of depth, with their shapes (H, W, C).
TapShapes = Mapping[str, tuple[int, int, int]]

PAIR_SETS = ("single", "one_to_one", "nearest", "all_to_all")


class Pair(NamedTuple):
  """A source tap and the target tap that is pulled towards it."""

  source: str
  target: str

  @property
  def name(self) -> str:
    return f"{self.source}->{self.target}"


def tap_name(source: str, tap: str) -> str:
  """Return "source/tap", or only the tap for a single source, named ""."""
  return f"{source}/{tap}" if source else tap


def make_pairs(
  pair_set: str | Sequence[str | Sequence[str]],
  source_taps: TapShapes,
  target_taps: TapShapes,
  *,
  untappable: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> tuple[Pair, ...]:
  """Choose the set C of candidate pairs.

  Args:
    pair_set: "single" (the last taps), "one_to_one" (taps of equal resolution),
      "nearest" (each target tap with the deepest source tap of the nearest
      resolution), "all_to_all", or a list of pairs, each "source->target" or
      (source, target); or such a list as one string, separated by commas.
    source_taps: the source's taps from shallow to deep.
    target_taps: the target's taps from shallow to deep.
    untappable: for source and target, layer -> reason why it cannot be tapped;
      errors about listed pairs quote it.

  Returns:
    The pairs, in source-major order or as listed.

  Raises:
    errors.InputError: a set or tap is unknown, a pair is listed twice, or there
      are no pairs.
  """
  if pair_set == "single":
    return (Pair(list(source_taps)[-1], list(target_taps)[-1]),)
  everything = tuple(Pair(m, n) for m in source_taps for n in target_taps)
  if pair_set == "all_to_all":
    return everything
  if pair_set == "one_to_one":
    pairs = of_equal_size(everything, source_taps, target_taps)
    if not pairs:
      raise errors.InputError(
        "pairs 'one_to_one': no source tap has the resolution of a target tap"
        f" ({_resolutions(source_taps)}; {_resolutions(target_taps)});"
        " use 'nearest', 'all_to_all' or list the pairs"
      )
    return pairs
  if pair_set == "nearest":
    # Resolutions are compared by their ratio, hence the logarithm. `min`
    # returns the first of several equals: in reversed order, the deepest tap.
    level = lambda shape: math.log(shape[0] * shape[1])
    nearest: dict[str, str] = {
      n: min(
        reversed(list(source_taps)),
        key=lambda m: abs(level(source_taps[m]) - level(shape)),
      )
      for n, shape in target_taps.items()
    }
    return tuple(p for p in everything if nearest[p.target] == p.source)
  if isinstance(pair_set, str) and "->" in pair_set:
    pair_set = pair_set.split(",")
  if isinstance(pair_set, str):
    raise errors.InputError(
      f"unknown pair set {pair_set!r}; use one of {', '.join(PAIR_SETS)}, or a"
      " list such as 'stage1_block5->conv2, stage3_block5->conv8'"
    )
  return _listed_pairs(pair_set, (source_taps, target_taps), untappable)


def of_equal_size(
  pairs: Sequence[Pair], source_taps: TapShapes, target_taps: TapShapes
) -> tuple[Pair, ...]:
  """Return the pairs whose taps have the same height and width."""
  size = lambda shape: tuple(shape[:2])
  return tuple(
    pair
    for pair in pairs
    if size(source_taps[pair.source]) == size(target_taps[pair.target])
  )


def by_target(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
  """Group pairs: target tap -> its pairs, in the given order."""
  groups: dict[str, list[Pair]] = {}
  for pair in pairs:
    groups.setdefault(pair.target, []).append(pair)
  return groups


def _resolutions(taps):
  return ", ".join(f"{name} {h}x{w}" for name, (h, w, _) in taps.items())


def _listed_pairs(pair_list, all_taps, all_untappable):
  pairs = []
  for entry in pair_list:
    parts = entry.split("->") if isinstance(entry, str) else tuple(entry)
    if len(parts) != 2:
      raise errors.InputError(
        f"pair {entry!r} is not of the form 'source->target'"
      )
    pair = Pair(*(part.strip() for part in parts))
    for side, tap, taps, untappable in zip(
      ("source", "target"), pair, all_taps, all_untappable, strict=True
    ):
      if tap in untappable:
        raise errors.InputError(f"pair {pair.name!r}: {untappable[tap]}")
      if tap not in taps:
        raise errors.InputError(
          f"pair {pair.name!r}: unknown {side} tap {tap!r}; the {side}'s taps"
          f" are {', '.join(taps)}"
        )
    if pair in pairs:
      raise errors.InputError(f"pair {pair.name!r} is listed twice")
    pairs.append(pair)
  if not pairs:
    raise errors.InputError(
      f"no pairs: use one of {', '.join(PAIR_SETS)}, or list at least one"
    )
  return tuple(pairs)
