"""Which taps are proposed, by the names and maps of submodules."""

import pytest

from l2t_jax.models import blocks


def _tree(**modules):
  """Return (submodule -> (H, W, C), submodules without a map).

  Args:
    **modules: name -> size of the module's map, or (size, modules inside it).
      A size of 0 stands for no output, -1 for an output that is no map.
  """
  taps, others = {}, []

  def add(name, module, path):
    size, inside = module if isinstance(module, tuple) else (module, {})
    for key, part in inside.items():
      add(key, part, [*path, name])
    full = "/".join([*path, name])
    if size > 0:
      taps[full] = (size, size, 8)
    elif size < 0:
      others.append(full)

  for name, module in modules.items():
    add(name, module, [])
  return taps, others


def _listed(*modules):
  """A list of modules, which returns nothing itself."""
  return 0, {str(i): module for i, module in enumerate(modules)}


def _chain(*modules):
  """A module that calls others one after the other, such as `Sequential`."""
  last = modules[-1]
  size = last[0] if isinstance(last, tuple) else last
  return size, {str(i): module for i, module in enumerate(modules)}


def _bottleneck(size, stride=1, **parts):
  inner = {"conv1": size * stride, "norm1": size * stride, "conv2": size}
  return size, inner | parts


def _convs(*sizes):
  """A block whose layers are modules of a convolution and a norm."""
  return _chain(*((size, {"conv": size, "norm": size}) for size in sizes))


def _attention(size):
  """A block of a transformer; its attention returns a tuple."""
  parts = {"qkv": size, "out": size}
  mlp = (size, {"fc1": size, "fc2": size})
  return size, {"norm1": size, "attn": (-1, parts), "norm2": size, "mlp": mlp}


_NORM = (32, {"act": 32})  # A norm with a submodule.
_STEM = {"conv1": 32, "bn1": 32, "relu": 32}
_STAGES = [
  _chain(_bottleneck(16, 2, downsample=_chain(16, 16)), _bottleneck(16)),
  _chain(_bottleneck(8, 2, downsample=_chain(8, 8)), _bottleneck(8)),
  _chain(_bottleneck(4, 2, downsample=_chain(4, 4)), _bottleneck(4)),
]


