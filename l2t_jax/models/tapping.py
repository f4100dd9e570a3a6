"""Which layers of a network can be tapped, and which are by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import fnmatch
import math
import re
from typing import NamedTuple

from l2t_jax import errors, types

Shape = tuple[int, int, int]
# As many taps are proposed where all have the same resolution.
_NUM_PROPOSED = 4


class Layout(NamedTuple):
  """What a network consists of."""

  image_shape: Shape
  # Shapes: {"params": ..., and the collections of its model state}.
  variables: types.PyTree
  output_shape: tuple[int, ...]  # Of what it makes of one image.
  taps: dict[str, Shape]  # Tap -> (H, W, C), in the order of computation.
  # Outputs that cannot be tapped: name -> shape.
  others: dict[str, tuple[int, ...]]
  default_taps: tuple[str, ...]  # The network's own choice; () for none.


def select_taps(
  layout: Layout, patterns: Sequence[str] = ()
) -> dict[str, Shape]:
  """Choose taps by name.

  Args:
    layout: of the network, from `trace`.
    patterns: names, or globs such as "stages_*/blocks_2", where * stands for
      any part of one name and ** for several. None: the network's
      `default_taps`, or else `propose_taps`.

  Returns:
    Tap -> (H, W, C), in the order of computation.

  Raises:
    errors.InputError: for a pattern that no tap fits.
  """
  chosen = set()
  for pattern in patterns or layout.default_taps or propose_taps(layout.taps):
    found = [name for name in layout.taps if _fits(name, pattern)]
    if not found:
      raise errors.InputError(_no_tap(pattern, layout))
    chosen.update(found)
  return {name: x for name, x in layout.taps.items() if name in chosen}


def no_taps(layout: Layout) -> dict[str, str]:
  """Say of the layers that cannot be tapped why; name -> reason."""
  return {
    name: (
      f"tap {name!r} has the shape {['B', *shape]}; taps are maps [B, H, W, C],"
      " or tokens [B, N, C] where N is a square number, or one more with a"
      " class token; none of these is 0"
    )
    for name, shape in layout.others.items()
  }


def last_tap(shapes: Mapping[str, Shape]) -> str:
  """Return the tap that is computed last, or raise `errors.InputError`."""
  if not shapes:
    raise errors.InputError(
      "the network has no layer that could be tapped: none of its submodules"
      " returns a map [B, H, W, C] or tokens [B, N, C]; let it return (logits,"
      " features), a dict of such arrays"
    )
  return list(shapes)[-1]


def propose_taps(shapes: Mapping[str, Shape]) -> tuple[str, ...]:
  """Propose taps where none are named: the last one of each resolution.

  Where all have the same, as in a transformer, four of the blocks that repeat,
  evenly spaced.

  Args:
    shapes: tap -> (H, W, C), in the order of computation.

  Raises:
    errors.InputError: there are none.
  """
  last = last_tap(shapes)
  # Small maps say little, and deep paths lead into the parts of a block.
  maps = {n: s[:2] for n, s in shapes.items() if s[0] * s[1] > 1}
  if len(maps) < 2:
    return (*maps,) or (last,)
  depths = sorted(name.count("/") for name in maps)
  maps = {n: size for n, size in maps.items() if n.count("/") <= depths[1]}
  by_size = {size: name for name, size in maps.items()}
  if len(by_size) > 1:
    return tuple(by_size.values())
  groups: dict[str, list[str]] = {}
  for name in maps:
    groups.setdefault(re.sub(r"\d+", "", name), []).append(name)
  blocks = max(groups.values(), key=len)
  if len(blocks) == 1:
    return tuple(by_size.values())
  count = min(_NUM_PROPOSED, len(blocks))
  return tuple(blocks[(i + 1) * len(blocks) // count - 1] for i in range(count))


def split(output, outputs):
  """Return (logits, features) of what a network and its submodules return."""
  if isinstance(output, tuple) and len(output) == 2:
    logits, features = output
    if isinstance(features, Mapping):
      return logits, dict(features)
  if not hasattr(output, "shape"):
    raise errors.InputError(
      f"the network returns a {type(output).__name__}; it must return logits or"
      " (logits, features), a dict of arrays"
    )
  return output, outputs


def as_map(x):
  """[B, H, W, C] as it is, tokens [B, N, C] as a square map, else None."""
  if not hasattr(x, "ndim") or not x.size:
    return None
  if x.ndim == 4:
    return x
  if x.ndim != 3:
    return None
  size, num_tokens, channels = x.shape
  for first in (0, 1):  # Without a class token, and with one.
    side = math.isqrt(max(num_tokens - first, 0))
    if side and side**2 == num_tokens - first:
      return x[:, first:].reshape(size, side, side, channels)
  return None


def _fits(name, pattern):
  if "**" in pattern:
    return fnmatch.fnmatchcase(name, pattern)
  parts, patterns = name.split("/"), pattern.split("/")
  return len(parts) == len(patterns) and all(
    map(fnmatch.fnmatchcase, parts, patterns)
  )


def _no_tap(pattern, layout):
  for name, reason in no_taps(layout).items():
    if _fits(name, pattern):
      return reason
  return (
    f"unknown tap {pattern!r}; the network's taps are {', '.join(layout.taps)}"
  )
