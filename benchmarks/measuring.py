"""How benchmarks measure, and what their figures depend on.

The peers' environments import this module, too: it needs nothing but NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import subprocess
import time
from typing import Any

import numpy as np


def median_seconds(run: Callable[[], object], rounds: int) -> float:
  """Return the median time of a call, after a first one.

  Args:
    run: what is timed; it returns when its result is there.
    rounds: how often, but after 5 seconds at most 3 times.
  """
  run()
  times: list[float] = []
  while len(times) < rounds and (len(times) < 3 or sum(times) < 5):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return float(np.median(times))


def peak_growth(run: Callable[[], Any]) -> tuple[Any, int]:
  """Return a call's result and what it adds to the peak memory, in bytes.

  Linux alone has the files that this reads and writes.
  """
  # Memory that is free, or that a thread is about to free, hides new memory.
  gc.collect()
  time.sleep(0.5)
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
  before = _peak()
  result = run()
  return result, _peak() - before


def _peak():
  status = pathlib.Path("/proc/self/status").read_text()
  (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
  return int(kibibytes) * 1024


def device() -> str:
  """Return the name of the accelerator, or the number of CPU cores."""
  import jax

  accelerator = jax.devices()[0]
  if accelerator.platform != "cpu":
    return accelerator.device_kind
  return f"{len(os.sched_getaffinity(0))} CPU cores"


def versions() -> str:
  """Return the versions of Python, jax, jaxlib and torch."""
  names = ["jax", "jaxlib", "torch"]
  found = [name for name in names if importlib.util.find_spec(name)]
  listed = [f"{name} {importlib.metadata.version(name)}" for name in found]
  return ", ".join((f"Python {platform.python_version()}", *listed))


def commit() -> str | None:
  """Return the commit of the working tree; None outside of a repository."""
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty"],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None
