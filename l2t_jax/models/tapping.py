"""The layers of a network that can be tapped, and the choice of taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import fnmatch
import math
from typing import Any, NamedTuple

import jax

from l2t_jax import errors, types
from l2t_jax.models import blocks

Shape = blocks.Shape
# Largest number of prefix tokens (class, register) in front of a grid.
_MAX_PREFIX = 16


class Layout(NamedTuple):
  """The variables, outputs and taps of a network."""

  image_shape: Shape
  # Shapes of {"params": ..., and the collections of the model state}.
  variables: types.PyTree
  output_shape: tuple[int, ...]  # Shape of the output per image.
  taps: dict[str, Shape]  # Tap -> (H, W, C), in the order of computation.
  untappable: dict[str, str]  # Output that cannot be tapped -> the reason.
  default_taps: tuple[str, ...]  # The network's own choice; () for none.
  digest: str  # Of what it computes in eval mode, apart from variables' values.

  @property
  def num_outputs(self) -> int:
    """Number of logits K of an output [B, K]; 1 for [B]."""
    return (1, *self.output_shape)[-1]


def select_taps(
  layout: Layout, patterns: Sequence[str] = ()
) -> dict[str, Shape]:
  """Choose taps by name.

  Args:
    layout: the network's layout, from `trace`.
    patterns: names, or globs such as "stages_*/blocks_2", in which * matches
      any part of one name and ** also several names. () for the network's
      `default_taps` or, if it has none, those of `blocks.propose_taps`.

  Returns:
    Tap -> (H, W, C), in the order of computation.

  Raises:
    errors.InputError: no tap matches a pattern.
  """
  chosen = set()
  for pattern in patterns or layout.default_taps or _propose(layout):
    found = [name for name in layout.taps if _matches(name, pattern)]
    if not found:
      for name, reason in layout.untappable.items():
        if _matches(name, pattern):
          raise errors.InputError(reason)
      raise errors.InputError(
        f"unknown tap {pattern!r}; the network's taps are"
        f" {', '.join(layout.taps)}"
      )
    chosen.update(found)
  return {name: x for name, x in layout.taps.items() if name in chosen}


def explain_untappable(
  name: str, shape: tuple[int, ...], batch_size: int
) -> str:
  """Return the reason why an output of some shape cannot be tapped."""
  if not shape or shape[0] != batch_size:
    return (
      f"{name!r} cannot be tapped: its shape is {list(shape)} for {batch_size}"
      " images; the first axis must be that of the images"
    )
  return (
    f"{name!r} cannot be tapped: its shape is {['B', *shape[1:]]}, neither that"
    " of a map [B, H, W, C] nor of tokens [B, N, C] on the grid of a map or a"
    " square"
  )


def last_tap(shapes: Mapping[str, Shape]) -> str:
  """Return the tap that is computed last, or raise `errors.InputError`."""
  if not shapes:
    raise errors.InputError(
      "the network has no layer that could be tapped: none of its submodules"
      " returns a map [B, H, W, C] or tokens [B, N, C]; let it return (logits,"
      " features), a dict of such arrays"
    )
  return list(shapes)[-1]


def split(
  output: Any, outputs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
  """Return (logits, features) from the outputs of a network and its submodules.

  Args:
    output: the output of the network.
    outputs: name -> output of a submodule; these are the features if the
      network itself returns none.

  Returns:
    The logits, and name -> array. Keys of nested dicts are joined with "/".

  Raises:
    errors.InputError: the output is neither an array nor (logits, features).
  """
  is_pair = isinstance(output, tuple) and len(output) == 2
  if is_pair and isinstance(output[1], Mapping):
    output, outputs = output
  if not hasattr(output, "shape"):
    raise errors.InputError(
      f"the network returns a {type(output).__name__}; it must return logits or"
      " (logits, features), a dict of arrays"
    )
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x
    for path, x in jax.tree_util.tree_leaves_with_path(dict(outputs))
  }
  arrays = {name: x for name, x in named.items() if hasattr(x, "shape")}
  heads = [name for name in arrays if _has_heads(name, arrays)]
  return output, {name: x for name, x in arrays.items() if name not in heads}


def _has_heads(name, outputs):
  """Return whether an output is [B, N, heads, C] of attention, and no map."""
  x, whole = outputs[name], outputs.get(name.rpartition("/")[0])
  is_attention = x.ndim == 4 and whole is not None and whole.ndim == 3
  return is_attention and whole.shape[1] == x.shape[1]


def map_sizes(features: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
  """Return (H, W) of all maps [B, H, W, C] among features."""
  return tuple({x.shape[1:3]: None for x in features.values() if x.ndim == 4})


def as_map(
  x: Any, batch_size: int, maps: Sequence[tuple[int, int]] = ()
) -> Any:
  """Convert a feature to a map [B, H, W, C]; return None if it cannot be one.

  Args:
    x: a map or tokens [B, N, C].
    batch_size: B.
    maps: see `find_grid`.
  """
  if not x.size or x.shape[0] != batch_size:
    return None
  if x.ndim == 4:
    return x
  if x.ndim != 3:
    return None
  grid = find_grid(x.shape[1], maps)
  if grid is None:
    return None
  is_of_a_map = (grid.height, grid.width) in maps
  if not is_of_a_map and x.shape[2] in map(math.prod, maps):
    return None  # Transposed tokens [B, C, N], as inside an MLP-Mixer.
  return to_grid(x, grid)


class Grid(NamedTuple):
  """The grid that tokens lie on."""

  num_prefix: int  # Class, register and other tokens in front.
  height: int
  width: int


def find_grid(
  num_tokens: int, maps: Sequence[tuple[int, int]] = ()
) -> Grid | None:
  """Find the grid that tokens lie on, or None.

  Args:
    num_tokens: N.
    maps: (H, W) of the network's maps. The grid is the largest map whose number
      of positions is N minus a short prefix. If there is none, N or (with a
      class token) N - 1 must be a square number, and N at most the number of
      positions of the largest map.
  """
  for height, width in sorted(maps, key=math.prod, reverse=True):
    num_prefix = num_tokens - height * width
    # One position is the result of pooling, not a map of patches.
    if height * width > 1 and 0 <= num_prefix <= _MAX_PREFIX:
      return Grid(num_prefix, height, width)
  if maps and num_tokens > max(map(math.prod, maps)) > 1:
    return None
  for num_prefix in (0, 1):
    side = math.isqrt(max(num_tokens - num_prefix, 0))
    if side and side**2 == num_tokens - num_prefix:
      return Grid(num_prefix, side, side)
  return None


def to_grid(x: Any, grid: Grid) -> Any:
  """Drop the prefix of tokens [B, N, C]; reshape the rest to [B, H, W, C]."""
  _, height, width = grid
  return x[:, grid.num_prefix :].reshape(x.shape[0], height, width, x.shape[2])


def _propose(layout):
  last_tap(layout.taps)  # Raises if there is none.
  return blocks.propose_taps(layout.taps, layout.untappable, layout.image_shape)


def _matches(name, pattern):
  """Return whether a glob matches a name; only ** matches across "/"."""
  if "**" in pattern:
    return fnmatch.fnmatchcase(name, pattern)
  # Part by part, because the * of `fnmatch` also matches "/".
  parts, patterns = name.split("/"), pattern.split("/")
  return len(parts) == len(patterns) and all(
    map(fnmatch.fnmatchcase, parts, patterns)
  )
