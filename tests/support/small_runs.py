"""Small runs on real digits, for tests from the command line or a config."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from configs import digits
from l2t_jax.run import from_config
from l2t_jax.runtime import logs

ROOT = pathlib.Path(__file__).parents[2]
# How long a test waits for a process, in seconds; what takes two minutes on a
# fast machine takes eight on a slow one.
PATIENCE = 1_200


class Killed(Exception):
  """Stands for what ends a run in the middle."""


def kill_in_epoch(number, train, monkeypatch):
  """Call `train`, which dies when it records something of an epoch."""
  write = logs.MetricsLog.write

  def write_or_die(self, kind, step, values):
    if values["epoch"] == number:
      raise Killed
    write(self, kind, step, values)

  with monkeypatch.context() as patch:
    patch.setattr(logs.MetricsLog, "write", write_or_die)
    with pytest.raises(Killed):
      train()


def run_python(*arguments, **options):
  """Run Python with some arguments in the root of the project."""
  process = start_python(*arguments, **options)
  try:
    stdout, stderr = process.communicate(timeout=PATIENCE)
  finally:
    process.kill()
  return subprocess.CompletedProcess(
    process.args, process.returncode, stdout, stderr
  )


def start_python(*arguments, environment=None, **options):
  """Start what `run_python` runs.

  It compiles quickly, as this process does; see conftest.py.
  """
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    # The level is l2t_jax's own; jax, imported first here, has set another.
    env=os.environ
    | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    | (environment or {}),
    **options,
  )


def small_config(source, epochs=3):
  config = digits.get_config()
  config.source.weights = str(source)
  config.epochs = epochs
  config.batch_size = 16
  config.data.image_size = 8
  config.data.val_fraction = 0.02
  config.data.test_fraction = 0.02
  config.transfer.pairs = "stage3_block1->conv3, stage1_block1->conv1"
  config.bilevel.num_inner_steps = 1
  config.checkpoint_every = 1
  return config


def write_config(
  folder, source, *, epochs, log_every, checkpoint_steps, num_workers=0
):
  """Write a config of runs that are started again and again: they start fast.

  Returns:
    The file, which `train.py` takes. An epoch has 25 iterations, with images of
    digits from memory, or from files that some workers read.
  """
  config = small_config(source, epochs)
  config.data.per_class = 40
  config.data.name = "digits"
  config.bilevel.outer_images = "validation"
  if num_workers:
    config.data.update(_save_images(folder / "images"))
    config.data.num_workers = num_workers
    config.method = "scratch"
    config.batch_size = 4
  config.trackers = ()
  config.log_every = log_every
  config.checkpoint_steps = checkpoint_steps
  path = folder / "config.json"
  path.write_text(config.to_json())
  return path


def _save_images(folder):
  """Save 140 that are read as larger ones than memory keeps; say how."""
  rng = np.random.default_rng(0)
  for label in "ab":
    (folder / label).mkdir(parents=True)
    for index in range(70):
      pixels = rng.integers(0, 256, (20, 20), dtype=np.uint8)
      Image.fromarray(pixels).save(folder / label / f"{index}.png")
  return {
    "source": "folder",
    "name": "",
    "path": str(folder),
    "image_size": 100,
    "eval_resize": 100,
    "augment": "random_resized_crop_flip",
    "val_fraction": 0.1,
    "test_fraction": 0.1,
    "per_class": 50,
  }


def train(config, workdir):
  """Train one seed of a config; return its summary."""
  (summary,) = from_config.train_and_evaluate(config, {config.seed: workdir})
  return summary


def records(workdir, kind):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [r for r in map(json.loads, lines) if r["kind"] == kind]
