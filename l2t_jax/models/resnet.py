"""Residual networks (He et al., 2016) for small images and for ImageNet.

Submodules are named as in the authors' code (CIFAR) and in torchvision
(ImageNet), with "_" for the dot before a number: "blocks2.0" is "blocks2_0".
`l2t_jax.pretrained` maps weights by these names. Taps are the outputs of the
blocks after the ReLU, such as "stage2_block5" for the fifth block of the second
stage, and "penultimate", the input of the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
import jax

from l2t_jax.models import layers


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  features: int
  strides: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv, norm = layers.conv_and_norm(train, self.dtype)
    y = conv(self.features, strides=self.strides, name="conv1")(x)
    y = nn.relu(norm(name="bn1")(y))
    y = conv(self.features, name="conv2")(y)
    y = norm(name="bn2")(y)
    return nn.relu(y + _shortcut(x, y, self.strides, conv, norm))


class BottleneckBlock(nn.Module):
  """1x1, strided 3x3 and 1x1 convolutions, and a shortcut."""

  features: int
  strides: int = 1
  dtype: Any = None

  expansion = 4

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv, norm = layers.conv_and_norm(train, self.dtype)
    y = conv(self.features, 1, name="conv1")(x)
    y = nn.relu(norm(name="bn1")(y))
    y = conv(self.features, strides=self.strides, name="conv2")(y)
    y = nn.relu(norm(name="bn2")(y))
    y = conv(self.features * self.expansion, 1, name="conv3")(y)
    y = norm(name="bn3")(y)
    return nn.relu(y + _shortcut(x, y, self.strides, conv, norm))


class CifarResNet(nn.Module):
  """ResNet-(6n+2) for small images: three stages of n blocks."""

  blocks_per_stage: int
  num_classes: int
  widths: Sequence[int] = (16, 32, 64)
  dtype: Any = None

  image_size = 32  # The size it was designed for; others work too.

  @property
  def stage_sizes(self) -> tuple[int, ...]:
    """The number of blocks in each stage."""
    return (self.blocks_per_stage,) * len(self.widths)

  @property
  def default_taps(self) -> tuple[str, ...]:
    """The last block of each stage, as in the paper."""
    return _last_blocks(self.stage_sizes)

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify images [B, H, W, C]; return (logits [B, K], features)."""
    conv, norm = layers.conv_and_norm(train, self.dtype)
    x = conv(self.widths[0], use_bias=True, name="conv1")(images)
    x = nn.relu(norm(name="bn1")(x))

    # The authors' names: block1, blocks2.0, ..., then block3, blocks4.0, ...
    def block_name(stage, block):
      if block == 0:
        return f"block{2 * stage + 1}"
      return f"blocks{2 * stage + 2}_{block - 1}"

    make_block = functools.partial(BasicBlock, dtype=self.dtype)
    stages = zip(self.widths, self.stage_sizes, strict=True)
    x, features = _run_stages(x, train, make_block, stages, block_name)
    return _classify(x, features, self.num_classes, self.dtype)


class ResNet(nn.Module):
  """ResNet-18, 34, 50 for ImageNet, as in torchvision."""

  block: Any
  stage_sizes: Sequence[int]
  num_classes: int
  dtype: Any = None

  image_size = 224  # The size it was designed for; others work too.

  @property
  def default_taps(self) -> tuple[str, ...]:
    """The outputs of the four stages, as in the paper."""
    return _last_blocks(self.stage_sizes)

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify images [B, H, W, C]; return (logits [B, K], features)."""
    conv, norm = layers.conv_and_norm(train, self.dtype)
    x = conv(64, 7, strides=2, name="conv1")(images)
    x = nn.relu(norm(name="bn1")(x))
    x = layers.max_pool(x, window=3, stride=2, padding=1)
    block_name = lambda stage, block: f"layer{stage + 1}_{block}"
    make_block = functools.partial(self.block, dtype=self.dtype)
    stages = [(64 * 2**i, size) for i, size in enumerate(self.stage_sizes)]
    x, features = _run_stages(x, train, make_block, stages, block_name)
    return _classify(x, features, self.num_classes, self.dtype)


def _last_blocks(stage_sizes):
  """Return the tap of the last block of each stage."""
  return tuple(
    f"stage{stage}_block{size}"
    for stage, size in enumerate(stage_sizes, start=1)
  )


def _run_stages(x, train, make_block, stages, block_name):
  """Run the residual stages; return (x, features).

  Args:
    x: [B, H, W, C].
    train: whether batch normalisation uses the statistics of the batch.
    make_block: (width, strides=, name=) -> a block.
    stages: (width, number of blocks) of each stage.
    block_name: (stage, block), both from 0 -> name of the submodule.
  """
  features = {}
  for stage, (width, size) in enumerate(stages):
    for block in range(size):
      strides = 2 if stage > 0 and block == 0 else 1
      name = block_name(stage, block)
      x = make_block(width, strides=strides, name=name)(x, train)
      features[f"stage{stage + 1}_block{block + 1}"] = x
  return x, features


def _shortcut(x, y, strides, conv, norm):
  """Return x, projected by a strided 1x1 convolution if the shape changes."""
  if x.shape == y.shape:
    return x
  x = conv(y.shape[-1], 1, strides=strides, name="downsample_0")(x)
  return norm(name="downsample_1")(x)


def _classify(x, features, num_classes, dtype):
  return layers.classify(
    x,
    features,
    num_classes,
    kernel_init=layers.TORCH_LINEAR,
    bias_init=layers.torch_linear_bias(x.shape[-1]),
    dtype=dtype,
    name="fc",
  )
