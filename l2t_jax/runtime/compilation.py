"""Compile programs ahead of their first call, and report what they cost.

What each trick buys:

  * `compile_ahead` compiles in a thread, while the caller reads images and
    draws initial values; and time and memory are known before training starts.
  * `garbage_collection_paused` makes tracing a quarter faster.
  * `_OPTIONS` make XLA:CPU's convolution gradients two to three times faster
    and halve the memory of a step. They are probed, because a jaxlib that does
    not know an option refuses to compile.
  * `use_cache` keeps programs on disk, so that a second start does not compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent import futures
import contextlib
import functools
import gc
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# config.precision -> (dtype of the activations, precision of products).
PRECISIONS = {
  "f32": (None, "float32"),
  "tf32": (None, "tensorfloat32"),
  "bf16": (jnp.bfloat16, "default"),
}
# Per backend. XLA:CPU (jaxlib 0.10.1) hands convolutions to YNNPACK, which
# takes two to three times as long as XLA's own code for the gradient with
# respect to the kernel; and it schedules for concurrency, which needs twice the
# memory and is slower on few cores. Measured in benchmarks/RESULTS.md.
_OPTIONS: Mapping[str, Mapping[str, str]] = {
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
  },
}

# A thread is enough: XLA releases the GIL while it compiles or reads its cache.
_COMPILER = futures.ThreadPoolExecutor(1, "compiler")


class Program(NamedTuple):
  """A compiled function."""

  call: Any  # Takes arguments of the shapes that it was compiled for.
  seconds: float  # Time of tracing and compiling.
  # XLA's count; None if unknown or if there is a loop, whose body XLA counts
  # once.
  flops: float | None
  # Arguments, results and temporaries; None if unknown.
  memory_bytes: int | None


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
  """Context manager and decorator: trace without Python's garbage collector.

  Tracing allocates so many small objects that the cyclic collector runs again
  and again, and hardly any of them is garbage.
  """
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()


@garbage_collection_paused()
def compile_ahead(
  function: jax.stages.Wrapped, *args: Any
) -> futures.Future[Program]:
  """Trace a function now, and compile it in the background.

  Args:
    function: made by `jax.jit`.
    *args: pytrees of arrays or of `jax.ShapeDtypeStruct`s.
  """
  start = time.perf_counter()
  lowered = function.lower(*args)
  seconds = time.perf_counter() - start
  compiler_options = options()

  def compile_lowered():
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=compiler_options)
    return Program(
      compiled,
      seconds + time.perf_counter() - start,
      _flops(compiled),
      _memory(compiled),
    )

  return _COMPILER.submit(compile_lowered)


def options() -> dict[str, str | bool]:
  """Return XLA's options for this backend, for `jax.jit` and `compile`."""
  return dict(_accepted_options(jax.default_backend()))


def memory_limit() -> int:
  """Return the memory of the first local device, in bytes.

  On CPU, limits of containers and job schedulers count.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return min([physical, *control_group_limits()])


def fits(program: Program) -> bool:
  """Return whether a program leaves a tenth of the memory free."""
  if program.memory_bytes is None:
    return True
  return program.memory_bytes <= 0.9 * memory_limit()


def use_cache() -> None:
  """Keep compiled programs, including small ones, in ~/.cache/l2t_jax.

  JAX_COMPILATION_CACHE_DIR chooses another folder, and
  JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.
  """
  wanted: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    wanted["jax_compilation_cache_dir"] = str(home.expanduser() / "l2t_jax")
  for name, value in wanted.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def control_group_limits(root: pathlib.Path = pathlib.Path("/")) -> list[int]:
  """Return the memory limits of this process's control groups, in bytes."""
  limits = []
  groups = root / "proc/self/cgroup"
  for line in groups.read_text().splitlines() if groups.exists() else ():
    _, controllers, group = line.split(":", maxsplit=2)
    place, name = root / "sys/fs/cgroup", "memory.max"
    if "memory" in controllers.split(","):  # Version 1.
      place, name = place / "memory", "memory.limit_in_bytes"
    folder = place / group.lstrip("/")
    for file in (parent / name for parent in (folder, *folder.parents)):
      with contextlib.suppress(OSError, ValueError):  # No file, or "max".
        limits.append(int(file.read_text()))
  return limits


@functools.cache
def _accepted_options(backend):
  """Return the backend's options, or none if this jaxlib refuses them."""
  wanted = _OPTIONS.get(backend, {})
  try:
    jax.jit(lambda x: x).lower(jnp.zeros(())).compile(dict(wanted))
  except (jax.errors.JaxRuntimeError, ValueError):
    return {}
  return wanted


def _flops(compiled):
  if " while(" in compiled.as_text():
    return None
  return (compiled.cost_analysis() or {}).get("flops")


def _memory(compiled):
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  return (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )
