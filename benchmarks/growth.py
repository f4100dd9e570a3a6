"""How the cost of an iteration grows.

    python -m benchmarks.growth --folder=runs/growth
    python -m benchmarks.growth --only=devices

One thing grows at a time, from ResNet-32 -> VGG-9 at batch 32 and T = 2: the
look-ahead, the pairs, the batch, the sources, the networks, and the devices
(fake CPU devices that share one batch; each count in a process of its own).
Prints time, FLOPs, memory and, for devices, the bytes of collectives in the
compiled program; the last line is a JSON object; a plot goes into --folder.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
from rich import console, table

from benchmarks import cases

_BASE = cases.Setting(batch_size=32)
_DEVICE_COUNTS = (1, 2, 4)
# In HLO, with the shapes of its results.
_COLLECTIVE = (
  r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all"
  r"|collective-permute)(?:-start)?\("
)
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


def _settings():
  """Axis -> label -> setting."""
  pairs = lambda count: ",".join(
    f"stage{m}_block5->conv{n}"
    for n in (8, 6, 4, 2, 1)[: math.ceil(count / 3)]
    for m in (3, 2, 1)
  )
  steps = (1, 2, 4, 8)
  at_224 = {
    "method": "l2t_ww",
    "image_size": 224,
    "batch_size": 8,
    "mode": "mixed",
  }
  return {
    **{
      axis: {
        str(T): _BASE._replace(num_inner_steps=T, mode=mode, rolled=rolled)
        for T in steps
      }
      for axis, mode, rolled in (
        ("T, linearized", "linearized", True),
        ("T, linearized, unrolled", "linearized", False),
        ("T, mixed", "mixed", True),
      )
    },
    "pairs": {
      str(n): _BASE._replace(pairs=pairs(n)) for n in (3, 6, 9, 12, 15)
    },
    "batch": {str(n): _BASE._replace(batch_size=n) for n in (16, 32, 64, 128)},
    "sources": {str(n): _BASE._replace(num_sources=n) for n in (1, 2, 3)},
    "networks": {
      "resnet32 -> vgg9, 32x32, batch 8": _BASE._replace(batch_size=8),
      "resnet34 -> resnet18, 224x224, batch 8": _BASE._replace(
        source="resnet34", target="resnet18", **at_224
      ),
    },
  }


def measure(setting: cases.Setting, rounds: int) -> dict[str, object]:
  """Compile and time a step."""
  iteration = cases.create(setting)
  program = cases.compile_iteration(setting, iteration)
  state, times = iteration.state, []
  for _ in range(1 + rounds):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(
      program.call(
        state,
        iteration.setup.scalars,
        iteration.setup.sources,
        iteration.batch,
      )
    )
    times.append(time.perf_counter() - start)
  return {
    "seconds": float(np.median(times[1:])),
    "flops": program.flops,
    "memory_bytes": program.memory_bytes,
    "compile_seconds": program.seconds,
  }


def measure_on_devices(count: int) -> dict[str, object]:
  """Compile for several devices; count FLOPs and bytes of collectives."""
  assert jax.device_count() == count
  program = cases.compile_iteration(_BASE, cases.create(_BASE))
  return {
    # XLA counts those of one device.
    "flops": program.flops * count,
    "memory_bytes": program.memory_bytes,
    "collective_bytes": collective_bytes(program.call.as_text()),
    "compile_seconds": program.seconds,
  }


def count_collectives(hlo: str) -> int:
  """Count the collectives of a program."""
  return len(re.findall(_COLLECTIVE, hlo))


def collective_bytes(hlo: str) -> int:
  """Sum the sizes of what collectives of a program return, on one device."""
  total = 0
  for result in re.findall(_COLLECTIVE, hlo):
    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
      sizes = [int(size) for size in shape.split(",") if size]
      total += _BYTES[kind] * math.prod(sizes)
  return total


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  axes = (*_settings(), "devices")
  parser.add_argument("--only", choices=axes)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--folder", type=pathlib.Path, help="for a plot")
  parser.add_argument("--num_devices", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.num_devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.num_devices)
    print(json.dumps(measure_on_devices(args.num_devices)))
    return
  results = {}
  for axis in (args.only,) if args.only else axes:
    if axis == "devices":
      results[axis] = {str(n): _in_process(n) for n in _DEVICE_COUNTS}
    else:
      results[axis] = {
        label: measure(setting, args.rounds)
        for label, setting in _settings()[axis].items()
      }
    _print(axis, results[axis])
  if args.folder:
    _draw(results, args.folder)
  print(json.dumps(results))


def _in_process(count):
  result = subprocess.run(
    [sys.executable, "-m", "benchmarks.growth", f"--num_devices={count}"],
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(result.stdout.splitlines()[-1])


def _print(axis, measured):
  names = list(dict.fromkeys(name for one in measured.values() for name in one))
  rows = table.Table(axis, *(name.replace("_", " ") for name in names))
  forms = {
    "seconds": lambda x: f"{x:.2f}",
    "flops": lambda x: f"{x / 1e9:,.0f} G" if x else "",
    "compile_seconds": lambda x: f"{x:.1f}",
  }
  mebibytes = lambda x: f"{x / 2**20:,.1f} Mi"
  for label, one in measured.items():
    rows.add_row(
      label, *(forms.get(name, mebibytes)(one[name]) for name in names)
    )
  console.Console(width=120).print(rows)


def _draw(results, folder):
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  drawn = [axis for axis in results if axis != "networks"]
  figure, axes = pyplot.subplots(
    2, len(drawn), figsize=(2.6 * len(drawn), 5), squeeze=False
  )
  for column, axis in zip(axes.T, drawn, strict=True):
    lower = "collective_bytes" if axis == "devices" else "memory_bytes"
    upper = "flops" if axis == "devices" else "seconds"
    for panel, name in zip(column, (upper, lower), strict=True):
      factor = {"flops": 1e-9, "seconds": 1.0}.get(name, 2**-20)
      values = [one[name] * factor for one in results[axis].values()]
      amounts = [int(label) for label in results[axis]]
      panel.plot(amounts, values, "o-", color="tab:blue", clip_on=False)
      panel.set_xticks(amounts)
      unit = {"flops": "GFLOP in total", "seconds": "s per iteration"}
      panel.set_ylabel(unit.get(name, name.split("_")[0] + ", MiB"))
      panel.set(xlim=(0, None), ylim=(0, None))
      panel.spines[["top", "right"]].set_visible(False)
    column[1].set_xlabel(axis)
  figure.tight_layout()
  folder.mkdir(parents=True, exist_ok=True)
  figure.savefig(folder / "growth.png", dpi=150)
  print(f"plot: {folder / 'growth.png'}")


if __name__ == "__main__":
  main()
