"""ConvNeXt for small images.

Liu et al., "A ConvNet for the 2020s", CVPR 2022 (arXiv 2201.03545), with the
depths and widths of timm's convnext_atto and a stem with 2x2 patches: on 32x32
images, the stages have maps of 16x16, 8x8, 4x4 and 2x2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2t_jax.models import layers

_EPSILON = 1e-6
_KERNEL = (7, 7)
_LAYER_SCALE = 1e-6  # Initial value.
_init = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
  """A depthwise convolution and an MLP at each position, with a shortcut."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map features [B, H, W, C] to features of the same shape."""
    width = x.shape[-1]
    y = nn.Conv(
      width,
      _KERNEL,
      feature_group_count=width,
      dtype=self.dtype,
      kernel_init=_init,
      name="conv",
    )(x)
    y = nn.LayerNorm(_EPSILON, self.dtype, name="norm")(y)
    dense = lambda size, name: nn.Dense(
      size, dtype=self.dtype, kernel_init=_init, name=name
    )
    # The exact GELU, as in PyTorch; Flax approximates it by default.
    y = dense(width, "fc2")(nn.gelu(dense(4 * width, "fc1")(y), False))
    start = nn.initializers.constant(_LAYER_SCALE)
    scale = self.param("layer_scale", start, (width,))
    return x + y * scale.astype(y.dtype)


class ConvNeXt(nn.Module):
  """ConvNeXt for small images.

  Its taps are the outputs of the stages: "stage1", "stage2" and so on.
  """

  num_classes: int
  depths: Sequence[int] = (2, 2, 6, 2)
  widths: Sequence[int] = (40, 80, 160, 320)
  dtype: Any = None

  # The size it was designed for; other multiples of 16 work too.
  image_size = 32

  @property
  def default_taps(self) -> tuple[str, ...]:
    """All stages."""
    return tuple(f"stage{i + 1}" for i in range(len(self.depths)))

  @nn.compact
  def __call__(
    self, images: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify images [B, H, W, C]; return (logits [B, K], features)."""
    layers.check_multiples(images, 2 ** len(self.depths))
    norm = lambda name: nn.LayerNorm(_EPSILON, self.dtype, name=name)
    x, features = images, {}
    for stage, (depth, width) in enumerate(
      zip(self.depths, self.widths, strict=True), start=1
    ):
      down = nn.Conv(
        width,
        (2, 2),
        strides=(2, 2),
        padding="VALID",
        dtype=self.dtype,
        kernel_init=_init,
        name=f"down{stage}",
      )
      # The norm follows the stem, but precedes the other downsampling layers.
      name = f"norm{stage}"
      x = norm(name)(down(x)) if stage == 1 else down(norm(name)(x))
      for block in range(1, depth + 1):
        x = Block(self.dtype, name=f"stage{stage}_block{block}")(x)
      features[f"stage{stage}"] = x
    x = norm("norm")(jnp.mean(x, axis=(1, 2)))
    features["penultimate"] = x[:, None, None]
    logits = nn.Dense(
      self.num_classes, dtype=self.dtype, kernel_init=_init, name="head"
    )(x)
    return logits, features
