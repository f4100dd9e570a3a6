"""Peak memory of reading a weight file, relative to the file's size (Linux).

    python -m benchmarks.loading weights/convnext.safetensors

Prints how much the process's memory grows at most, sampled every millisecond:
of its own, and with the pages of the mapped file, which the system can drop.
"""

from __future__ import annotations

import argparse
import pathlib
import threading
import time

import jax

from l2t_jax.models import weight_files

_MIB = 2**20


class _Peak(threading.Thread):
  """Samples the memory of the process, as a context manager."""

  def __init__(self):
    super().__init__(daemon=True)
    self._ended = threading.Event()
    self._first = _memory()
    self.growth = (0, 0)  # Bytes: the process's own, with mapped files.

  def run(self):
    while not self._ended.is_set():
      now = [a - b for a, b in zip(_memory(), self._first, strict=True)]
      self.growth = tuple(map(max, self.growth, now))
      time.sleep(1e-3)

  def __enter__(self):
    self.start()
    return self

  def __exit__(self, *_):
    time.sleep(0.01)
    self._ended.set()
    self.join()


def _memory():
  """Return (anonymous memory, all resident memory) in bytes."""
  status = pathlib.Path("/proc/self/status").read_text().splitlines()
  sizes = dict(line.split(":") for line in status if line.endswith("kB"))
  size = lambda name: int(sizes[name].split()[0]) * 1024
  return size("RssAnon"), size("VmRSS")


def main() -> None:
  """Read a file and print what it took."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("weights", type=pathlib.Path)
  path = parser.parse_args().weights
  jax.devices()  # What JAX itself takes is not counted.
  with _Peak() as peak:
    loaded = weight_files.load_network(path)
  size = path.stat().st_size
  own, mapped = peak.growth
  print(f"jax {jax.__version__}, {path.name}: {size / _MIB:.0f} MiB")
  print(f"own memory {own / _MIB:.0f} MiB, {own / size:.2f} times the file")
  print(f"with mapped files {mapped / _MIB:.0f} MiB, {mapped / size:.2f} times")
  with _Peak() as peak:
    jax.block_until_ready(jax.device_put(loaded.params))
  print(f"placed on {jax.devices()[0]}: {peak.growth[0] / _MIB:.0f} MiB more")


if __name__ == "__main__":
  main()
