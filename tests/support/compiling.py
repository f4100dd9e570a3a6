"""Quick compilation for tests, and that of production where a test needs it."""

import contextlib
import functools
import os

import jax
from jax._src import compiler
import pytest

# From 0.11.1 on, jaxlib has the fusion emitters alone and refuses the flag.
_KNOWS_FLAG = jax.__version_info__ < (0, 11, 1)
_QUICK = "--xla_cpu_use_fusion_emitters=false"


def compile_quickly():
  """Compile without optimisations; child processes inherit the flag of XLA."""
  jax.config.update("jax_disable_most_optimizations", True)
  flags = os.environ.get("XLA_FLAGS", "")
  if _KNOWS_FLAG and _QUICK not in flags:  # pytest's workers inherit it.
    os.environ["XLA_FLAGS"] = f"{flags} {_QUICK}"


@contextlib.contextmanager
def optimized():
  """Compile as in production."""
  jax.config.update("jax_disable_most_optimizations", False)
  with pytest.MonkeyPatch.context() as patch:
    # XLA_FLAGS are read once per process.
    with_emitters = functools.partial(
      _with_fusion_emitters, compiler.get_compile_options
    )
    patch.setattr(compiler, "get_compile_options", with_emitters)
    try:
      yield
    finally:
      jax.config.update("jax_disable_most_optimizations", True)


def _with_fusion_emitters(
  get_compile_options, *args, env_options_overrides=None, **options
):
  overrides = {"xla_cpu_use_fusion_emitters": True} if _KNOWS_FLAG else {}
  return get_compile_options(
    *args,
    env_options_overrides=(env_options_overrides or {}) | overrides,
    **options,
  )
