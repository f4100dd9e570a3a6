"""Time and memory of a hypergradient through T inner steps, beside peers.

    python -m benchmarks.inner_loops --folder=runs/inner_loops
    python -m benchmarks.inner_loops --folder=DIR --ways=linearized,torch

Weights of 128 (MLP) or 64 (ConvNet) training images are learned: the inner loss
is their weighted cross entropy, which SGD with momentum descends from fixed
parameters; the outer loss is the cross entropy of as many held-out images. All
in float32, on the first --threads cores of this machine. The ways:

  linearized .. remat  our modes, without segments
  segments, nested     linearized, in segments of √T steps, and of T/4 and T/32
  by_hand              optax in a `lax.scan`, as one would write it without us
  by_hand_lowered      the same with our lowering rules for CPUs, as ours has
  torch .. betty       see benchmarks/inner_loops_torch.py

Each cell (network, T, way) has a process of its own, one after the other, and
each peer a virtual environment below the folder, made where it is missing. A
peer that fails stops no other. The time is the median of what a call takes
after the first; memory is what the first call adds to the peak resident memory
after a plain gradient; the error is relative to float64. Then the biases of
truncated and implicit derivatives are computed in float64. Prints tables, draws
inner_loops.png and prints a JSON object on the last line; each cell is already
printed on stderr when it is measured.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import console, table

from benchmarks import inner_loop_biases, measuring
from benchmarks import inner_loop_problem as problems
from l2t_jax.runtime import cpu_lowering

# What the virtual environments of the peers get beside torch.
_TORCH = "torch==2.13.0"
_PEERS = {
  "torch": _TORCH,
  "torchopt": "torchopt==0.7.3",
  "higher": "higher==0.2.1",
  "betty": "betty-ml==0.1.1",
}
# Way -> color, line style and marker: ours is blue, what anybody would write in
# JAX is black, and torch is orange.
_STYLES = {
  "linearized": ("tab:blue", "-", "o"),
  "mixed": ("tab:blue", "--", "s"),
  "reverse": ("lightskyblue", "-", "o"),
  "remat": ("lightskyblue", "--", "s"),
  "segments": ("tab:blue", ":", "^"),
  "nested": ("tab:blue", "-.", "v"),
  "by_hand": ("black", "-", "o"),
  "by_hand_lowered": ("black", ":", "^"),
  "torch": ("tab:orange", "-", "o"),
  "torchopt": ("tab:orange", "--", "s"),
  "higher": ("tab:orange", ":", "^"),
  "betty": ("tab:orange", "-.", "v"),
}


class Cell(NamedTuple):
  """What one process measures."""

  network: str
  num_steps: int  # T
  way: str
  rounds: int  # See `measuring.median_seconds`.
  problem: str  # File with the arrays of `Problem`.
  gradient: str  # File that the hypergradient goes into.
  rate: float = problems.RATE
  momentum: float = problems.MOMENTUM


def measure(cell: Cell) -> dict[str, float | None]:
  """Measure a cell in JAX and save its hypergradient."""
  if cell.way != "by_hand":
    cpu_lowering.install()
  problem = problems.read_problem(cell.problem)
  loss = problems.loss_after(cell.way, cell.num_steps)
  compile_ahead = lambda function: jax.jit(function).lower(*problem).compile()
  call = lambda compiled: lambda: jax.block_until_ready(compiled(*problem))
  seconds = lambda compiled: measuring.median_seconds(
    call(compiled), cell.rounds
  )
  plain_seconds = seconds(compile_ahead(problems.gradient))
  forward_seconds = seconds(compile_ahead(loss))
  start = time.perf_counter()
  compiled = compile_ahead(jax.value_and_grad(loss))
  compile_seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  (_, gradient), memory_bytes = measuring.peak_growth(call(compiled))
  np.save(cell.gradient, gradient)
  return {
    "seconds": seconds(compiled),
    "memory_bytes": memory_bytes,
    "plain_seconds": plain_seconds,
    "forward_seconds": forward_seconds,
    "compile_seconds": compile_seconds,
    # Planned by XLA: what a call takes beside its arguments and results.
    "temp_bytes": memory.temp_size_in_bytes if memory else None,
  }


def measure_apart(cell: Cell, folder: pathlib.Path) -> dict[str, Any]:
  """Measure a cell in a process of its own; "failure" says why it failed."""
  try:
    if cell.way in _PEERS:
      python = _environment(cell.way, folder / "venvs")
      command = [python, "-m", "benchmarks.inner_loops_torch"]
    else:
      command = [sys.executable, "-m", "benchmarks.inner_loops", "--cell"]
    output = _run(*command, json.dumps(cell._asdict()))
  except subprocess.CalledProcessError as error:
    lines = error.stderr.strip().splitlines() or [str(error)]
    return {"failure": lines[-1]}
  return json.loads(output.splitlines()[-1])


def _environment(way, folder):
  """Return the Python of a peer's environment; make it where it is missing."""
  python = str(folder / way / "bin" / "python")
  if not pathlib.Path(python).exists():
    print(f"installing {_PEERS[way]} below {folder}", file=sys.stderr)
    try:
      _run(sys.executable, "-m", "venv", str(folder / way))
      _run(python, "-m", "pip", "install", "-q", _TORCH, "numpy", _PEERS[way])
    except subprocess.CalledProcessError:
      shutil.rmtree(folder / way)
      raise
  return python


