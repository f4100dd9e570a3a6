"""Estimate the memory and time of a run before it starts: train.py --plan."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import jax
import numpy as np
from rich import console, table

from l2t_jax.run import experiments
from l2t_jax.run import setup as setups
from l2t_jax.run import trainer as trainers
from l2t_jax.runtime import compilation, sharding

_NUM_TIMED = 3


class Plan(NamedTuple):
  """Sizes, and the cost of each mode of the hypergradient."""

  num_parameters: dict[str, int]  # Per part: target, regressors, f and g.
  programs: dict[str, compilation.Program]  # Per mode; "" without look-ahead.
  chosen: str  # The mode that training would use.
  too_large: str  # Why that mode does not fit into memory; "" if it does.
  seconds: float  # Per iteration in that mode, on average; NaN if too large.
  steps_per_epoch: int
  epochs: int


def make(experiment: experiments.Experiment) -> Plan:
  """Compile an iteration in each mode that training may use, and time one.

  Args:
    experiment: what would be trained.

  Raises:
    errors.InputError: for data or networks that cannot work together.
  """
  settings = experiment.settings
  _, precision = compilation.PRECISIONS[settings.precision]
  with jax.default_matmul_precision(precision):
    setup = setups.build(experiment)
    batch = sharding.shard(setup.blank_batch, setup.mesh)
    inputs = (setup.scalars, setup.sources, batch)

    def compile_step(mode, **options):
      return compilation.compile_ahead(
        setups.jit_step(setup, setup.state_shapes, mode=mode, **options),
        setup.state_shapes,
        *inputs,
      )

    compiling = {mode: compile_step(mode) for mode in setup.modes}
    num_without_meta = max(setup.update_every - 1, 0)
    if num_without_meta:
      without_meta = compile_step(setup.modes[0], update_meta=False)
  state = setup.create_state(settings.seed)
  programs = {mode: program.result() for mode, program in compiling.items()}
  chosen = next(
    (mode for mode in programs if compilation.fits(programs[mode])),
    list(programs)[-1],
  )
  sizes = {**state.inner.params, "f and g": state.meta_params}
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  num_parameters = {name: count(tree) for name, tree in sizes.items()}
  too_large = trainers.describe_excess(setup, programs[chosen], chosen)
  times = [math.nan]
  if not too_large:
    times = [_time(programs[chosen], state, *inputs)]
  if num_without_meta and not too_large:
    state = setup.create_state(settings.seed)  # The other one was donated.
    times += [_time(without_meta.result(), state, *inputs)] * num_without_meta
  return Plan(
    num_parameters=num_parameters,
    programs=programs if setup.looks_ahead else {"": programs[chosen]},
    chosen=chosen if setup.looks_ahead else "",
    too_large=too_large,
    seconds=float(np.mean(times)),
    steps_per_epoch=setup.dataset.steps_per_epoch,
    epochs=settings.epochs,
  )


def show(plan: Plan) -> None:
  """Print a plan."""
  for name, count in plan.num_parameters.items():
    if count:
      print(f"{name}: {count:,} parameters")
  rows = table.Table("hypergradient", "memory", "GFLOP", "compile time", "")
  for mode, program in plan.programs.items():
    memory, flops = program.memory_bytes, program.flops
    notes = ["does not fit"] if not compilation.fits(program) else []
    rows.add_row(
      mode or "none",
      f"{memory / 2**20:,.0f} MiB" if memory else "unknown",
      f"{flops / 1e9:,.2f}" if flops else "unknown",
      f"{program.seconds:.0f} s",
      ", ".join((*notes, *(["chosen"] if mode == plan.chosen else []))),
    )
  console.Console().print(rows)
  if plan.too_large:
    print(plan.too_large)
    return
  epoch = plan.seconds * plan.steps_per_epoch
  print(
    f"{plan.seconds:.3g} s per iteration on {jax.device_count()} x"
    f" {jax.devices()[0].device_kind}; {plan.steps_per_epoch} iterations per"
    f" epoch: {_duration(epoch)}; {plan.epochs} epochs:"
    f" {_duration(epoch * plan.epochs)}, evaluation not included"
  )


def _time(program, state, *others):
  times = []
  for _ in range(1 + _NUM_TIMED):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(program.call(state, *others))
    times.append(time.perf_counter() - start)
  return float(np.median(times[1:]))  # The first call warms up.


def _duration(seconds):
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02} h"
    if hours
    else (f"{minutes}:{seconds:02} min")
  )
