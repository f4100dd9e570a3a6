"""Long runs that sample what they hold, each in a process of its own.

    python -m tests.support.soak training FOLDER
    python -m tests.support.soak streaming FOLDER

train for 2,000 iterations, or read as many batches from files, and write the
samples to FOLDER/held.json: a list of `Held` as dicts.
"""

from collections.abc import Callable
import ctypes
import gc
import json
import os
import pathlib
import resource
import sys
from typing import NamedTuple

import jax
import PIL.Image

from benchmarks import soak
from l2t_jax import data
from l2t_jax.runtime import logs
from tests.support import small_runs

EPOCHS = 50
STEPS_PER_EPOCH = 40
CHECKPOINT_EVERY = 5
# Epochs after a checkpoint, which is written in the background, when a sample
# is taken. Not every epoch: collecting garbage takes half a second.
SAMPLE_AFTER = 3
_COMPILED = "/jax/core/compile/backend_compile_duration"
_TRACED = "/jax/core/compile/jaxpr_trace_duration"


class Held(NamedTuple):
  """What this process holds after an epoch, and what it has compiled."""

  epoch: int
  # Resident bytes. Without the pages of files, which come and go as the kernel
  # likes, and without what `free` keeps for later.
  memory: int
  arrays: int  # Of JAX, alive.
  files: int  # Open descriptors.
  threads: int  # Of the operating system.
  compiled: int  # Programs since the start, those from a cache among them.
  traced: int  # Functions since the start.


def training(folder: pathlib.Path, sample: Callable[[int], None]) -> None:
  """Train by the paper's method: with evaluation, records and checkpoints."""
  source = soak.save_source(folder, image_size=8)
  config = small_runs.small_config(source, EPOCHS)
  config.data.name = "digits"
  config.data.per_class = 16
  config.batch_size = 4
  config.checkpoint_every = CHECKPOINT_EVERY
  write = logs.MetricsLog.write

  def write_and_sample(log, kind, step, values):
    write(log, kind, step, values)
    if kind == "epoch":
      assert step == STEPS_PER_EPOCH * values["epoch"]
      sample(values["epoch"])

  logs.MetricsLog.write = write_and_sample
  small_runs.train(config, folder / "run")


def streaming(folder: pathlib.Path, sample: Callable[[int], None]) -> None:
  """Read images from files, training and evaluating in turn."""
  for label in range(2):
    (folder / "images" / str(label)).mkdir(parents=True)
    for index in range(60):
      PIL.Image.new("L", (8, 8), 4 * index).save(
        folder / "images" / str(label) / f"{index}.png"
      )
  fields = data.DataFields(
    source="folder",
    path=str(folder / "images"),
    image_size=8,
    channels=1,
    mean=(0.5,),
    std=(0.5,),
    augment="random_resized_crop_flip",
    eval_resize=8,
    val_fraction=1 / 6,
    test_fraction=1 / 6,
    num_workers=1,
    in_memory=False,
  )
  dataset = data.load(fields, batch_size=2, seed=0)
  assert dataset.steps_per_epoch == STEPS_PER_EPOCH
  for epoch in range(EPOCHS):
    for batch in dataset.train_batches(epoch):
      jax.block_until_ready(batch)
    for split in ("val", "test"):
      for batch in dataset.eval_batches(split):
        jax.block_until_ready(batch)
    sample(epoch + 1)


def main(what: str, folder: str) -> None:
  events = {_COMPILED: 0, _TRACED: 0}
  held = []

  def count(event, duration, **_):
    del duration
    if event in events:
      events[event] += 1

  def sample(epoch):
    if epoch > 1 and epoch % CHECKPOINT_EVERY != SAMPLE_AFTER:
      return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _, resident, of_files, *_ = map(
      int, pathlib.Path("/proc/self/statm").read_text().split()
    )
    held.append(
      Held(
        epoch,
        memory=(resident - of_files) * resource.getpagesize(),
        arrays=len(jax.live_arrays()),
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        compiled=events[_COMPILED],
        traced=events[_TRACED],
      )
    )

  jax.monitoring.register_event_duration_secs_listener(count)
  {"training": training, "streaming": streaming}[what](
    pathlib.Path(folder), sample
  )
  (pathlib.Path(folder) / "held.json").write_text(
    json.dumps([one._asdict() for one in held])
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
