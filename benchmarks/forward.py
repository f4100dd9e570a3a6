"""The forward passes of networks in weight files, timed in turn.

    python -m benchmarks.forward native.safetensors converted.safetensors

prints for each file the median time of a pass, with half the distance between
the quartiles, its FLOPs by XLA's count, and the time relative to the first
file; the last line is a JSON object. Files of one network, once mapped to the
bundled one and once converted to a program, show what the conversion costs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import jax
import numpy as np

from l2t_jax import errors, models
from l2t_jax.models import bundled, weight_files
from l2t_jax.runtime import compilation, cpu_lowering


def _compile(path, batch_size):
  """Return (images -> logits, GFLOP) for images of the network's own size."""
  loaded = weight_files.load_network(path)
  size = int(loaded.metadata.get("image_size", 0))
  size = size or bundled.image_size(loaded.network)
  shape = (batch_size, size, size, int(loaded.metadata["channels"]))
  images = np.random.default_rng(0).random(shape, np.float32)
  apply_fn = models.as_apply_fn(loaded.network, ())
  variables = jax.device_put((loaded.params, loaded.model_state))
  program = compilation.compile_ahead(
    jax.jit(
      lambda variables, images: apply_fn(*variables, images, train=False)[0]
    ),
    variables,
    images,
  ).result()
  return (lambda: program.call(variables, images)), program.flops or 0.0


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("files", type=pathlib.Path, nargs="+")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=7)
  args = parser.parse_args()
  cpu_lowering.install()
  passes = {path: _compile(path, args.batch) for path in args.files}
  for call, _ in passes.values():
    jax.block_until_ready(call())
  seconds: dict[pathlib.Path, list[float]] = {path: [] for path in passes}
  for _ in range(args.rounds):
    for path, (call, _) in passes.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[path].append(time.perf_counter() - start)
  measured = {}
  for path, (_, flops) in passes.items():
    low, median, high = np.percentile(seconds[path], (25, 50, 75))
    ratio = np.median(np.divide(seconds[path], seconds[args.files[0]]))
    measured[str(path)] = {"seconds": median, "flops": flops, "ratio": ratio}
    print(
      f"{path}: {median:.3f} ± {(high - low) / 2:.3f} s,"
      f" {flops / 1e9:.2f} GFLOP, {ratio:.2f} times {args.files[0]}"
    )
  print(json.dumps(measured))


if __name__ == "__main__":
  with errors.errors_in_one_line():
    main()