def _run(*command):
  # JAX's note on filtered tracebacks would follow the error's own line.
  env = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}
  return subprocess.run(
    command, check=True, capture_output=True, text=True, env=env
  ).stdout


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  numbers = lambda text: [int(number) for number in text.split(",")]
  flag("--folder", type=pathlib.Path, default=pathlib.Path("runs/inner_loops"))
  flag("--steps", type=numbers, default=[1, 4, 16, 64, 256])
  flag(
    "--networks",
    type=_some_of(problems.KERNELS),
    default=list(problems.KERNELS),
  )
  flag("--ways", type=_some_of(_STYLES), default=list(_STYLES))
  flag("--rounds", type=int, default=20)
  flag("--threads", type=int, default=2)
  flag("--bias_steps", type=int, default=64, help="0: leave the biases out")
  flag("--cell", type=json.loads, help=argparse.SUPPRESS)
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  if args.cell:
    print(json.dumps(measure(Cell(**args.cell))))
    return
  # Threads of JAX and torch are as many as cores; children inherit these.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
  jax.config.update("jax_enable_x64", True)
  args.folder.mkdir(parents=True, exist_ok=True)
  cells = [
    cell for network in args.networks for cell in _measure_all(network, args)
  ]
  results = {
    "device": measuring.device(),
    "versions": measuring.versions(),
    "peers": _PEERS,
    "commit": measuring.commit(),
    "cells": cells,
    "ratios": {name: ratios(name, cells) for name in args.networks},
  }
  for network in args.networks:
    _print(network, results)
  if args.bias_steps:
    problems.write_problem("mlp", args.folder / "bias.npz")
    problem = problems.read_problem(args.folder / "bias.npz")
    results |= inner_loop_biases.measure(problem, args.bias_steps)
  _draw(results, args)
  print(json.dumps(results))


def _some_of(known):
  """Return a parser of names with commas between them."""

  def parse(text):
    names = text.split(",")
    if unknown := set(names).difference(known):
      raise argparse.ArgumentTypeError(
        f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}"
      )
    return names

  return parse


def _measure_all(network, args):
  """Measure all cells of a network: their fields with what was measured."""
  problem = args.folder / f"{network}.npz"
  gradient = args.folder / f"{network}.npy"
  problems.write_problem(network, problem)
  for num_steps in args.steps:
    exact = problems.gradient_in_double(
      problems.read_problem(problem), num_steps
    )
    for way in args.ways:
      cell = Cell(
        network, num_steps, way, args.rounds, str(problem), str(gradient)
      )
      measured = measure_apart(cell, args.folder)
      if "failure" not in measured:
        measured["error"] = problems.relative_error(np.load(gradient), exact)
      result = cell._asdict() | measured
      print(json.dumps(result), file=sys.stderr, flush=True)
      yield result


