"""Programs: compiled ahead of their first call, with what they cost.

Compiled programs are kept on disk, so that a second start does not compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
# By backend. XLA:CPU (jaxlib 0.10.1) hands convolutions to YNNPACK, which
# takes two to three times as long as its own for the gradient by the kernel;
# and it orders a program for concurrency, which keeps twice as much in memory
# and is slower on few cores. Measured in benchmarks/RESULTS.md.
_OPTIONS: Mapping[str, Mapping[str, str]] = {
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
  },
}

# XLA needs no Python while it compiles, or loads what it has compiled before.
_COMPILER = futures.ThreadPoolExecutor(1, "compiler")


class Program(NamedTuple):
  """A compiled function."""

  call: Any  # Takes arguments of the shapes that it was compiled for.
  seconds: float  # That tracing and compiling took.
  # By XLA's count, which takes a loop's body once: None where there is a loop,
  # or no count.
  flops: float | None
  memory_bytes: int | None  # Arguments, results, temporaries; None: unknown.


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
  """Let tracing be a quarter faster; as a decorator, too.

  It makes so many small objects that Python's cyclic garbage collector keeps
  coming around, and hardly any of them is garbage.
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
  function: Callable[..., Any], *args: Any, **jit_options: Any
) -> futures.Future[Program]:
  """Compile a function for arguments, or for shapes like theirs.

  It is traced here, and compiled while the caller goes on.

  Args:
    function: pure; it is jitted here.
    *args: arrays or `jax.ShapeDtypeStruct`s, in pytrees.
    **jit_options: of `jax.jit`, such as `donate_argnums`.
  """
  start = time.perf_counter()
  lowered = jax.jit(function, **jit_options).lower(*args)
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
  """Return the bytes of memory of the first local device.

  Of a CPU they are what containers and job schedulers leave of it.
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
  """Keep compiled programs in ~/.cache/l2t_jax, small ones too.

  A folder of one's own goes into JAX_COMPILATION_CACHE_DIR, and
  JAX_ENABLE_COMPILATION_CACHE=false switches it off.
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
  """Return limits of this process's control groups, in bytes (Linux)."""
  limits = []
  groups = root / "proc/self/cgroup"
  for line in groups.read_text().splitlines() if groups.exists() else ():
    _, controllers, group = line.split(":", maxsplit=2)
    place, name = root / "sys/fs/cgroup", "memory.max"
    if "memory" in controllers.split(","):  # Version 1.
      place, name = place / "memory", "memory.limit_in_bytes"
    folder = place / group.lstrip("/")
    for file in (parent / name for parent in (folder, *folder.parents)):
      with contextlib.suppress(OSError, ValueError):  # None there, or "max".
        limits.append(int(file.read_text()))
  return limits


@functools.cache
def _accepted_options(backend):
  """Leave out what this jaxlib does not know: such options come and go."""
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
