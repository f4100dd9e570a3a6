"""What an iteration would cost on many devices: on paper, from its program.

    python -m benchmarks.scaling

Compiles an iteration of the paper's setting for several fake CPU devices, 128
images on each, and counts its collectives. How long they and the products take
on 8, 64 and 512 accelerators follows from a machine's data, which are flags; by
default those of eight-GPU nodes of the H100 class. Nothing is overlapped, so
that the efficiency is a lower bound. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys

import jax

from benchmarks import cases, growth

_COUNTS = (2, 4, 8)  # Fake devices; further ones are extrapolated.
_TARGETS = (8, 64, 512)
_IMAGES_EACH = 128
_GPUS_A_NODE = 8


def measure(count: int) -> dict[str, float]:
  """Compile for fake devices and count what each of them does."""
  assert jax.device_count() == count
  setting = cases.Setting(batch_size=_IMAGES_EACH * count)
  program = cases.compile_iteration(setting, cases.create(setting))
  hlo = program.call.as_text()
  return {
    "flops": program.flops,
    "collectives": growth.count_collectives(hlo),
    "collective_bytes": growth.collective_bytes(hlo),
  }


def predict(
  measured: dict[str, float], devices: int, args: argparse.Namespace
) -> dict[str, float]:
  """Return seconds of products and of collectives, and the efficiency."""
  compute = measured["flops"] / (args.teraflops * 1e12)
  # A ring sends everything twice, but for a device's own share.
  sent = 2 * (devices - 1) / devices * measured["collective_bytes"]
  inside = devices <= _GPUS_A_NODE
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


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  flag("--teraflops", type=float, default=100.0, help="a device, a second")
  flag("--node_gigabytes", type=float, default=300.0, help="inside, a second")
  flag(
    "--network_gigabytes", type=float, default=320.0, help="a node, a second"
  )
  flag("--microseconds", type=float, default=5.0, help="a doubling of devices")
  parser.add_argument("--num_devices", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.num_devices:
    jax.config.update("jax_num_cpu_devices", args.num_devices)
    print(json.dumps(measure(args.num_devices)))
    return
  measured = {count: _measure_apart(count) for count in _COUNTS}
  print("devices  GFLOP each  collectives  MB each")
  for count, one in measured.items():
    print(
      f"{count:7}  {one['flops'] / 1e9:10.0f}  {one['collectives']:11.0f}"
      f"  {one['collective_bytes'] / 1e6:7.0f}"
    )
  predicted = [predict(measured[_COUNTS[-1]], n, args) for n in _TARGETS]
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
    [sys.executable, "-m", "benchmarks.scaling", f"--num_devices={count}"],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
  main()
