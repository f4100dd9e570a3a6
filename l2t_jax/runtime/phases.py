"""Where the time of a run goes, phase by phase.

A phase is a span of the main thread's wall time. Phases nest: while an inner
phase runs, the clock of the outer one stops, so that all phases add up to the
time spent in the outermost ones. The time in which JAX compiles programs, or
loads them from its cache, is subtracted from the phase in which this happens.
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

OTHER = "other"  # Time that belongs to no other phase.
_ORDER = (
  "imports",
  "data",
  "tracing",
  "compiling",
  "loading programs",
  "initialisation",
  "feature scales",
  "iterations",
  "evaluations",
  "saving",
  "records",
  "pictures",
  OTHER,
)
# Events that JAX reports. On a cache hit, the first is reported during the
# second, whose duration includes it.
_RETRIEVED = "/jax/compilation_cache/cache_retrieval_time_sec"
_COMPILED = "/jax/core/compile/backend_compile_duration"

_seconds: dict[str, float] = collections.defaultdict(float)
_running: list[str] = []
_since = 0.0
_last = threading.local()  # Whether this thread's last program was loaded.


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
  """Context manager and decorator: attribute time to a phase.

  It has no effect in threads other than the main one.
  """
  assert name in _ORDER, name  # `take` would drop its time.
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
  """Move time from the current phase to another one."""
  if _running and threading.current_thread() is threading.main_thread():
    _seconds[_running[-1]] -= seconds
    _seconds[name] += seconds


def begin() -> None:
  """Start counting; the time since the process started counts as imports."""
  take()
  _seconds["imports"] = _process_seconds()


def take() -> dict[str, float]:
  """Return phase -> seconds since the last call, and reset the counts."""
  _tick()
  taken = {name: _seconds[name] for name in _ORDER if _seconds[name] > 0}
  _seconds.clear()
  return taken


def line(seconds: dict[str, float]) -> str:
  """Format the result of `take` as one line, without phases under 0.05 s."""
  named = [f"{name} {s:.1f}" for name, s in seconds.items() if s >= 0.05]
  return f"{sum(seconds.values()):.1f} s: {', '.join(named)}"


def loaded_last() -> bool:
  """Return whether this thread's last program came from JAX's cache on disk."""
  return getattr(_last, "loaded", False)


def _process_seconds():
  """Return the wall time of this process; where unknown, its CPU time."""
  try:
    text = pathlib.Path("/proc/self/stat").read_text()
    # Field 22 of the line. The split begins with field 3: the name in field 2
    # can contain spaces and parentheses.
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
  """Subscribe to JAX's compilation events, once per process."""
  jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
  if event == _RETRIEVED:
    _last.retrieving = True
  elif event == _COMPILED:
    _last.loaded = getattr(_last, "retrieving", False)
    _last.retrieving = False
    move("loading programs" if _last.loaded else "compiling", duration_secs)