@pytest.mark.parametrize(
  ("modules", "expected"),
  [
    # Stages by name, as in torchvision's ResNet.
    (
      _STEM | {f"layer{i}": stage for i, stage in enumerate(_STAGES, start=1)},
      ("layer1", "layer2", "layer3"),
    ),
    # Stages in a list; blocks in lists of lists.
    (
      _STEM | {"stages": _listed(*_STAGES), "pool": 1, "fc": -1},
      ("stages/0", "stages/1", "stages/2"),
    ),
    (
      _STEM | {"stages": _listed(*((0, s[1]) for s in _STAGES))},
      ("stages/0/1", "stages/1/1", "stages/2/1"),
    ),
    # A network inside a network.
    (
      {"net": (-1, _STEM | {"encoder": _chain(*_STAGES)})},
      ("net/encoder/0", "net/encoder/1", "net/encoder/2"),
    ),
    # One module that holds all stages, as in EfficientNet.
    (
      {"conv_stem": 32, "bn1": _NORM, "blocks": _chain(*_STAGES)},
      ("blocks/0", "blocks/1", "blocks/2"),
    ),
    # Its first blocks are simpler.
    (
      {"conv": 32, "blocks": _listed(_bottleneck(32), *_STAGES)},
      ("blocks/0", "blocks/1", "blocks/2", "blocks/3"),
    ),
    # Blocks without skips, as in MobileNetV2: 16x16 is last in features/3.
    (
      {
        "features": _chain(
          _convs(32), _convs(32, 16), _convs(16, 16), _convs(16, 8)
        )
      },
      ("features/0", "features/2", "features/3"),
    ),
    # Simple blocks before ones with modules inside, as in EfficientNetV2.
    (
      {"conv": 32}
      | {
        f"Fused_{i}": _bottleneck(size, norm2=size)
        for i, size in enumerate((32, 16, 16))
      }
      | {f"MBConv_{i}": _convs(size, size) for i, size in enumerate((8, 4))},
      ("Fused_0", "Fused_2", "MBConv_0", "MBConv_1"),
    ),
    # Single layers that are modules, before and after, as in GoogLeNet.
    (
      {"conv1": (32, {"conv": 32}), "conv2": (16, {"conv": 16})}
      | {f"inception{i}": _convs(size, size) for i, size in enumerate((8, 4))}
      | {"conv3": (4, {"conv": 4, "norm": 4})},
      ("inception0", "inception1"),
    ),
    # Stages that end by lowering the resolution, as in Swin.
    (
      {
        "embed": 16,
        "layers_0": _chain(_attention(16), _attention(16), _bottleneck(8)),
        "layers_1": _chain(_attention(8), _attention(8), _bottleneck(4)),
        "layers_2": _chain(_attention(4), _attention(4)),
      },
      ("layers_0/1", "layers_1/1", "layers_2"),
    ),
    # One block that is called several times.
    (
      {"patches": 4, "block": _attention(4)}
      | {f"block#{i}": 4 for i in range(1, 6)},
      ("block", "block#2", "block#3", "block#5"),
    ),
    # A stem with blocks of its own before a transformer.
    (
      {"stem": _convs(16, 8)} | {f"block_{i}": _attention(4) for i in range(2)},
      ("block_0", "block_1"),
    ),
    # An encoder and a decoder.
    (
      {"encoder": _chain(*_STAGES), "decoder": _chain(_convs(8), _convs(16))},
      ("encoder/2", "decoder/0", "decoder/1"),
    ),
    # Stages without numbers; each ends as its last block does.
    (
      {
        "stem": _convs(32, 16),
        "early": _chain(_convs(16, 16), _convs(16, 16)),
        "middle": _chain(_convs(16, 8), _convs(8, 8)),
        "late": _chain(_convs(8, 4), _convs(4, 4)),
      },
      ("early", "middle", "late"),
    ),
    # A stem and an encoder that share a resolution.
    (
      {"stem": _chain(16, 16), "encoder": _chain(*_STAGES[:2])},
      ("encoder/0", "encoder/1"),
    ),
    # Transformers.
    (
      {"patches": 4, "blocks": _chain(*[_attention(4)] * 12), "norm": 4},
      ("blocks/2", "blocks/5", "blocks/8", "blocks/11"),
    ),
    (
      {
        "embed": (4, {"proj": _chain(4, 4)}),
        "encoder": (4, {f"block_{i}": _attention(4) for i in range(3)}),
      },
      ("encoder/block_0", "encoder/block_1", "encoder/block_2"),
    ),
    (
      {"conv": 8, "blocks": _listed(*[_attention(4)] * 2)},
      ("blocks/0", "blocks/1"),
    ),
    # Without blocks: the last layer of each resolution.
    (
      {"conv1": 16, "conv2": 16, "pool": 8, "conv3": 8, "mean": 1},
      ("conv2", "conv3"),
    ),
    (
      {"conv1": 16, "attention": (8, {"qkv": 8}), "conv2": 4},
      ("conv1", "attention", "conv2"),
    ),
    (
      {"features": _chain(16, 16, 8, 8, 4), "head": (-1, {"0": -1})},
      ("features/1", "features/3", "features/4"),
    ),
    ({"block": _bottleneck(16, 2), "head": -1}, ("block",)),
    ({"conv": 16, "norm": 16}, ("norm",)),
    ({"layer0": 4, "layer1": 4, "norm": 4}, ("layer0", "layer1")),
    ({"mean": 1}, ("mean",)),
  ],
)
def test_proposals(modules, expected):
  taps, others = _tree(**modules)
  proposed = blocks.propose_taps(taps, others, (64, 64, 3))
  assert proposed == expected
