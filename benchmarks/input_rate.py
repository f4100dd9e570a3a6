"""Images a second of the folder pipeline at 224x224, by number of workers.

    python -m benchmarks.input_rate --workers=0,1,2,4

Writes JPEG files of the size that photographs of bird and dog data sets have
(500x375) into a temporary folder and reads them as `train.py` does: decoded,
cropped at random, resized, flipped, batched. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time

import jax
import numpy as np
import PIL.Image
from rich import console, table

from l2t_jax import data

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


def measure(folder: pathlib.Path, num_workers: int, seconds: float) -> float:
  """Return images per second, after the workers have started."""
  fields = data.DataFields(
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


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workers", default="0,1,2,4")
  parser.add_argument("--images", type=int, default=640)
  parser.add_argument("--seconds", type=float, default=10)
  args = parser.parse_args()
  counts = [int(count) for count in args.workers.split(",")]
  with tempfile.TemporaryDirectory() as folder:
    write_images(pathlib.Path(folder), args.images)
    rates = {
      count: measure(pathlib.Path(folder), count, args.seconds)
      for count in counts
    }
  rows = table.Table("workers", "images/s")
  for count, rate in rates.items():
    rows.add_row(str(count) if count else "threads", f"{rate:.0f}")
  console.Console().print(rows)
  print(json.dumps({"images_per_second": rates}))


if __name__ == "__main__":
  main()
