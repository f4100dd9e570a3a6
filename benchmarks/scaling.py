"""What an iteration would cost on many devices: on paper, from its program.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --groups=1
    python -m benchmarks.scaling --topology=v5e:2x2 --precision=bf16

Compiles an iteration of the paper's setting for fake CPU devices, or for a TPU,
which needs `pip install libtpu`, but no TPU. Prints what the program of each
device computes, needs and sends. How long computation and communication take on
8, 64 and 512 accelerators follows from a machine's data, which are flags; by
default those of eight-GPU nodes of the H100 class, whose GPUs compute as fast
as one H200 does in an iteration in TF32 (benchmarks/SPEED.md). Nothing is
overlapped, so the efficiency is a lower bound. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time

import jax

from benchmarks import cases, growth
from l2t_jax.runtime import sharding

_COUNTS = (2, 4, 8)  # Fake devices; further ones are extrapolated.
_TARGETS = (8, 64, 512)


def measure(args: argparse.Namespace) -> dict[str, float]:
  """Compile an iteration and return its costs on one device."""
  if args.topology:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=args.topology
    ).devices
  else:
    devices = jax.devices()
  setting = cases.Setting(
    batch_size=args.images * len(devices),
    precision=args.precision,
    source=args.source,
    target=args.target,
    image_size=args.image_size,
    batch_norm_groups=args.groups * len(devices) or 1,
  )
  iteration = cases.create(setting)
  start = time.perf_counter()
  program = cases.compile_for(setting, iteration, sharding.make_mesh(devices))
  hlo = program.as_text()
  assert " while(" not in hlo, "XLA counts the body of a loop only once"
  memory = program.memory_analysis()
  return {
    "devices": len(devices),
    "flops": program.cost_analysis()["flops"],
    "temporary_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "collectives": growth.count_collectives(hlo),
    "collective_bytes": growth.collective_bytes(hlo),
    "compile_seconds": time.perf_counter() - start,
  }


def predict(
  measured: dict[str, float], devices: int, args: argparse.Namespace
) -> dict[str, float]:
  """Return seconds of products and of collectives, and the efficiency."""
  compute = measured["flops"] / (args.teraflops * 1e12)
  # With a ring of n devices, each sends (n - 1) / n of the data, twice.
  sent = 2 * (devices - 1) / devices * measured["collective_bytes"]
  inside = devices <= args.node_devices
  bandwidth = args.node_gigabytes if inside else args.network_gigabytes
  latency = args.microseconds * 1e-6 * math.log2(devices)
  transfer = sent / (bandwidth * 1e9)
  waiting = measured["collectives"] * latency
  return {
    "devices": devices,
    "compute_ms": 1e3 * compute,
    "transfer_ms": 1e3 * transfer,
    "latency_ms": 1e3 * waiting,
    "efficiency": compute / (compute + transfer + waiting),
  }


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  flag("--topology", default="", help="of a TPU, such as v5e:2x2 or v5e:4x4")
  flag("--precision", default="f32", help="f32, tf32 or bf16")
  flag("--groups", type=int, default=0, help="of batch norm on each device")
  flag("--images", type=int, default=128, help="on each device")
  flag("--source", default="resnet32")
  flag("--target", default="vgg9")
  flag("--image_size", type=int, default=32)
  flag("--teraflops", type=float, default=66.0, help="per device")
  flag("--node_devices", type=int, default=8)
  flag("--node_gigabytes", type=float, default=300.0, help="inside, a second")
  flag(
    "--network_gigabytes", type=float, default=320.0, help="a node, a second"
  )
  flag("--microseconds", type=float, default=5.0, help="a doubling of devices")
  flag("--num_devices", type=int, help=argparse.SUPPRESS)
  return parser


def main() -> None:
  args = make_parser().parse_args()
  if args.num_devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.num_devices)
    print(json.dumps(measure(args)))
    return
  counts = (1,) if args.topology else _COUNTS
  measured = [_measure_apart(count) for count in counts]
  print("devices  GFLOP each  MiB each  collectives  MB summed  compiled in")
  for one in measured:
    memory = (one["temporary_bytes"] + one["argument_bytes"]) / 2**20
    print(
      f"{one['devices']:7}  {one['flops'] / 1e9:10.0f}  {memory:8.0f}"
      f"  {one['collectives']:11.0f}  {one['collective_bytes'] / 1e6:9.0f}"
      f"  {one['compile_seconds']:9.0f} s"
    )
  predicted = [predict(measured[-1], n, args) for n in _TARGETS]
  print("devices  compute ms  transfer ms  latency ms  efficiency")
  for one in predicted:
    print(
      f"{one['devices']:7}  {one['compute_ms']:10.2f}"
      f"  {one['transfer_ms']:11.2f}  {one['latency_ms']:10.2f}"
      f"  {one['efficiency']:10.0%}"
    )
  print(json.dumps({"measured": measured, "predicted": predicted}))


def _measure_apart(count):
  """In a process of its own: the number of devices is fixed at its start."""
  result = subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:]),
      f"--num_devices={count}",
    ],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    # Otherwise libtpu asks a server of Google Cloud about the TPU.
    env=os.environ | {"TPU_SKIP_MDS_QUERY": "1"},
  )
  return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
  main()
