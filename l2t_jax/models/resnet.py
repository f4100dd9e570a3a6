"""Residual networks (He et al., 2016) for small images and for ImageNet.

Submodules are named as in the authors' code (CIFAR) and in torchvision
(ImageNet), "blocks2.0" being "blocks2_0", so that `pretrained` maps weights by
name. Taps are the blocks' outputs after the ReLU, "stage2_block5" being the
fifth block of the second stage, and what enters the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2t_jax.models import layers


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  features: int
  strides: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    norm = lambda name: layers.BatchNorm(train, dtype=self.dtype, name=name)
    y = layers.conv(
      self.features, strides=self.strides, dtype=self.dtype, name="conv1"
    )(x)
    y = nn.relu(norm("bn1")(y))
    y = layers.conv(self.features, dtype=self.dtype, name="conv2")(y)
    y = norm("bn2")(y)
    return nn.relu(y + _shortcut(self, x, y, norm))


class BottleneckBlock(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 one strides."""

  features: int
  strides: int = 1
  dtype: Any = None

  expansion = 4

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    norm = lambda name: layers.BatchNorm(train, dtype=self.dtype, name=name)
    y = layers.conv(self.features, 1, dtype=self.dtype, name="conv1")(x)
    y = nn.relu(norm("bn1")(y))
    y = layers.conv(
      self.features, strides=self.strides, dtype=self.dtype, name="conv2"
    )(y)
    y = nn.relu(norm("bn2")(y))
    y = layers.conv(
      self.features * self.expansion, 1, dtype=self.dtype, name="conv3"
    )(y)
    y = norm("bn3")(y)
    return nn.relu(y + _shortcut(self, x, y, norm))


class CifarResNet(nn.Module):
  """ResNet-(6n+2) for small images: three stages of n blocks."""

  blocks_per_stage: int
  num_classes: int
  widths: Sequence[int] = (16, 32, 64)
  dtype: Any = None

  image_size = 32  # What it was designed for; others work too.

  @property
  def default_taps(self) -> tuple[str, ...]:
    """The last block of each stage, as in the paper."""
    return tuple(
      f"stage{stage}_block{self.blocks_per_stage}"
      for stage in range(1, len(self.widths) + 1)
    )

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify images [B, H, W, C]; return (logits [B, K], features)."""
    x = layers.conv(
      self.widths[0], use_bias=True, dtype=self.dtype, name="conv1"
    )(images)
    x = nn.relu(layers.BatchNorm(train, dtype=self.dtype, name="bn1")(x))
    features = {}
    for stage, width in enumerate(self.widths):
      for block in range(self.blocks_per_stage):
        first = block == 0
        x = BasicBlock(
          width,
          strides=2 if stage > 0 and first else 1,
          dtype=self.dtype,
          name=(
            f"block{2 * stage + 1}"
            if first
            else f"blocks{2 * stage + 2}_{block - 1}"
          ),
        )(x, train)
        features[f"stage{stage + 1}_block{block + 1}"] = x
    x = jnp.mean(x, axis=(1, 2), keepdims=True)
    features["penultimate"] = x
    return _classify(x[:, 0, 0], self.num_classes, self.dtype), features


class ResNet(nn.Module):
  """ResNet-18, 34, 50 for ImageNet, as in torchvision."""

  block: Any
  stage_sizes: Sequence[int]
  num_classes: int
  dtype: Any = None

  image_size = 224  # What it was designed for; others work too.

  @property
  def default_taps(self) -> tuple[str, ...]:
    """The outputs of the four stages, as in the paper."""
    return tuple(
      f"stage{stage}_block{size}"
      for stage, size in enumerate(self.stage_sizes, start=1)
    )

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify images [B, H, W, C]; return (logits [B, K], features)."""
    x = layers.conv(64, 7, strides=2, dtype=self.dtype, name="conv1")(images)
    x = nn.relu(layers.BatchNorm(train, dtype=self.dtype, name="bn1")(x))
    x = layers.max_pool(x, window=3, stride=2, padding=1)
    features = {}
    for stage, size in enumerate(self.stage_sizes):
      for block in range(size):
        x = self.block(
          64 * 2**stage,
          strides=2 if stage > 0 and block == 0 else 1,
          dtype=self.dtype,
          name=f"layer{stage + 1}_{block}",
        )(x, train)
        features[f"stage{stage + 1}_block{block + 1}"] = x
    x = jnp.mean(x, axis=(1, 2), keepdims=True)
    features["penultimate"] = x
    return _classify(x[:, 0, 0], self.num_classes, self.dtype), features


def _shortcut(block, x, y, norm):
  """The identity, or a strided 1x1 convolution where the shape changes."""
  if x.shape == y.shape:
    return x
  x = layers.conv(
    y.shape[-1],
    1,
    strides=block.strides,
    dtype=block.dtype,
    name="downsample_0",
  )(x)
  return norm("downsample_1")(x)


def _classify(x, num_classes, dtype):
  logits = nn.Dense(
    num_classes,
    kernel_init=layers.TORCH_LINEAR,
    bias_init=layers.torch_linear_bias(x.shape[-1]),
    dtype=dtype,
    name="fc",
  )(x)
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
