"""Where the time of a run goes, phase by phase.

Phases are stretches of the main thread's wall time. They nest: while one runs,
the one around it stands still, so that all of them add up to the time that
passed within the outermost ones. What JAX compiles, or loads from its cache, in
the middle of a phase is taken out of it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import contextlib
import functools
import os
import pathlib
import threading
import time

import jax

OTHER = "other"  # What no phase of its own is given to.
_ORDER = (
  "imports",
  "data",
  "tracing",
  "compiling",
  "loading programs",
  "first state",
  "iterations",
  "evaluations",
  "saving",
  "records",
  "pictures",
  OTHER,
)
# Events of JAX. It reports the first within the second, whose time includes it.
_RETRIEVED = "/jax/compilation_cache/cache_retrieval_time_sec"
_COMPILED = "/jax/core/compile/backend_compile_duration"

_seconds: dict[str, float] = collections.defaultdict(float)
_running: list[str] = []
_since = 0.0
_last = threading.local()  # What this thread's last compilation was.


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
  """Context manager and decorator: count time as that of a phase.

  Other threads than the main one are not counted.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  _listen()
  _tick()
  _running.append(name)
  try:
    yield
  finally:
    _tick()
    _running.pop()


def move(name: str, seconds: float) -> None:
  """Count time of the phase that runs now as that of another one."""
  if _running and threading.current_thread() is threading.main_thread():
    _seconds[_running[-1]] -= seconds
    _seconds[name] += seconds


def begin() -> None:
  """Count the time since this process started as that of its imports."""
  take()
  _seconds["imports"] = _process_seconds()


def take() -> dict[str, float]:
  """Return phase -> seconds since the last call, and begin anew."""
  _tick()
  taken = {name: _seconds[name] for name in _ORDER if _seconds[name] > 0}
  _seconds.clear()
  return taken


def line(seconds: dict[str, float]) -> str:
  """Return the phases of `take` as one line, without those under 0.05 s."""
  named = [f"{name} {s:.1f}" for name, s in seconds.items() if s >= 0.05]
  return f"{sum(seconds.values()):.1f} s: {', '.join(named)}"


def loaded_last() -> bool:
  """Return whether this thread's last program came from JAX's cache on disk."""
  return getattr(_last, "loaded", False)


def _process_seconds():
  """Return the wall time of this process; where unknown, its CPU time."""
  try:
    text = pathlib.Path("/proc/self/stat").read_text()
    # The fields after the command's name, from the third on; the 22nd.
    started = int(text.rpartition(")")[2].split()[19])
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return now - started / os.sysconf("SC_CLK_TCK")
  except (OSError, AttributeError, ValueError):
    return time.process_time()


def _tick():
  global _since
  now = time.perf_counter()
  if _running:
    _seconds[_running[-1]] += now - _since
  _since = now


@functools.cache
def _listen():
  """Have JAX report compilations, once in a process."""
  jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
  if event == _RETRIEVED:
    _last.retrieving = True
  elif event == _COMPILED:
    _last.loaded = getattr(_last, "retrieving", False)
    _last.retrieving = False
    move("loading programs" if _last.loaded else "compiling", duration_secs)
