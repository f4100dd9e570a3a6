"""VGG with batch normalisation (Simonyan and Zisserman, 2015).

Submodules carry the index that they have in PyTorch's `Sequential`;
`l2t_jax.pretrained` maps weights by these names. Taps are the outputs of the
convolutions after batch normalisation and ReLU, counted from "conv1", and
"penultimate", the input of the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax

from l2t_jax.models import layers

POOL = "M"
VGG9 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG_TINY = (16, POOL, 32, POOL, 64, POOL)


class VGG(nn.Module):
  """3x3 convolutions of the planned widths, with max-pools between them."""

  plan: Sequence[int | str]
  num_classes: int
  dtype: Any = None

  image_size = 32  # The size it was designed for; others work too.

  @property
  def default_taps(self) -> tuple[str, ...]:
    """The maps that enter a max-pool, as in the paper."""
    convs_before = lambda i: sum(entry != POOL for entry in self.plan[:i])
    return tuple(
      f"conv{convs_before(i)}"
      for i, entry in enumerate(self.plan)
      if entry == POOL
    )

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify images [B, H, W, C]; return (logits [B, K], features)."""
    conv, norm = layers.conv_and_norm(train, self.dtype)
    # In PyTorch's `Sequential` a convolution takes three places (with its norm
    # and ReLU), and a pool one.
    x, index = images, 0
    features: dict[str, jax.Array] = {}
    for entry in self.plan:
      if isinstance(entry, str):  # POOL.
        x = layers.max_pool(x, window=2, stride=2, padding=0)
        index += 1
        continue
      x = conv(entry, use_bias=True, name=f"features_{index}")(x)
      x = nn.relu(norm(name=f"features_{index + 1}")(x))
      index += 3
      features[f"conv{len(features) + 1}"] = x
    # A 32x32 image has a single position left; larger images are averaged. The
    # initialisation is the authors'.
    return layers.classify(
      x,
      features,
      self.num_classes,
      kernel_init=nn.initializers.normal(0.01),
      dtype=self.dtype,
      name="classifier",
    )
