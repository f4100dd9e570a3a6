"""Compile programs ahead of their first call and report their cost.

What each trick buys:

  * `compile_ahead` compiles in a thread while the caller reads images and draws
    initial values. It also reports the memory that a program needs, before
    training starts.
  * `garbage_collection_paused` makes tracing faster by a quarter.
  * `_OPTIONS` make the convolution gradients of XLA:CPU two to three times
    faster and halve the memory of a training step. They are tried on a small
    program first, because a jaxlib that lacks an option refuses to compile.
  * `jit_random` compiles programs that draw random numbers four times faster.
  * `use_cache` stores programs on disk, so that the second start of the same
    experiment does not compile, nor does one with another learning rate or
    weight of a loss (`experiments.Scalars`).
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

from l2t_jax.runtime import phases

# config.precision -> (dtype of the activations, precision of products).
PRECISIONS = {
  "f32": (None, "float32"),
  "tf32": (None, "tensorfloat32"),
  "bf16": (jnp.bfloat16, "default"),
}
# XLA's options for each backend. XLA:CPU (jaxlib 0.10.1) passes convolutions to
# YNNPACK, which takes two to three times as long as XLA's own code for the
# gradient with respect to the kernel (66 against 29 ms for 64 to 128 channels
# on 16x16 maps, batch 128, two cores of an AMD EPYC). It also schedules for
# concurrency, which needs twice the memory and is slower on few cores.
_OPTIONS: Mapping[str, Mapping[str, str]] = {
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
  },
}

# XLA releases the GIL while it compiles or reads its cache, so that threads
# suffice: one for a training step, one for the evaluation.
_COMPILER = futures.ThreadPoolExecutor(2, "compiler")


class Program(NamedTuple):
  """A compiled function and its cost."""

  call: Any  # Takes arguments of the shapes that it was compiled for.
  seconds: float  # Time of tracing and compiling.
  loaded: bool  # True if it came from the cache on disk.
  # FLOPs per call; None if unknown. They are unknown for a program with a loop,
  # whose body XLA counts only once, and on GPUs, where XLA does not count the
  # convolutions of cuDNN.
  flops: float | None
  # Arguments, results and temporaries; None if unknown.
  memory_bytes: int | None


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
  """Context manager and decorator: trace without Python's garbage collector.

  Tracing allocates so many small objects that the collector runs very often,
  but hardly any of them is garbage.
  """
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()


@phases.phase("tracing")
@garbage_collection_paused()
def compile_ahead(
  function: jax.stages.Wrapped, *args: Any
) -> futures.Future[Program]:
  """Trace a function now and compile it in the background.

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
      phases.loaded_last(),
      _flops(compiled),
      _memory(compiled),
    )

  return _COMPILER.submit(compile_lowered)


@functools.cache
def options() -> dict[str, str | bool]:
  """Return the compiler options for `jax.jit` on the default backend.

  They are empty if this jaxlib does not accept all of them.
  """
  wanted: dict[str, str | bool] = {**_OPTIONS.get(jax.default_backend(), {})}
  try:
    jax.jit(lambda x: x).lower(jnp.zeros(())).compile(wanted)
  except (jax.errors.JaxRuntimeError, ValueError):
    return {}
  return wanted


def jit_random(function: Callable[..., Any]) -> Callable[..., Any]:
  """Jit a function that draws many random numbers and is called rarely.

  On CPU, LLVM takes four times as long to compile JAX's generator at level 3,
  XLA's default, as at level 2, which gives the same bits (VGG-9: 10.9 and 3.0 s
  of processor time).

  Args:
    function: takes and returns pytrees of arrays.
  """
  is_slow = jax.default_backend() == "cpu" and not jax.config.read(
    "jax_disable_most_optimizations"
  )
  quick = {"xla_backend_optimization_level": "2"} if is_slow else None
  outermost = jax.jit(function, compiler_options=quick)
  # JAX accepts compiler options for the outermost jit only.
  nested = jax.jit(function)

  def call(*args):
    is_traced = any(
      isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)
    )
    return (nested if is_traced else outermost)(*args)

  return call


def wait(compiling: futures.Future[Program]) -> Program:
  """Wait for a program of `compile_ahead`; counts as compiling or loading."""
  start = time.perf_counter()
  program = compiling.result()
  waited = time.perf_counter() - start
  phases.move("loading programs" if program.loaded else "compiling", waited)
  return program


def memory_limit() -> int:
  """Return the memory of the first local device in bytes.

  On CPU this respects the limits of containers and job schedulers.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return min([physical, *control_group_limits()])


def fits(program: Program) -> bool:
  """Return whether a program leaves a tenth of the device's memory free."""
  if program.memory_bytes is None:
    return True
  return program.memory_bytes <= 0.9 * memory_limit()


def use_cache() -> None:
  """Store compiled programs, including small ones, in ~/.cache/l2t_jax.

  JAX_COMPILATION_CACHE_DIR, or jax.config, chooses another folder;
  JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.
  """
  wanted: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  if not getattr(jax.config, "jax_compilation_cache_dir", None):
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with contextlib.suppress(RuntimeError):  # The user has no home folder.
      wanted["jax_compilation_cache_dir"] = str(home.expanduser() / "l2t_jax")
  for name, value in wanted.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def control_group_limits(root: pathlib.Path = pathlib.Path("/")) -> list[int]:
  """Return the memory limits of this process's control groups in bytes.

  Args:
    root: the root of the file system; tests use another one.
  """
  limits = []
  groups = root / "proc/self/cgroup"
  for line in groups.read_text().splitlines() if groups.exists() else ():
    _, controllers, group = line.split(":", maxsplit=2)
    place, name = root / "sys/fs/cgroup", "memory.max"
    if "memory" in controllers.split(","):  # Version 1.
      place, name = place / "memory", "memory.limit_in_bytes"
    # The limits of all parent groups apply, too.
    folder = place / group.lstrip("/")
    for file in (parent / name for parent in (folder, *folder.parents)):
      with contextlib.suppress(OSError, ValueError):  # No file, or "max".
        limits.append(int(file.read_text()))
  return limits


def _flops(compiled):
  if jax.default_backend() == "gpu" or " while(" in compiled.as_text():
    return None
  return (compiled.cost_analysis() or {}).get("flops")


def _memory(compiled):
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  # Donated arguments share their memory with outputs (aliases): count it once.
  return (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )
