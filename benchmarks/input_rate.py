"""Images a second of the folder pipeline at 224x224, by number of workers.

    python -m benchmarks.input_rate --workers=0,1,2,4

Writes JPEG files of the size that photographs of bird and dog data sets have
(500x375) into a temporary folder and reads them as `train.py` does: decoded,
cropped at random, resized, flipped, batched. Then it times, in turn, threads
that decode each file with Pillow and do nothing else, and what is done before
training: the look (`python -m l2t_jax.data`), and the check of all files. The
last line is a JSON object.
"""

from __future__ import annotations

import argparse
from concurrent import futures
import json
import os
import pathlib
import tempfile
import time

import jax
import numpy as np
import PIL.Image
from rich import console, table

from l2t_jax import data
from l2t_jax.data import look, pillow

_NUM_CLASSES = 4
_BATCH_SIZE = 32


def write_images(folder: pathlib.Path, num_images: int) -> None:
  """Write JPEG files of smooth noise, PATH/train/CLASS/."""
  rng = np.random.default_rng(0)
  for index in range(num_images):
    label = folder / "train" / f"class{index % _NUM_CLASSES}"
    label.mkdir(parents=True, exist_ok=True)
    coarse = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(coarse).resize((500, 375), PIL.Image.BICUBIC)
    image.save(label / f"{index}.jpg", quality=90)


def make_fields(folder: pathlib.Path, num_workers: int) -> data.DataFields:
  """Return the fields that read a folder as configs/cub200.py does."""
  return data.DataFields(
    source="folder",
    path=str(folder),
    image_size=224,
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    augment="random_resized_crop_flip",
    eval_resize=256,
    val_fraction=0.1,
    test_fraction=0.1,
    num_workers=num_workers,
  )


def measure(folder: pathlib.Path, num_workers: int, seconds: float) -> float:
  """Return images per second, after the workers have started."""
  fields = make_fields(folder, num_workers)
  dataset = data.load(fields, batch_size=_BATCH_SIZE, seed=0)
  count, start, epoch = 0, None, 0
  while True:
    for batch in dataset.train_batches(epoch):
      jax.block_until_ready(batch.images)
      if start is None:
        start = time.perf_counter()
        continue
      count += _BATCH_SIZE
      elapsed = time.perf_counter() - start
      if elapsed > seconds:
        return count / elapsed
    epoch += 1


def decode(path: pathlib.Path) -> None:
  """Decode a file as anyone would."""
  PIL.Image.open(path).convert("RGB")


def decode_and_crop(path: pathlib.Path) -> np.ndarray:
  """Decode a file, and crop and resize it as training does."""
  image = PIL.Image.open(path).convert("RGB")
  rng = np.random.default_rng(int(path.stem))
  box = pillow.random_box(*image.size, rng)
  crop = image.crop(box).resize((224, 224), PIL.Image.Resampling.BILINEAR)
  return np.asarray(crop)


def seconds_before_training(
  folder: pathlib.Path, rounds: int
) -> dict[str, list[float]]:
  """Return what is done -> seconds in each round, in turn."""
  files = sorted(folder.rglob("*.jpg"))
  fields = make_fields(folder, 0)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    jobs = {
      "Pillow decodes": lambda: list(pool.map(decode, files)),
      "the look": lambda: look.look(data.open_images(fields)),
      "the check": lambda: data.load(fields, batch_size=_BATCH_SIZE, seed=0),
      "Pillow decodes, crops": lambda: list(pool.map(decode_and_crop, files)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
      for name, job in jobs.items():
        start = time.perf_counter()
        job()
        seconds[name].append(time.perf_counter() - start)
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workers", default="0,1,2,4")
  parser.add_argument("--images", type=int, default=640)
  parser.add_argument("--seconds", type=float, default=10)
  parser.add_argument("--rounds", type=int, default=7)
  args = parser.parse_args()
  counts = [int(count) for count in args.workers.split(",")]
  with tempfile.TemporaryDirectory() as folder:
    write_images(pathlib.Path(folder), args.images)
    rates = {
      count: measure(pathlib.Path(folder), count, args.seconds)
      for count in counts
    }
    seconds = seconds_before_training(pathlib.Path(folder), args.rounds)
  rows = table.Table("workers", "images/s")
  for count, rate in rates.items():
    rows.add_row(str(count) if count else "threads", f"{rate:.0f}")
  console.Console().print(rows)
  plain = seconds["Pillow decodes"]
  ratios = {
    name: float(np.median(np.divide(times, plain)))
    for name, times in seconds.items()
  }
  before = table.Table("before training", "images/s", "relative time")
  for name, ratio in ratios.items():
    rate = args.images / np.median(seconds[name])
    before.add_row(name, f"{rate:.0f}", f"{ratio:.2f}")
  console.Console().print(before)
  print(json.dumps({"images_per_second": rates, "ratios": ratios}))


if __name__ == "__main__":
  main()
