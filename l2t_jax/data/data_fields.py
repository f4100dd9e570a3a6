"""The fields that describe a data set and how its images become batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

from PIL import Image

from l2t_jax import errors
from l2t_jax.data import pillow

# Larger images are streamed by default; see `DataFields.in_memory`.
MAX_IN_MEMORY_SIZE = 96
IN_MEMORY_AUGMENTS: tuple[str, ...] = ("none", "crop", "crop_flip")
STREAMED_AUGMENTS: tuple[str, ...] = ("none", "random_resized_crop_flip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFields:
  """The fields of `config.data`, with the same names and meanings.

  l2t_jax/config.py validates single fields. The checks here involve several
  fields, or reject values that would be silently misread.

  Raises:
    errors.InputError: a value is wrong, or fields do not go together.
  """

  # Kind of data set; `loading.open_images` lists the possible ones. This field
  # and the next four are ignored if `load` is given the images themselves.
  source: str = ""
  name: str = ""
  path: str = ""
  # Columns of a Hugging Face data set; "" for the only one of its type.
  image_column: str = ""
  label_column: str = ""
  # Published labels to keep, renumbered from 0 in this order; () for all.
  classes: Sequence[int] = ()
  # Height and width that images are resized to, in pixels.
  image_size: int
  # 1 (grey) or 3 (RGB), to which images are converted. Arrays that are neither
  # are not converted: give the number of their channels.
  channels: int
  # Mean and standard deviation of the pixels: one value, or one per channel, or
  # () to compute them from the training images, which must be arrays or kept in
  # memory. Integers are scaled to [0, 1] first; floats keep their scale.
  mean: Sequence[float]
  std: Sequence[float]
  # One of IN_MEMORY_AUGMENTS or STREAMED_AUGMENTS.
  augment: str = "none"
  # Width of the black border added around an image before "crop", in pixels.
  crop_padding: int = 4
  # Further augmentation of training images, after the crop. RandAugment:
  # operations per image, and their magnitude, from 0 to 30.
  rand_augment: int = 0
  rand_augment_magnitude: int = 9
  # Largest relative change of brightness, contrast and saturation, from 0 to 1.
  color_jitter: float = 0.0
  # Probability that random erasing removes a rectangle of an image.
  random_erasing: float = 0.0
  # The α of mixup and CutMix; 0 disables them.
  mixup: float = 0.0
  cutmix: float = 0.0
  # For evaluation, streamed images are resized to this short side, in pixels,
  # before the central crop; 0 for 8/7 of image_size. Images in memory are not
  # cropped.
  eval_resize: int = 0
  # npz file with the index arrays {split_prefix}_train, _val and _test; "" to
  # draw a stratified split. Indices refer to the order of this source. For tfds
  # this is not the official order, because tfds shuffles.
  split_file: str = ""
  split_prefix: str = ""
  # Fractions of the training images that become validation and test images if
  # there is neither a split file nor an official set.
  val_fraction: float = 0.0
  test_fraction: float = 0.0
  # Seed of the random split and of the per_class selection.
  split_seed: int = 0
  # Labelled training images per class; 0 for all. It does not change the
  # validation and test images.
  per_class: int = 0
  # Whether batches also hold unlabelled images: the training images that
  # per_class leaves out, or all images in the folder unlabeled_path, which is
  # not searched for copies of validation and test images. The labelled part of
  # the batches does not change.
  unlabeled: bool = False
  unlabeled_path: str = ""
  # Unlabelled images per global batch; 0 for batch_size.
  unlabeled_batch_size: int = 0
  # Worker processes that decode streamed training images; 0 to use threads.
  num_workers: int = 0
  # How to handle unreadable images, "stop" or "skip", and the largest fraction
  # of images that may be skipped.
  bad_images: str = "stop"
  max_bad_fraction: float = 0.01
  # Whether all images are kept on the device; None to decide by image_size and
  # MAX_IN_MEMORY_SIZE. Configs do not have this field.
  in_memory: bool | None = None

  def __post_init__(self) -> None:
    for name, values in (("mean", self.mean), ("std", self.std)):
      if len(values) not in (0, 1, self.channels):
        raise errors.InputError(
          f"{name} is {tuple(values)}, but must have 1 or"
          f" channels={self.channels} values"
        )
    if not all(0 < value < math.inf for value in self.std):
      raise errors.InputError(
        f"std is {tuple(self.std)}, but must be finite and above 0"
      )
    reading, augments = "in memory", IN_MEMORY_AUGMENTS
    if self.is_streamed:
      reading, augments = "streamed", STREAMED_AUGMENTS
    if self.augment not in augments:
      raise errors.InputError(
        f"augment {self.augment!r} is not possible when images are {reading};"
        f" possible: {', '.join(augments)}"
      )
    if self.is_streamed and self.resized < self.image_size:
      raise errors.InputError(
        f"eval_resize is {self.resized}, but must be at least"
        f" image_size={self.image_size}"
      )
    if self.per_class < 0:
      raise errors.InputError(
        f"per_class is {self.per_class}, but must be 0 or more"
      )
    if self.unlabeled_path and not self.unlabeled:
      raise errors.InputError(
        f"unlabeled_path is {self.unlabeled_path!r}, but unlabeled is False;"
        " set it to True or the path to ''"
      )

  @property
  def resized(self) -> int:
    """Short side before the central crop; 0 for images in memory."""
    return resized_for_evaluation(
      self.image_size, self.eval_resize, self.in_memory
    )

  @property
  def is_streamed(self) -> bool:
    """Whether images are read on demand instead of being kept in memory."""
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
  image_size: int, eval_resize: int, in_memory: bool | None = None
) -> Callable[[Image.Image], Image.Image]:
  """Return the function that resizes an image as evaluation does.

  Args:
    image_size: height and width of the result, in pixels.
    eval_resize: see `DataFields`.
    in_memory: see `DataFields`.
  """
  resized = resized_for_evaluation(image_size, eval_resize, in_memory)
  if not resized:
    return functools.partial(pillow.resize, width=image_size, height=image_size)
  return functools.partial(
    pillow.resize_and_center_crop, resized=resized, size=image_size
  )
