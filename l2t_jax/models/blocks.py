"""Find the blocks of a network from the names and outputs of its submodules.

The names of submodules form a tree: "encoder/block_0/conv" is inside
"encoder/block_0". Lists and dicts of modules have no output; their members
count as submodules of the module that holds the list. Blocks are the modules on
one level of the tree that have submodules of their own. Layers inside a block
are never proposed as taps: the last map of a resolution is often computed by
the first layers of the block that reduces the resolution.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import re

from l2t_jax.models import scans

Shape = tuple[int, int, int]  # (H, W, C).
_Parts = Mapping[str, Sequence[str]]  # Module (root: "") -> its submodules.
_Sizes = Mapping[str, tuple[int, int]]  # Module -> (H, W) of its map.
# Number of blocks to propose if all have the same resolution.
_NUM_PROPOSED = 4
# A module with at most this many submodules (convolution, norm, activation) may
# be a single layer.
_SINGLE_LAYER = 3


def propose_taps(
  taps: Mapping[str, Shape], others: Collection[str], image_shape: Shape
) -> tuple[str, ...]:
  """Propose the last block of each resolution.

  If all blocks have the same resolution, as in a transformer, propose four of
  them, evenly spaced. A network without blocks is a chain of layers, of which
  the last one of each resolution is proposed.

  Args:
    taps: submodule -> shape of its map, in the order of computation.
    others: submodules whose output is not a map.
    image_shape: shape of an image.
  """
  # A map with a single position is the result of pooling.
  sizes = {name: x[:2] for name, x in taps.items() if x[0] * x[1] > 1}
  if not sizes:
    return tuple(taps)[-1:]
  parts = _find_parts([*taps, *others])
  level = _find_level(parts, sizes, image_shape[:2])
  layers = [name for name in sizes if name in level]
  blocks = _without_stem([n for n in layers if n in parts], parts)
  if len({sizes[name] for name in blocks}) > 1:
    return _last_of_each_size(blocks, sizes)
  # Without repeated blocks on this level, look for them one level deeper.
  while len(repeated := _most_repeated(blocks)) < 2:
    holders = _find_holders(level, parts)
    if len({sizes[name] for name in layers}) > 1 or not holders:
      break
    level = _open(level, holders, parts)
    blocks = [name for name in sizes if name in level and name in parts]
  if len(repeated) > 1:
    return _spread(repeated)
  if len({sizes[name] for name in layers}) > 1:
    return _last_of_each_size(layers, sizes)
  return _spread(_most_repeated(blocks or layers or list(sizes)))


def _find_parts(names) -> dict[str, list[str]]:
  """Return module -> the modules directly inside it."""
  names = dict.fromkeys(names)
  parts: dict[str, list[str]] = {"": []}
  for name in names:
    holder = name.rpartition("/")[0]
    while holder and holder not in names:  # A list or dict of modules.
      holder = holder.rpartition("/")[0]
    parts.setdefault(holder, []).append(name)
  # Layers of a scan are blocks; their submodules are not visible.
  parts |= {name: [] for name in names if scans.is_layer(name)}
  for name in names:
    first_call = name.partition("#")[0]
    if first_call in parts:  # Further calls share the submodules.
      parts[name] = parts[first_call]
  return parts


def _find_level(parts: _Parts, sizes: _Sizes, image_size) -> list[str]:
  """Return the modules on the level of the blocks."""
  level = list(parts[""])
  while to_open := [
    name
    for name in level
    if name in parts and _holds_blocks(name, level, parts, sizes, image_size)
  ]:
    level = _open(level, to_open, parts)
  return level


def _holds_blocks(name, level, parts, sizes, image_size):
  """Return whether a module, such as an encoder, holds blocks or is a block."""
  others = [other for other in level if other != name]
  is_alone = not any(other in parts and other in sizes for other in others)
  inner = [part for part in parts[name] if part in parts]
  if not inner:  # A chain of layers, such as VGG's.
    return is_alone and len({sizes.get(part) for part in parts[name]}) > 2
  inner_sizes = {sizes[part] for part in inner if part in sizes}
  if _find_holders(level, parts) == [name]:
    return is_alone or len(inner_sizes) > 1 or len(_most_repeated(inner)) > 1
  # A stage that reduces the resolution at its end, as in Swin.
  if {sizes.get(part) for part in _find_holders(inner, parts)} - {
    sizes.get(name),
    None,
  }:
    return True
  # It passes through resolutions that none of its siblings has. A stem may do
  # so too, but only through one.
  beside = {sizes.get(other) for other in others}
  new = inner_sizes - beside - {image_size, sizes.get(name)}
  is_first = name == next(other for other in level if other in parts)
  return len(new) > int(is_first)


def _find_holders(level, parts):
  """Return the modules whose submodules have submodules."""
  return [
    name for name in level if any(part in parts for part in parts.get(name, ()))
  ]


def _without_stem(blocks, parts):
  """Drop stems, and single layers that form a module with their norm.

  The main kinds of blocks are the repeated ones, or else modules with nested
  submodules. Everything before the first block of a main kind is the stem.
  """
  kinds = [_kind(name) for name in blocks]
  holders = _find_holders(blocks, parts)
  is_single = {
    name: name not in holders and 0 < len(parts[name]) <= _SINGLE_LAYER
    for name in blocks
  }
  main = {_kind(n) for n in blocks if not is_single[n]}
  main = {kind for kind in main if kinds.count(kind) > 1}
  main = main or {_kind(name) for name in holders}
  if not main:
    return blocks
  start = next(i for i, kind in enumerate(kinds) if kind in main)
  return [n for n in blocks[start:] if _kind(n) in main or not is_single[n]]


def _open(level, names, parts):
  """Replace modules by their submodules."""
  opened = lambda name: parts[name] if name in names else [name]
  return [part for name in level for part in opened(name)]


def _most_repeated(names):
  """Return the names of the most frequent kind, which differ only in numbers.

  If no kind is repeated, return the last name.
  """
  kinds: dict[str, list[str]] = {}
  # In reverse order, so that the last kind wins ties.
  for name in reversed(names):
    kinds.setdefault(_kind(name), []).append(name)
  return max(kinds.values(), key=len, default=[])[::-1]


def _kind(name):
  """Return a name without its numbers."""
  return re.sub(r"#?\d+", "", name)


def _last_of_each_size(names, sizes):
  """Return the last name per resolution, in the order of computation."""
  last = {sizes[name]: name for name in names}.values()
  return tuple(name for name in names if name in last)


def _spread(names):
  """Return a few names, evenly spaced, including the last one."""
  count = min(_NUM_PROPOSED, len(names))
  return tuple(names[(i + 1) * len(names) // count - 1] for i in range(count))
