from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from l2t_jax import errors, types
from l2t_jax.run import setup
from l2t_jax.runtime import compilation, sharding


class DoesNotFit(Exception):
  """Seeds that should train together need more memory than there is."""


def step_compiler(run, shapes, num_seeds):
  """Return `setup.compile_step`, for a state of these shapes."""
  batch = stack([run.blank_batch] * num_seeds)
  batch = sharding.shard(batch, run.mesh, axis=int(num_seeds > 1))
  return functools.partial(
    setup.compile_step, run, shapes, batch, num_seeds=num_seeds
  )


def compile(run, compile_step, compiling, config, num_seeds):
  """Compile training ahead, to know its time and memory.

  Takes the first of the run's modes that fits into memory; `compiling` is the
  program of the very first.

  Raises:
    DoesNotFit: seeds together need more memory than is good.
    errors.InputError: a single one needs more than there is.
  """
  eval_step = run.eval_step
  if num_seeds > 1:
    eval_step = jax.vmap(eval_step, in_axes=(0, None))
  eval_step = jax.jit(
    eval_step,
    out_shardings=sharding.replicated(run.mesh),
    compiler_options=compilation.options(),
  )
  for mode in run.modes:
    if mode != run.modes[0]:
      compiling = compile_step(mode=mode)
    program = compiling.result()
    if compilation.fits(program):
      break
  else:
    if num_seeds > 1:
      raise DoesNotFit(
        f"{num_seeds} seeds together need {program.memory_bytes} bytes"
      )
    if program.memory_bytes > compilation.memory_limit():
      mib = lambda size: f"{size / 2**20:,.0f} MiB"
      slim = "set config.bilevel.mode=mixed, or " if mode != "mixed" else ""
      raise errors.InputError(
        f"an iteration needs {mib(program.memory_bytes)}, and there are"
        f" {mib(compilation.memory_limit())}: {slim if run.learns else ''}lower"
        " config.batch_size or config.data.image_size"
      )
  sparse = run.learns and config.meta.update_every > 1
  return Programs(
    program,
    compile_step(mode=mode, update_meta=False).result() if sparse else None,
    eval_step,
    mode,
  )


class Programs(NamedTuple):
  """What was compiled for a run."""

  train_step: compilation.Program
  # None where every iteration has a meta update.
  train_step_without_meta: compilation.Program | None
  eval_step: Any  # Jitted; compiled where it is first used.
  mode: str  # How the hypergradient is computed.


def stack(
  trees: Sequence[types.PyTree], like: types.PyTree | None = None
) -> types.PyTree:
  """Give the arrays of several seeds a leading axis; one seed has none.

  Args:
    trees: of each seed.
    like: arrays or shapes, spread over the devices as the result is to be.
  """
  if len(trees) == 1:
    return trees[0]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  if like is None:
    return stacked
  return jax.device_put(stacked, jax.tree.map(lambda leaf: leaf.sharding, like))
