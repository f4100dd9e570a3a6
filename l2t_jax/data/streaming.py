"""Batches of large images, which Grain reads on demand."""

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
from PIL import Image

from l2t_jax import errors, imports, types
from l2t_jax.data import augmentation, data_fields, datasets, pillow

PROFILING_FLAG = "grain_enable_multiprocess_worker_profiling"
# Part of Grain's error message when a worker process dies.
_WORKER_DIED = "Worker process was terminated unexpectedly"
# Per process; more threads would only wait for Python's GIL.
MAX_THREADS = 16

_Transform = Callable[..., Image.Image]


_normalise = jax.jit(
  augmentation.normalise, static_argnames=("mean", "std", "white")
)


class StreamingDataset(datasets.Dataset):
  """A data set whose images are read, cropped and resized on demand.

  Training images are read by `num_workers` processes (0: by threads of this
  process), evaluation images always by threads.
  """

  def __init__(
    self, contents: datasets.Contents, fields: data_fields.DataFields
  ):
    super().__init__(contents, fields)
    crop = functools.partial(
      pillow.random_resized_crop_flip, size=fields.image_size
    )
    self._make_reader = functools.partial(
      _TrainReader,
      self._subsets["train"],
      self._plan,
      self._subsets.get("unlabeled"),
      self._unlabeled_plan,
      self._subsets["val"] if contents.has_outer else None,
      self._eval_resize,
      None if fields.augment == "none" else crop,
    )
    self._normalise = functools.partial(
      _normalise,
      mean=self.mean,
      std=self.std,
      white=self._subsets["train"].white,
    )
    # Images in memory need no workers: each would get its own copy of them.
    is_decoded = self._subsets["train"].records.pixels is not None
    self._num_workers = 0 if is_decoded else fields.num_workers
    # Kept after an epoch: (next step, counted over all epochs; its iterator).
    self._parked: tuple[int, Any] | None = None

  def with_seed(self, seed: int) -> Self:
    """Return the same images in another order; see `Dataset.with_seed`."""
    dataset = super().with_seed(seed)
    # The parked iterator belongs to the old seed.
    dataset._parked = None
    return dataset

  def train_batches(self, epoch: int, start: int = 0) -> Iterator[types.Batch]:
    """See `Dataset.train_batches`."""
    first = epoch * self.steps_per_epoch + start
    end = (epoch + 1) * self.steps_per_epoch
    stream = self._train_stream(first)
    key = jax.random.key(self._seed)
    unlabeled_key = jax.random.fold_in(key, datasets.NO_EPOCH)
    try:
      for step in range(start, self.steps_per_epoch):
        read = next(stream)
        unlabeled = outer = None
        if "unlabeled" in read:
          unlabeled = _augment(
            read["unlabeled"],
            (unlabeled_key, epoch, step),
            plan=self._unlabeled_plan,
            policy=self._policy,
          )
        if "outer_images" in read:
          outer = types.Labelled(
            self._normalise(read["outer_images"]),
            jnp.array(read["outer_labels"]),
          )
        images = _augment(
          read["images"],
          (key, epoch, step),
          plan=self._plan,
          policy=self._policy,
        )
        yield types.Batch(
          images,
          jnp.array(read["labels"]),
          unlabeled,
          self._draw_mixing(epoch, step),
          outer,
        )
    # Also on GeneratorExit, when the caller abandons the epoch.
    except BaseException as error:
      stream.close()
      if _WORKER_DIED in str(error):
        raise errors.LostProcessError(
          "a process that reads images ended (killed, perhaps for lack of"
          " memory: then lower data.num_workers); the same command resumes from"
          f" the last checkpoint. Grain's message: {error}"
        ) from error
      raise
    self._parked = end, stream

  def _train_stream(self, first: int) -> Any:
    """Return the parked stream if it is at step `first`, else a new one.

    Streams are reused because new workers take seconds to start.
    """
    parked, self._parked = self._parked, None
    if parked is not None:
      position, stream = parked
      if position == first:
        return stream
      stream.close()
    # Endless, so that the workers can continue with the next epoch.
    return _stream(
      self._make_reader(self._seed),
      range(first, sys.maxsize),
      num_workers=self._num_workers,
    )

  def eval_batches(self, split: str) -> Iterator[types.EvalBatch]:
    """See `Dataset.eval_batches`."""
    subset = self._subsets[split]
    read = functools.partial(
      _read_eval_step, subset, self._eval_plan, self._eval_resize
    )
    num_steps = self._eval_plan.num_eval_steps(len(subset.indices))
    stream = _stream(read, range(num_steps), num_workers=0)
    try:
      for images, labels, mask in stream:
        yield types.EvalBatch(
          self._normalise(images), jnp.array(labels), jnp.array(mask)
        )
    finally:
      stream.close()


