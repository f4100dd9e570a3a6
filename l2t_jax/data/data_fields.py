"""What a data set is and how its images become batches: fields and rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools

from PIL import Image

from l2t_jax import errors
from l2t_jax.data import formats, pillow

# Larger images are streamed, unless `in_memory` says otherwise.
MAX_IN_MEMORY_SIZE = 96
IN_MEMORY_AUGMENTS = ("none", "crop", "crop_flip")
STREAMED_AUGMENTS = ("none", "random_resized_crop_flip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFields:
  """The fields of `config.data`: same names and meanings.

  Raises:
    errors.InputError: a value is wrong.
  """

  # Where images come from: bundled, npz, folder or tfds. Neither this field nor
  # the next two are read where the images are given as objects.
  source: str = ""
  # Name of a bundled ("mnist", "digits") or tfds data set.
  name: str = ""
  # The npz file, the folder of images, or tfds's data_dir ("" for its own).
  path: str = ""
  # Published labels to keep, renumbered in this order; () for all.
  classes: Sequence[int] = ()
  # Height and width that images are resized to, in pixels.
  image_size: int
  # 1 (grey) or 3 (RGB); images are converted.
  channels: int
  # Of the pixels, one value or one per channel, on a scale from 0 to 1.
  mean: Sequence[float]
  std: Sequence[float]
  # One of IN_MEMORY_AUGMENTS or STREAMED_AUGMENTS.
  augment: str = "none"
  # Width of the black border around an image before "crop", in pixels.
  crop_padding: int = 4
  # Streamed images: length of the short side before the central crop, in
  # pixels; 0 for 8/7 of image_size. Images in memory are evaluated whole.
  eval_resize: int = 0
  # npz file with the index arrays {split_prefix}_train, _val and _test; "" to
  # draw a stratified split. They count in this source's own order, which for
  # tfds is not the official one: tfds shuffles.
  split_file: str = ""
  split_prefix: str = ""
  # Shares of the training images that validate and test, where there is neither
  # a split file nor an official set.
  val_fraction: float = 0.0
  test_fraction: float = 0.0
  # Seed of the drawn split and of the choice of per_class images.
  split_seed: int = 0
  # Labelled training images per class; 0 for all. Validation and test images do
  # not depend on it.
  per_class: int = 0
  # Whether batches also hold images without labels: the training images that
  # per_class leaves over, or all in the folder unlabeled_path, which nothing
  # compares with validation and test images. Labelled batches stay the same.
  unlabeled: bool = False
  unlabeled_path: str = ""
  # Images without labels per batch, over all processes; 0 for batch_size.
  unlabeled_batch_size: int = 0
  # Processes that decode streamed training images; 0 for threads.
  num_workers: int = 0
  # Whether all images stay on the device; None for those of at most
  # MAX_IN_MEMORY_SIZE. No field of a config.
  in_memory: bool | None = None

  def __post_init__(self) -> None:
    reading, augments = (
      ("streamed", STREAMED_AUGMENTS)
      if self.is_streamed
      else ("in memory", IN_MEMORY_AUGMENTS)
    )
    mean, std = tuple(self.mean), tuple(self.std)
    leaves_none = self.unlabeled and not self.unlabeled_path
    for holds, message in (
      (
        self.image_size > 0,
        f"image_size is {self.image_size}, but must be positive",
      ),
      (
        self.channels in (1, 3),
        f"channels is {self.channels}, but must be 1 (grey) or 3 (RGB)",
      ),
      *(
        (
          len(values) in (1, self.channels),
          f"{name} {values} must have 1 or channels={self.channels} values",
        )
        for name, values in (("mean", mean), ("std", std))
      ),
      (
        self.augment in augments,
        f"augment {self.augment!r} is not possible when images are {reading};"
        f" possible: {', '.join(augments)}",
      ),
      (
        not self.is_streamed or self.resized >= self.image_size,
        f"eval_resize is {self.resized}, but must be at least"
        f" image_size={self.image_size}",
      ),
      *(
        (value >= 0, f"{name} is {value}, but must be 0 or more")
        for name, value in (
          ("crop_padding", self.crop_padding),
          ("split_seed", self.split_seed),
          ("per_class", self.per_class),
          ("num_workers", self.num_workers),
          ("unlabeled_batch_size", self.unlabeled_batch_size),
        )
      ),
      (
        self.unlabeled or not self.unlabeled_path,
        f"unlabeled_path is {self.unlabeled_path!r}, but unlabeled is False;"
        " set it to True or the path to ''",
      ),
      (
        self.per_class or not leaves_none,
        "unlabeled is True, but per_class is 0 and leaves no images over; set"
        " it or give an unlabeled_path",
      ),
    ):
      if not holds:
        raise errors.InputError(message)
    formats.check_normalisation(mean, std)

  @property
  def resized(self) -> int:
    """The short side before the central crop; 0 for images in memory."""
    return resized_for_evaluation(
      self.image_size, self.eval_resize, self.in_memory
    )

  @property
  def is_streamed(self) -> bool:
    """Whether images are read when they are needed."""
    return self.resized != 0

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of the images in batches."""
    return (self.image_size, self.image_size, self.channels)


def resized_for_evaluation(
  image_size: int, eval_resize: int, in_memory: bool | None = None
) -> int:
  """Return the short side before the central crop; 0 for images in memory."""
  if in_memory is None:
    in_memory = image_size <= MAX_IN_MEMORY_SIZE
  return 0 if in_memory else eval_resize or round(image_size * 8 / 7)


def make_eval_resize(
  image_size: int, eval_resize: int
) -> Callable[[Image.Image], Image.Image]:
  """Return the function that gives an image the size that evaluation sees."""
  resized = resized_for_evaluation(image_size, eval_resize)
  if not resized:
    return functools.partial(pillow.resize, width=image_size, height=image_size)
  return functools.partial(
    pillow.resize_and_center_crop, resized=resized, size=image_size
  )
