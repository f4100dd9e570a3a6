"""Batches of large images, which Grain reads when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any, Self

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import errors, imports, types
from l2t_jax.data import augmentation, data_fields, datasets, pillow

PROFILING_FLAG = "grain_enable_multiprocess_worker_profiling"
# From the message of Grain's error.
_WORKER_DIED = "Worker process was terminated unexpectedly"
# Per process; more threads than this wait for Python's lock.
MAX_THREADS = 16


class StreamingDataset(datasets.Dataset):
  """Images that are read, cropped and resized when they are needed.

  Training images are read by worker processes, if `num_workers` asks for any,
  evaluation images by threads of this process.
  """

  def __init__(
    self, contents: datasets.Contents, fields: data_fields.DataFields
  ):
    super().__init__(contents, fields)
    size, _, channels = self.image_shape
    center = functools.partial(
      _read_center, size=size, channels=channels, resized=fields.resized
    )
    random = functools.partial(_read_random, size=size, channels=channels)
    self._train_steps = functools.partial(
      TrainSteps,
      self._subsets["train"],
      self._plan,
      contents.unlabeled,
      self._unlabeled_plan,
      center if fields.augment == "none" else random,
    )
    self._eval_steps = {
      name: EvalSteps(self._subsets[name], self._eval_plan, center)
      for name in ("val", "test")
    }
    self._normalise = functools.partial(
      _normalise, mean=tuple(fields.mean), std=tuple(fields.std)
    )
    # Each worker would get a copy of images that are in memory.
    is_decoded = contents.images.train.pixels is not None
    self._num_workers = 0 if is_decoded else fields.num_workers
    # (step to come, counted through all epochs; iterator) after an epoch.
    self._parked: tuple[int, Any] | None = None

  def with_seed(self, seed: int) -> Self:
    """Return the same images in another order; see `Dataset.with_seed`."""
    dataset = super().with_seed(seed)
    dataset._parked = None
    return dataset

  def _train_batches(self, epoch: int, start: int) -> Iterator[types.Batch]:
    first, end = (
      epoch * self.steps_per_epoch + step
      for step in (start, self.steps_per_epoch)
    )
    stream = self._train_stream(first)
    try:
      for _ in range(first, end):
        images, labels, *unlabeled = next(stream)
        yield types.Batch(
          self._normalise(images),
          jnp.array(labels),
          *map(self._normalise, unlabeled),
        )
    except BaseException as error:
      stream.close()
      if _WORKER_DIED in str(error):
        raise errors.LostProcessError(
          "a process that reads images ended (killed, perhaps for want of"
          " memory: then lower data.num_workers); the same command goes on from"
          f" the last checkpoint. Grain says: {error}"
        ) from error
      raise
    self._parked = end, stream

  def _train_stream(self, first: int) -> Any:
    """Return the parked stream if it is at step `first`, or a new one.

    New workers take seconds to start.
    """
    parked, self._parked = self._parked, None
    if parked is not None:
      position, stream = parked
      if position == first:
        return stream
      stream.close()
    steps = self._train_steps(self._seed)
    return _stream(steps, first, num_workers=self._num_workers)

  def _eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    stream = _stream(self._eval_steps[split], 0, num_workers=0)
    try:
      for images, labels, mask in stream:
        yield types.EvalBatch(
          self._normalise(images), jnp.array(labels), jnp.array(mask)
        )
    finally:
      stream.close()


@dataclasses.dataclass(frozen=True)
class TrainSteps:
  """A Grain source of the training steps of all epochs, one after another."""

  subset: datasets.Subset
  plan: datasets.BatchPlan
  unlabeled: datasets.Subset | None
  unlabeled_plan: datasets.BatchPlan
  read: Callable[..., np.ndarray]  # (subset, position, rng) -> [H, W, C].
  seed: int

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
    """Read a step.

    Args:
      index: number of the step, counted through all epochs.

    Returns:
      Images uint8 [b, H, W, C], labels [b, ...] and, if there are any, images
      without labels uint8 [u, H, W, C].
    """
    num_images = len(self.subset.indices)
    epoch, step = divmod(index, num_images // self.plan.batch_size)
    slots = self.plan.slots(step)
    positions = datasets.epoch_order(self.seed, epoch, num_images)[slots]
    # Entropy comes from the slot in the epoch, so that it does not matter which
    # worker reads the image.
    entropies = [(self.seed, epoch, 1 + slot) for slot in slots]
    images = self._read(self.subset, positions, entropies)
    labels = self.subset.targets[positions]
    if self.unlabeled is None:
      return images, labels
    return images, labels, self._read_unlabeled(self.unlabeled, index)

  def _read_unlabeled(self, subset: datasets.Subset, index: int) -> np.ndarray:
    slots = self.unlabeled_plan.slots(index)
    positions = datasets.unlabeled_positions(
      self.seed, slots, len(subset.indices)
    )
    # Neither unlabeled_positions nor labelled images draw from this entropy.
    entropies = [(self.seed, slot, 0, 2) for slot in slots]
    return self._read(subset, positions, entropies)

  def _read(
    self,
    subset: datasets.Subset,
    positions: np.ndarray,
    entropies: Sequence[tuple[int, ...]],
  ) -> np.ndarray:
    """Read images uint8 [n, H, W, C], each with its own generator."""
    images = [
      self.read(subset, position, np.random.default_rng(entropy))
      for position, entropy in zip(positions, entropies, strict=True)
    ]
    return np.stack(images)


@dataclasses.dataclass(frozen=True)
class EvalSteps:
  """A Grain source of the steps that see every image of a split once."""

  subset: datasets.Subset
  plan: datasets.BatchPlan
  read: Callable[..., np.ndarray]  # (subset, position) -> [H, W, C].

  def __len__(self) -> int:
    return self.plan.num_eval_steps(len(self.subset.indices))

  def __getitem__(
    self, index: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images uint8 [b, H, W, C], labels [b, ...], mask [b] of a step."""
    positions, mask = self.plan.eval_positions(len(self.subset.indices), index)
    images = [self.read(self.subset, position) for position in positions]
    return np.stack(images), self.subset.targets[positions], mask