@functools.partial(jax.jit, static_argnames=("plan", "policy"))
def _augment(
  images: jax.Array,
  draw: tuple[jax.Array, Any, Any],
  *,
  plan: datasets.BatchPlan,
  policy: augmentation.Policy,
) -> jax.Array:
  """See `augmentation.augment`."""
  return augmentation.augment(
    images, draw, policy, num_images=plan.batch_size, rows=plan.rows
  )


@dataclasses.dataclass(frozen=True)
class _TrainReader:
  """Reads the batch of a step, counted over all epochs; picklable."""

  subset: datasets.Subset
  plan: datasets.BatchPlan
  unlabeled: datasets.Subset | None
  unlabeled_plan: datasets.BatchPlan
  outer: datasets.Subset | None
  resize: _Transform
  crop: _Transform | None  # (image, rng) -> image; None to resize instead.
  seed: int

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    """Read the batch of a step.

    Returns:
      "images" [b, H, W, C] and "labels" [b, ...]; if there are any, "unlabeled"
      images [u, H, W, C], and "outer_images" and "outer_labels" in the shapes
      of the first two.
    """
    num_images = len(self.subset.indices)
    epoch, step_of_epoch = divmod(step, num_images // self.plan.batch_size)
    slots = self.plan.slots(step_of_epoch)
    positions = datasets.epoch_order(self.seed, epoch, num_images)[slots]
    # Seeded by the slot in the epoch, so that it does not matter which worker
    # reads the image. Slots count from 1 here: NumPy pads entropy with zeros,
    # so that a 0 would repeat the stream of `epoch_order`.
    entropies = [(self.seed, epoch, 1 + slot) for slot in slots]
    batch = {
      "images": self._read(self.subset, positions, entropies),
      "labels": self.subset.targets[positions],
    }
    if self.unlabeled is not None:
      slots = self.unlabeled_plan.slots(step)
      positions = datasets.stream_positions(
        self.seed,
        slots,
        len(self.unlabeled.indices),
        stream=datasets.UNLABELED,
      )
      batch["unlabeled"] = self._read(
        self.unlabeled,
        positions,
        [(self.seed, slot, 0, datasets.UNLABELED_CROPS) for slot in slots],
      )
    if self.outer is not None:
      positions = datasets.stream_positions(
        self.seed,
        self.plan.slots(step),
        len(self.outer.indices),
        stream=datasets.OUTER,
      )
      batch["outer_images"] = _read_resized(self.outer, positions, self.resize)
      batch["outer_labels"] = self.outer.targets[positions]
    return batch

  def _read(
    self,
    subset: datasets.Subset,
    positions: np.ndarray,
    entropies: Sequence[tuple[int, ...]],
  ) -> np.ndarray:
    """Read images [n, H, W, C], each with its own random generator."""
    images = []
    for position, entropy in zip(positions, entropies, strict=True):
      transform = self.resize
      if self.crop is not None:
        rng = np.random.default_rng(entropy)
        transform = functools.partial(self.crop, rng=rng)
      images.append(subset.read(position, transform))
    return np.stack(images)


def _read_eval_step(
  subset: datasets.Subset,
  plan: datasets.BatchPlan,
  resize: _Transform,
  step: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return images [b, H, W, C], labels [b, ...] and mask [b] of a step."""
  positions, mask = plan.eval_positions(len(subset.indices), step)
  return (
    _read_resized(subset, positions, resize),
    subset.targets[positions],
    mask,
  )


def _read_resized(
  subset: datasets.Subset, positions: np.ndarray, resize: _Transform
) -> np.ndarray:
  """Read images [b, H, W, C] as evaluation does."""
  return np.stack([subset.read(position, resize) for position in positions])


def _stream(
  read_step: Callable[[int], Any],
  steps: range,
  *,
  num_workers: int,
) -> Any:
  """Open a Grain iterator over the results of `read_step`."""
  grain = imports.require("grain", needed_for="reading large images")
  # Grain 0.2.18 reads this flag even if no absl app has parsed any flags
  # (google/grain, issue 1355).
  if PROFILING_FLAG in flags.FLAGS:
    flags.FLAGS[PROFILING_FLAG].present = True
  # The elements are whole batches, so that their composition and order do not
  # depend on the number of workers.
  threads = 1 if num_workers else min(os.cpu_count() or 1, MAX_THREADS)
  numbers = grain.MapDataset.range(steps.start, steps.stop)
  batches = numbers.map(read_step).to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  )
  options = grain.MultiprocessingOptions(
    num_workers=num_workers, per_worker_buffer_size=2
  )
  return iter(batches.mp_prefetch(options, worker_init_fn=_end_with_parent))


def _end_with_parent(*_: int) -> None:
  """Make this worker exit when its parent process ends, for whatever reason.

  Ctrl-C reaches all processes, but only the parent handles it.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent

  def wait():
    parent.join()
    os._exit(1)  # `sys.exit` would end only this thread.

  threading.Thread(target=wait, daemon=True).start()
