"""Custom networks, which do not depend on l2t_jax.

    python -m l2t_jax.models examples.networks:convnext --image_size=16

A small vision transformer (Linen) is the source of a ConvNeXt (NNX). A glob
names the source's taps; the target gets the default ones:

    python train.py --config=configs/digits_source.py --workdir=runs/vit \
      --config.target.model=examples.networks:vit \
      --config.optimizer.learning_rate=0.05
    python train.py --config=configs/digits.py --workdir=runs/vit_to_convnext \
      --config.source.weights=runs/vit/target.safetensors \
      --config.source.taps="('block_*',)" \
      --config.target.model=examples.networks:convnext_nnx \
      --config.optimizer.learning_rate=0.05 --config.transfer.beta=0.02

The features of a transformer grow from block to block. With the default beta,
the matching loss would be a hundred times the cross-entropy, and the training
would end in NaN.
"""

from flax import linen as nn
from flax import nnx
import jax.numpy as jnp

_WIDTHS, _DEPTHS = (16, 32, 64), (1, 1, 1)


class ConvNeXtBlock(nn.Module):
  """Liu et al., "A ConvNet for the 2020s", CVPR 2022, with 3x3 kernels."""

  width: int

  @nn.compact
  def __call__(self, x):
    y = nn.Conv(self.width, (3, 3), feature_group_count=self.width)(x)
    y = nn.Dense(4 * self.width)(nn.LayerNorm()(y))
    return x + nn.Dense(self.width)(nn.gelu(y))


class ConvNeXt(nn.Module):
  """Images [B, H, W, C] -> logits [B, num_classes]."""

  num_classes: int

  @nn.compact
  def __call__(self, x):
    for stage, (width, depth) in enumerate(zip(_WIDTHS, _DEPTHS, strict=True)):
      x = nn.Conv(width, (2, 2), strides=(2, 2), name=f"down{stage}")(x)
      for block in range(depth):
        x = ConvNeXtBlock(width, name=f"stage{stage}_{block}")(x)
    x = nn.LayerNorm(name="norm")(jnp.mean(x, axis=(1, 2)))
    return nn.Dense(self.num_classes, name="head")(x)


def convnext(num_classes):
  return ConvNeXt(num_classes)


class NnxConvNeXtBlock(nnx.Module):
  """`ConvNeXtBlock` in NNX."""

  def __init__(self, width, *, rngs):
    self.conv = nnx.Conv(
      width, width, (3, 3), feature_group_count=width, rngs=rngs
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
    self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x):
    y = self.widen(self.norm(self.conv(x)))
    return x + self.narrow(nnx.gelu(y))


class NnxConvNeXt(nnx.Module):
  """`ConvNeXt` in NNX."""

  def __init__(self, num_classes, channels, *, rngs):
    self.downs, self.stages = nnx.List(), nnx.List()
    for width, depth in zip(_WIDTHS, _DEPTHS, strict=True):
      self.downs.append(
        nnx.Conv(channels, width, (2, 2), strides=(2, 2), rngs=rngs)
      )
      self.stages.append(
        nnx.Sequential(
          *(NnxConvNeXtBlock(width, rngs=rngs) for _ in range(depth))
        )
      )
      channels = width
    self.norm = nnx.LayerNorm(channels, rngs=rngs)
    self.head = nnx.Linear(channels, num_classes, rngs=rngs)

  def __call__(self, x):
    for down, stage in zip(self.downs, self.stages, strict=True):
      x = stage(down(x))
    return self.head(self.norm(jnp.mean(x, axis=(1, 2))))


def convnext_nnx(num_classes, *, rngs):
  return NnxConvNeXt(num_classes, channels=1, rngs=rngs)


class Block(nn.Module):
  """A transformer block with pre-normalisation."""

  num_heads: int

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    attention = nn.MultiHeadDotProductAttention(self.num_heads)
    x = x + attention(nn.LayerNorm()(x))
    y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
    return x + nn.Dense(width)(y)


class ViT(nn.Module):
  """Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021."""

  num_classes: int
  patch_size: int = 4
  width: int = 48
  depth: int = 4

  @nn.compact
  def __call__(self, x):
    size = (self.patch_size, self.patch_size)
    x = nn.Conv(self.width, size, strides=size, name="patches")(x)
    x = x.reshape(x.shape[0], -1, self.width)
    token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
    init = nn.initializers.normal(0.02)
    x = x + self.param("positions", init, (1, *x.shape[1:]))
    for block in range(self.depth):
      x = Block(num_heads=3, name=f"block_{block}")(x)
    return nn.Dense(self.num_classes, name="head")(nn.LayerNorm()(x[:, 0]))


def vit(num_classes):
  return ViT(num_classes)
