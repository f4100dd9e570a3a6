"""What a run holds, and how long its iterations take, for an hour or longer.

    nice python -m benchmarks.soak --minutes=60 --folder=runs/soak

trains the demo's networks by l2t_ww on streamed images, with evaluations,
checkpoints, records and TensorBoard, and reads every ten seconds what the
kernel says of the run and of the process that reads its images: memory, open
files, threads and processor time. The run itself records, between two
iterations, how much memory it has from malloc: arrays and large objects, not
small objects of Python. What the kernel says includes memory that malloc keeps
for later. Prints the slopes per 1,000 iterations after the first tenth, and of
the last half; the last line is a JSON object; it and a plot go into --folder,
where samples.jsonl has each sample as soon as it is taken.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from scipy import stats
from sklearn import datasets

from configs import digits
from l2t_jax import errors, models
from l2t_jax.models import weight_files
from l2t_jax.run import from_config, train
from l2t_jax.runtime import logs

_INTERVAL = 10.0  # Seconds between samples.
_WARM = 0.1  # The share of the samples that the slopes leave out.
_EPOCHS = 10**6  # The run is asked to stop long before.


class Sample(NamedTuple):
  """What a run and its workers hold at one moment."""

  iteration: int
  seconds: float  # Since the first sample.
  processor_seconds: float  # Of the run's own process.
  allocated: float  # MiB of its own, from malloc, at the last record.
  memory: float  # MiB of its own, without the pages of files.
  workers_memory: float  # MiB, of the processes that it started.
  files: int  # Open descriptors, of all.
  threads: int  # Of all.


def sample(pid: int, metrics: pathlib.Path, start: float) -> Sample | None:
  """Read what a process holds; None before its first record."""
  record = _last_record(metrics)
  if record is None:
    return None
  held = np.array([_holds(one) for one in _family(pid)])
  times = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
  ticks = sum(map(int, times.split()[11:13]))
  return Sample(
    record["step"],
    time.monotonic() - start,
    ticks / os.sysconf("SC_CLK_TCK"),
    record["allocated"],
    float(held[0, 0]),
    float(held[1:, 0].sum()),
    *map(int, held[:, 1:].sum(axis=0)),
  )


def _last_record(metrics):
  """Return the last whole record of training."""
  if not metrics.exists():
    return None
  with metrics.open("rb") as file:
    file.seek(max(0, metrics.stat().st_size - 100_000))
    lines = re.findall(rb'^({"kind": "train".*)\n', file.read(), re.M)
  return json.loads(lines[-1]) if lines else None


def _family(pid):
  """Return a process and those that it started, and they."""
  family = [pid]
  for one in family:
    for task in pathlib.Path(f"/proc/{one}/task").iterdir():
      family += map(int, (task / "children").read_text().split())
  return family


def _holds(pid):
  """Return (MiB, open files, threads) of one process."""
  folder = pathlib.Path(f"/proc/{pid}")
  status = (folder / "status").read_text()
  read = lambda name: int(re.search(rf"^{name}:\s*(\d+)", status, re.M)[1])
  return (
    read("RssAnon") / 1024,
    len(list((folder / "fd").iterdir())),
    read("Threads"),
  )


def slopes(samples: list[Sample]) -> dict[str, float]:
  """Return the slope of each count per 1,000 iterations, and of its last half.

  It is the median over pairs of samples (Theil-Sen), because a few samples are
  taken during the background write of a checkpoint.
  "seconds" and "processor_seconds" are the times of 1,000 iterations, as of the
  first and of the last half.
  """
  kept = samples[round(_WARM * len(samples)) :]
  columns = Sample(*map(np.array, zip(*kept, strict=True)))
  thousands = columns.iteration / 1000
  first, last = np.array_split(np.arange(len(kept)), 2)
  slope = lambda y, x: float(stats.theilslopes(y, x)[0])
  fitted = {}
  for name in ("allocated", "memory", "workers_memory", "files", "threads"):
    values = getattr(columns, name)
    fitted[name] = slope(values, thousands)
    fitted[f"{name}_last_half"] = slope(values[last], thousands[last])
  for name in ("seconds", "processor_seconds"):
    for half, part in (("first", first), ("last", last)):
      iterations = thousands[part]
      times = getattr(columns, name)[part]
      fitted[f"{name}_{half}_half"] = float(np.polyfit(iterations, times, 1)[0])
  return fitted


def save_source(folder: pathlib.Path, image_size: int) -> pathlib.Path:
  """Save an untrained source network for grey images; return the file."""
  network = models.create("resnet_tiny", 10)
  shape = (image_size, image_size, 1)
  params, model_state = models.init(network, jax.random.key(0), shape)
  source = folder / "source.safetensors"
  weight_files.save(
    source,
    jax.device_get({"params": params, **model_state}),
    {"model": "resnet_tiny", "num_classes": "10", "channels": "1"},
  )
  return source


class _Mallinfo(ctypes.Structure):
  """What glibc's mallinfo2 returns, in bytes."""

  _fields_ = tuple(
    (name, ctypes.c_size_t)
    for name in (
      *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
      *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )
  )