def _read_center(
  subset: datasets.Subset,
  position: int,
  rng: np.random.Generator | None = None,
  *,
  size: int,
  channels: int,
  resized: int,
) -> np.ndarray:
  """Read an image for evaluation, or for training without augmentation."""
  del rng
  image = subset.read_image(position, channels=channels)
  cropped = pillow.resize_and_center_crop(image, resized=resized, size=size)
  return pillow.to_array(cropped)


def _read_random(
  subset: datasets.Subset,
  position: int,
  rng: np.random.Generator,
  *,
  size: int,
  channels: int,
) -> np.ndarray:
  """Read an image for training."""
  image = subset.read_image(position, channels=channels)
  return pillow.to_array(pillow.random_resized_crop_flip(image, rng, size=size))


def _stream(
  source: TrainSteps | EvalSteps, first: int, *, num_workers: int
) -> Any:
  """Open a Grain iterator over whole batches, beginning with number `first`."""
  grain = imports.require("grain", needed_for="reading large images")
  # Grain 0.2.18 reads this flag even where no absl app has parsed any flags
  # (google/grain, issue 1355).
  if PROFILING_FLAG in flags.FLAGS:
    flags.FLAGS[PROFILING_FLAG].present = True
  # The elements are batches, not images, so that their composition and order do
  # not depend on the number of workers.
  threads = 1 if num_workers else min(os.cpu_count() or 1, MAX_THREADS)
  batches = grain.MapDataset.source(source)[first:].to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  )
  options = grain.MultiprocessingOptions(
    num_workers=num_workers, per_worker_buffer_size=2
  )
  return iter(batches.mp_prefetch(options, worker_init_fn=_end_with_parent))


def _end_with_parent(*_: int) -> None:
  """End this worker when its parent process ends, however that happens.

  Ctrl-C reaches all processes, but only the parent answers it.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent

  def wait():
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


@functools.partial(jax.jit, static_argnames=("mean", "std"))
def _normalise(
  images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  return augmentation.normalise(images, mean, std)