def ratios(
  network: str, cells: list[dict[str, Any]]
) -> dict[str, dict[int, float]]:
  """Return what is compared -> T -> ratio, where both sides were measured."""
  found = {
    (cell["way"], cell["num_steps"]): cell
    for cell in cells
    if cell["network"] == network and "failure" not in cell
  }
  fastest = "time of the fastest library / linearized"
  backward = "backward pass of a step / plain gradient"
  compared: dict[str, dict[int, float]] = collections.defaultdict(dict)
  for (way, T), cell in found.items():
    ours = found.get(("linearized", T))
    if ours is cell:
      seconds = cell["seconds"] - cell["forward_seconds"]
      compared[backward][T] = seconds / T / cell["plain_seconds"]
    elif ours:
      ratio = cell["seconds"] / ours["seconds"]
      compared[f"time of {way} / linearized"][T] = ratio
      if way in _PEERS and way != "torch":
        compared[fastest][T] = min(ratio, compared[fastest].get(T, math.inf))
    short = found.get(("segments", math.isqrt(T)))
    if way == "nested" and short:
      ratio = cell["memory_bytes"] / short["memory_bytes"]
      compared["memory of nested / segments at √T"][T] = ratio
  return dict(compared)


def _print(network, results):
  """Print times with memory, errors, and ratios; T grows to the right."""
  cells = [cell for cell in results["cells"] if cell["network"] == network]
  steps = list(dict.fromkeys(cell["num_steps"] for cell in cells))

  def show(title, rows):
    title = f"{network}: {title}"
    printed = table.Table("", *(f"T = {T}" for T in steps), title=title)
    for name, values in rows.items():
      printed.add_row(name, *(values.get(T, "") for T in steps))
    console.Console(width=140).print(printed)

  def by_way(form):
    rows: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for cell in cells:
      shown = cell.get("failure") or form(cell)
      rows[_label(cell["way"])][cell["num_steps"]] = shown
    return rows

  cost = lambda cell: (
    f"{cell['seconds'] * 1e3:,.1f} ms, {cell['memory_bytes'] / 2**20:,.0f} MiB"
  )
  show("time and memory of a hypergradient", by_way(cost))
  show("error relative to float64", by_way(lambda c: f"{c['error']:.1e}"))
  compared = {
    name: {T: f"{ratio:.2f}" for T, ratio in values.items()}
    for name, values in results["ratios"][network].items()
  }
  show("ratios", compared)


def _label(way):
  by_hand = {
    "torch": "torch by hand",
    "by_hand": "JAX by hand",
    "by_hand_lowered": "JAX by hand, lowered",
  }
  return by_hand.get(way) or _PEERS.get(way, way).replace("==", " ")


def _draw(results, args):
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  width = len(args.networks) + ("implicit" in results)
  figure, axes = pyplot.subplots(
    2, width, figsize=(4 * width, 7), squeeze=False
  )
  for network, (time_axis, memory_axis) in zip(
    args.networks, axes.T, strict=False
  ):
    cells = [cell for cell in results["cells"] if cell["network"] == network]
    _draw_cells(cells, "seconds", 1e3, time_axis)
    _draw_cells(cells, "memory_bytes", 2**-20, memory_axis)
    time_axis.set(title=network, ylabel="ms per hypergradient")
    memory_axis.set(xlabel="inner steps T", ylabel="added peak memory, MiB")
  if "implicit" in results:
    inner_loop_biases.draw(results, axes[:, -1])
  for axis in axes.flat:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.92")
  figure.tight_layout(rect=(0, 0.08, 1, 1))
  figure.legend(
    *axes[0, 0].get_legend_handles_labels(),
    loc="lower center",
    ncols=2 * width,
    frameon=False,
  )
  figure.savefig(args.folder / "inner_loops.png", dpi=150)
  print(f"plot: {args.folder / 'inner_loops.png'}")


def _draw_cells(cells, field, scale, axis):
  for way in dict.fromkeys(cell["way"] for cell in cells):
    found = [cell for cell in cells if cell["way"] == way and field in cell]
    color, line, marker = _STYLES[way]
    axis.loglog(
      [cell["num_steps"] for cell in found],
      [cell[field] * scale for cell in found],
      color=color,
      linestyle=line,
      marker=marker,
      markersize=4,
      label=_label(way),
    )
  inner_loop_biases.set_ticks(
    axis, sorted({cell["num_steps"] for cell in cells})
  )


if __name__ == "__main__":
  main()