def allocated() -> float:
  """Return the MiB that this process has from malloc and has not freed.

  It needs glibc 2.33 or newer.
  """
  mallinfo2 = ctypes.CDLL(None).mallinfo2
  mallinfo2.restype = _Mallinfo
  info = mallinfo2()
  return (info.uordblks + info.hblkhd) / 2**20


def _train(folder):
  """Be the run."""
  write = logs.MetricsLog.write
  logs.MetricsLog.write = lambda log, kind, step, values: write(
    log, kind, step, {**values, "allocated": allocated()}
  )
  config = digits.get_config()
  config.source.weights = str(save_source(folder, image_size=16))
  config.epochs = _EPOCHS
  config.checkpoint_every = 20
  config.data.update(
    {
      "source": "folder",
      "name": "",
      "path": str(folder / "images"),
      "per_class": 0,
      "num_workers": 1,
    }
  )
  experiment = from_config.resolve(config)
  reading = dataclasses.replace(
    experiment.reading, in_memory=False, augment="random_resized_crop_flip"
  )
  train.train(experiment._replace(reading=reading), folder / "run")


def _save_images(folder):
  """Save scikit-learn's digits as files."""
  content = datasets.load_digits()
  for index, (pixels, label) in enumerate(
    zip(content.images, content.target, strict=True)
  ):
    path = folder / str(label) / f"{index}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((15.9 * pixels).astype(np.uint8)).save(path)


def _watch(process, folder, seconds):
  """Sample a run for some time, and ask it to stop."""
  metrics = folder / "run" / "metrics.jsonl"
  samples: list[Sample] = []
  start = time.monotonic()
  while not samples or samples[-1].seconds < seconds:
    time.sleep(_INTERVAL)
    if process.poll() is not None:
      raise SystemExit(f"error: the run ended with code {process.returncode}")
    try:
      held = sample(process.pid, metrics, start)
    except (FileNotFoundError, ProcessLookupError):
      continue  # One of the processes ended meanwhile.
    if held is None:
      start = time.monotonic()
    elif not samples or held.iteration > samples[-1].iteration:
      samples.append(held)
      with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(held._asdict()) + "\n")
  process.send_signal(signal.SIGTERM)
  code = process.wait(timeout=600)
  if code != errors.Interrupted.exit_code:
    raise SystemExit(f"error: asked to stop, the run ended with code {code}")
  return samples


def _draw(samples, path):
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  columns = Sample(*map(np.array, zip(*samples, strict=True)))
  thousands = columns.iteration / 1000
  rate = lambda times: 1000 * np.diff(times) / np.diff(columns.iteration)
  panels = {
    "allocated, MiB": (thousands, columns.allocated),
    "memory, MiB": (thousands, columns.memory),
    "memory of workers, MiB": (thousands, columns.workers_memory),
    "open files": (thousands, columns.files),
    "threads": (thousands, columns.threads),
    "processor time per iteration, ms": (
      thousands[1:],
      rate(columns.processor_seconds),
    ),
  }
  figure, axes = pyplot.subplots(
    1, len(panels), figsize=(3 * len(panels), 2.6), layout="constrained"
  )
  for panel, (title, (x, y)) in zip(axes, panels.items(), strict=True):
    panel.plot(x, y, ".", markersize=3, color="tab:blue")
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("1,000 iterations")
    panel.set(xlim=(0, None), ylim=(0, 1.15 * max(y)))
    panel.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=120)
  print(f"plot: {path}")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--minutes", type=float, default=60.0)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.train:
    _train(args.folder)
    return
  if args.folder.exists():
    parser.error(f"--folder={args.folder} exists; name a new one")
  _save_images(args.folder / "images")
  command = [sys.executable, "-m", "benchmarks.soak", "--train"]
  with (args.folder / "output.txt").open("w") as output:
    process = subprocess.Popen(
      [*command, f"--folder={args.folder}"],
      stdout=output,
      stderr=subprocess.STDOUT,
    )
    try:
      samples = _watch(process, args.folder, 60 * args.minutes)
    finally:
      process.kill()
  found = slopes(samples)
  for name, value in found.items():
    print(f"{name} per 1,000 iterations: {value:.3f}")
  measured = json.dumps({"slopes": found, "samples": samples})
  (args.folder / "soak.json").write_text(measured)
  _draw(samples, args.folder / "soak.png")
  print(measured)


if __name__ == "__main__":
  with errors.errors_in_one_line():
    main()
