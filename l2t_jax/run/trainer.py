"""The trainer: state, compiled programs, and seeds that train side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import errors, types
from l2t_jax.method import training
from l2t_jax.run import setup as setups
from l2t_jax.runtime import (
  compilation,
  distributed,
  metrics,
  phases,
  sharding,
)


class DoesNotFit(Exception):
  """The seeds of a group need more memory together than the device has."""


def describe_excess(
  setup: setups.Setup, program: compilation.Program, mode: str
) -> str:
  """Say that an iteration needs too much memory, and what helps.

  Args:
    setup: what is trained.
    program: the iteration of one seed.
    mode: of its hypergradient.

  Returns:
    "" if it fits. Unlike `compilation.fits`, this keeps no reserve.
  """
  limit = compilation.memory_limit()
  if program.memory_bytes is None or program.memory_bytes <= limit:
    return ""
  mib = lambda size: f"{size / 2**20:,.0f} MiB"
  slimmer = ""
  if setup.looks_ahead and mode != "mixed":
    slimmer = "set config.bilevel.mode=mixed, or "
  return (
    f"an iteration needs {mib(program.memory_bytes)}, and there are"
    f" {mib(limit)}: {slimmer}lower config.batch_size or"
    " config.data.image_size"
  )


class Trainer:
  """Owns the state of a training and the programs that change it.

  Several seeds may train together, vectorised by `jax.vmap`. Their arrays then
  have a leading axis of seeds, which is private to this class: its methods take
  and return one value per seed, in the order of the seeds.
  """

  def __init__(self, setup: setups.Setup, num_seeds: int = 1):
    """Start compiling in the background; see `compile`.

    Args:
      setup: what is trained.
      num_seeds: number of seeds that train together.
    """
    self._setup, self.num_seeds = setup, num_seeds
    self._shapes = setup.state_shapes
    if self.num_seeds > 1:
      self._shapes = sharding.stacked(self._shapes, self.num_seeds)
    blank_batch = self._shard([setup.blank_batch] * self.num_seeds)
    blank_eval_batch = sharding.shard(setup.blank_eval_batch, setup.mesh)
    self._step_inputs = (
      self._shapes,
      setup.scalars,
      setup.sources,
      sharding.shapes_of(blank_batch),
    )
    self._compiling = self._compile_steps(setup.modes[0])
    self._programs: list[compilation.Program] = []
    # The mode of the hypergradient; None if there is none.
    self.mode: str | None = None
    self._compiling_eval = compilation.compile_ahead(
      self._jit_eval_step(),
      training.evaluated(self._shapes),
      sharding.shapes_of(blank_eval_batch),
    )
    self._state: types.TrainState | None = None
    self._sources: Mapping[str, training.Variables] = setup.sources

  def compile(self) -> None:
    """Wait for the training step, in the first mode that fits into memory.

    Later calls do nothing.

    Raises:
      DoesNotFit: several seeds together do not fit.
      errors.InputError: a single seed does not fit.
    """
    if self._programs:
      return
    for mode in self._setup.modes:
      if mode != self._setup.modes[0]:
        self._compiling = self._compile_steps(mode)
      programs = [compilation.wait(program) for program in self._compiling]
      # All processes have to run the same program.
      if distributed.is_true_for_all(compilation.fits(programs[0])):
        break
    else:
      self._check_memory(programs[0], mode)
    self._programs = programs
    if self._setup.looks_ahead:
      self.mode = mode

  @property
  def program(self) -> compilation.Program:
    """The iteration with a meta update, if there is one."""
    return self._programs[0]

  def start(
    self,
    states: Sequence[types.TrainState],
    sources: Mapping[str, training.Variables],
  ) -> None:
    """Set the states to train from, and the sources.

    Args:
      states: one per seed; they are donated.
      sources: those of the setup, with the scales of their features.
    """
    self._sources = sources
    self._state = states[0]
    if self.num_seeds > 1:
      self._state = jax.device_put(
        self._stack(states),
        jax.tree.map(lambda leaf: leaf.sharding, self._shapes),
      )

  def drop_state(self) -> None:
    """Free the memory of the state, until `start` sets the next one."""
    self._state = None

  def step(self, number: int, batches: Sequence[types.Batch]) -> metrics.Packed:
    """Train one iteration.

    Args:
      number: iterations done before it.
      batches: one per seed, with the rows of this process.

    Returns:
      Metrics, for `fetch`.
    """
    every = self._setup.update_every or 1
    program = self._programs[0 if number % every == 0 else -1]
    self._state, values = program.call(
      self._state, self._setup.scalars, self._sources, self._shard(batches)
    )
    return metrics.pack(values)

  def fetch(
    self, iterations: Sequence[metrics.Packed]
  ) -> list[list[dict[str, Any]]]:
    """Wait for metrics; return those of each seed, iteration by iteration."""
    fetched = metrics.fetch(iterations)
    return [
      [self._take(values, index) for values in fetched]
      for index in range(self.num_seeds)
    ]

  @phases.phase("evaluations")
  def evaluate(self, split: str) -> list[dict[str, float]]:
    """Return {"loss", "accuracy"} of each seed, means over a split's images.

    Args:
      split: "val" or "test".
    """
    assert self._state is not None
    eval_step = compilation.wait(self._compiling_eval).call
    variables = training.evaluated(self._state)
    # All batches are dispatched before the host waits for the first result.
    totals = jax.device_get(
      [
        eval_step(variables, sharding.shard(batch, self._setup.mesh))
        for batch in self._setup.dataset.eval_batches(split)
      ]
    )
    results = []
    for index in range(self.num_seeds):
      mine = [self._take(sums, index) for sums in totals]
      sums = jax.tree.map(lambda *parts: float(np.sum(parts)), *mine)
      results.append(
        {name: sums[name] / sums["count"] for name in ("loss", "accuracy")}
      )
    return results

  def state_of(self, index: int) -> types.TrainState:
    """Return the state of one seed."""
    return self._take(self._state, index)

  def _check_memory(self, program, mode):
    if self.num_seeds > 1:
      raise DoesNotFit(
        f"{self.num_seeds} seeds together need {program.memory_bytes} bytes"
      )
    if too_large := describe_excess(self._setup, program, mode):
      raise errors.InputError(too_large)

  def _compile_steps(self, mode):
    """Compile the iteration and, if it occurs, that without a meta update."""
    return [
      compilation.compile_ahead(
        setups.jit_step(
          self._setup,
          self._shapes,
          mode=mode,
          num_seeds=self.num_seeds,
          update_meta=update_meta,
        ),
        *self._step_inputs,
      )
      for update_meta in (True, False)[: 1 + (self._setup.update_every > 1)]
    ]

  def _jit_eval_step(self):
    eval_step = self._setup.eval_step
    if self.num_seeds > 1:
      # All seeds are evaluated on the same images.
      eval_step = jax.vmap(eval_step, in_axes=(0, None))
    return jax.jit(
      eval_step, out_shardings=sharding.replicated(self._setup.mesh)
    )

  def _shard(self, batches):
    """Stack the batches of all seeds and split their rows over the devices."""
    # With several seeds, axis 0 is that of the seeds.
    return sharding.shard(
      self._stack(batches), self._setup.mesh, axis=int(self.num_seeds > 1)
    )

  def _stack(self, trees):
    if self.num_seeds == 1:
      return trees[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

  def _take(self, tree, index):
    """Undo `_stack` for one of the seeds."""
    if self.num_seeds == 1:
      return tree
    return jax.tree.map(lambda leaf: leaf[index], tree)
