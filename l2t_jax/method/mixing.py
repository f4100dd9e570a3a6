"""Mixup and CutMix: each image of a batch is mixed with its predecessor.

The images of a batch are shuffled, so that the predecessor is a random image.
With several devices, each device needs only one image of another device. Shares
and boxes (`types.Mixing`) are drawn on the host, together with the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import types


def draw(
  rng: np.random.Generator,
  num_images: int,
  shape: Sequence[int],
  *,
  mixup: float,
  cutmix: float,
) -> types.Mixing:
  """Draw how each image of a batch is mixed.

  Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018
  (arXiv 1710.09412), with one share per image, and Yun et al., "CutMix",
  ICCV 2019 (arXiv 1905.04899).

  Args:
    rng: random generator of the batch.
    num_images: B.
    shape: (H, W).
    mixup: α; the share of an image's own pixels is drawn from Beta(α, α). 0
      for none.
    cutmix: α; the share of the area that an image keeps is drawn from
      Beta(α, α), and the predecessor covers a box, clipped at the borders. 0
      for none. If both are set, each image gets one of them, with equal
      probability.
  """
  share = np.ones(num_images, np.float32)
  box = np.zeros((num_images, 4), np.int32)
  if mixup:
    share[:] = rng.beta(mixup, mixup, num_images)
  if cutmix:
    # Beta(α, α) is symmetric: draw the covered share of the area directly.
    covered = np.sqrt(rng.beta(cutmix, cutmix, (num_images, 1)))
    half = (shape * covered).astype(np.int32) // 2
    center = rng.integers(shape, size=half.shape)
    box[:, :2] = np.maximum(center - half, 0)
    box[:, 2:] = np.minimum(center + half, shape)
  if mixup and cutmix:
    # A share of 1 disables mixup, an empty box disables CutMix.
    cuts = rng.random(num_images) < 0.5
    share[cuts] = 1
    box[~cuts] = 0
  return types.Mixing(share, box)


def mix(images: jax.Array, mixing: types.Mixing) -> tuple[jax.Array, jax.Array]:
  """Mix each image with its predecessor.

  Args:
    images: [B, H, W, C].
    mixing: share and box of each image.

  Returns:
    The mixed images [B, H, W, C], and the weight of each image's own label,
    [B]: the share of its own pixels, averaged over positions.
  """
  height, width = images.shape[1:3]
  own = mixing.share.astype(images.dtype)[:, None, None, None]
  covered = in_boxes(mixing.box, (height, width))[..., None]
  own = jnp.where(covered, 0, own)
  mixed = own * images + (1 - own) * jnp.roll(images, 1, axis=0)
  top, left, bottom, right = mixing.box.T
  area = (bottom - top) * (right - left) / (height * width)
  return mixed, mixing.share * (1 - area)


def in_boxes(boxes: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Return a mask of the pixels in the box of each image, bool [B, H, W].

  Args:
    boxes: int32 [B, 4]; see `types.Mixing`.
    shape: (H, W).
  """
  top, left, bottom, right = boxes.T[..., None, None]
  rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])
  return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
