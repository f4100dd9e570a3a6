"""Time an iteration against a plain training step, and against PyTorch.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --sweep=mode,T,precision,batch --folder=DIR

ResNet-32 -> VGG-9, 15 pairs, random images, on the first device. Ours, the
peer's and both plain steps take turns, so that their ratios do not depend on
what else the machine does. We and each variant of the peer have a process of
our own, as users do: what one leaves in the allocator makes another faster or
slower by a third. One that does not fit into memory stops no other. Prints a
table and, on its last line, a JSON object:

  ratio_peer   the peer's time for an iteration over ours, the peer being the
               fastest of its variants (see benchmarks/peer_torch.py)
  ratio_plain  our iteration over our plain training step

both at batch 128, T = 2, float32; ratio_peer is null where torch is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import console, table

from benchmarks import cases
from l2t_jax.method import bilevel
from l2t_jax.runtime import compilation

# What is varied around the paper's setting, one at a time.
SWEEPS: dict[str, tuple[str, tuple[Any, ...]]] = {
  "mode": ("mode", bilevel.MODES),
  "T": ("num_inner_steps", (1, 2, 4, 8)),
  "precision": ("precision", ("f32", "tf32", "bf16")),
  "batch": ("batch_size", (32, 64, 128, 256, 512)),
  "seeds": ("num_seeds", (1, 3)),
}
# A measurement takes as many iterations as last this long, in seconds.
_LEAST_SECONDS = 0.3
_LAYOUTS = ("contiguous", "channels-last")
_OURS = "l2t_jax"


@dataclasses.dataclass
class Case:
  """Something that was timed."""

  who: str  # _OURS, or the peer and its variant.
  what: str  # "plain" or "iteration".
  setting: cases.Setting
  compile_seconds: float | None = None
  flops: float | None = None
  memory_bytes: int | None = None
  plain_seconds: float = math.nan  # Of the plain step that it took turns with.
  times: list[float] = dataclasses.field(default_factory=list)

  @property
  def median(self) -> float:
    return statistics.median(self.times)

  @property
  def spread(self) -> float:
    """Half the distance between the quartiles, over the median."""
    low, high = np.quantile(self.times, [0.25, 0.75])
    return (high - low) / 2 / self.median


@dataclasses.dataclass
class Timer:
  """What times a case."""

  case: Case
  run: Callable[[], object]  # One step, from where the last one ended.
  wait: Callable[[], object]  # Until the device has done it.
  repeats: int = 1  # Steps in a measurement.

  def warm_up(self) -> None:
    self.measure()  # The first call may compile.
    self.repeats = max(1, round(_LEAST_SECONDS / self.measure()))

  def measure(self) -> float:
    start = time.perf_counter()
    for _ in range(self.repeats):
      self.run()
    self.wait()
    return (time.perf_counter() - start) / self.repeats


@dataclasses.dataclass(frozen=True)
class Peer:
  """A variant of the peer."""

  layout: str
  compiled: bool = False

  def __str__(self) -> str:
    return f"torch, {self.layout}" + (", compiled" if self.compiled else "")


def our_timers(setting: cases.Setting) -> list[Timer]:
  """Compile our plain step and our iteration."""
  return [_our_timer(_plain(setting)), _our_timer(setting)]


def _our_timer(setting):
  iteration = cases.create(setting)
  program = cases.compile_iteration(setting, iteration)
  latest = {"state": iteration.state}

  def run():
    latest["state"], _ = program.call(
      latest["state"], iteration.setup.sources, iteration.batch
    )

  case = Case(
    _OURS,
    "plain" if setting.method == "scratch" else "iteration",
    setting,
    program.seconds,
    program.flops,
    program.memory_bytes,
  )
  return Timer(case, run, lambda: jax.block_until_ready(latest["state"]))


def peer_timers(setting: cases.Setting, peer: Peer) -> list[Timer]:
  """Make the peer's plain step and its iteration."""
  import torch

  from benchmarks import peer_torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = setting.precision == "tf32"
  torch.backends.cudnn.allow_tf32 = setting.precision == "tf32"
  torch.backends.cudnn.benchmark = True

  def place(tensor):
    tensor = tensor.to(device)
    if peer.layout == "channels-last" and tensor.ndim == 4:
      return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()

  iteration = cases.create(setting)
  start = peer_torch.from_jax(
    iteration.state,
    iteration.setup.sources[""],
    iteration.setup.problem.pairs,
    place,
  )
  images = place(
    torch.from_numpy(np.array(iteration.batch.images).transpose(0, 3, 1, 2))
  )
  labels = torch.from_numpy(np.array(iteration.batch.labels)).long().to(device)
  settings = peer_torch.Settings(
    setting.num_inner_steps, learning_rate=cases.LEARNING_RATE
  )
  update = peer_torch.adam_l2(start.meta_params, 1e-4, 1e-4)
  target = lambda tensors: {
    name: x for name, x in tensors.items() if name.startswith("target.")
  }
  latest = {
    "iteration": start.state,
    "plain": peer_torch.State(
      target(start.state.params),
      target(start.state.momentum),
      dict(start.state.running),
    ),
  }
  wrap = torch.compile if peer.compiled else lambda function: function
  whole = wrap(peer_torch.iteration)
  plain = wrap(peer_torch.plain_step)
  autocast = functools.partial(
    torch.autocast, device, torch.bfloat16, enabled=setting.precision == "bf16"
  )

  def run_iteration():
    with autocast():
      latest["iteration"], grads, _ = whole(
        latest["iteration"],
        start.meta_params,
        start.source,
        images,
        labels,
        settings,
      )
    update(grads)

  def run_plain():
    with autocast():
      latest["plain"] = plain(latest["plain"], images, labels, settings)

  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  plain_case = Case(str(peer), "plain", setting._replace(method="scratch"))
  return [
    Timer(plain_case, run_plain, wait),
    Timer(Case(str(peer), "iteration", setting), run_iteration, wait),
  ]


def ceiling(dtype: Any, precision: str) -> float:
  """Measure FLOP/s of a square matrix product."""
  size = 4096 if jax.default_backend() == "cpu" else 16384
  with jax.default_matmul_precision(precision):
    product = jax.jit(jnp.matmul, compiler_options=compilation.options())
    x = jnp.ones((size, size), dtype or jnp.float32)
    best = float("inf")
    for _ in range(4):
      start = time.perf_counter()
      product(x, x).block_until_ready()
      best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def settings_of(sweeps: list[str]) -> list[cases.Setting]:
  """List the settings of some sweeps, each once, the paper's first."""
  base = cases.Setting()
  varied = [
    base._replace(**{field: value})
    for field, values in (SWEEPS[name] for name in sweeps)
    for value in values
  ]
  return list(dict.fromkeys((base, *varied)))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--sweep",
    default="",
    help=f"what to vary, separated by commas: {', '.join(SWEEPS)}",
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--compile_peer", action="store_true")
  parser.add_argument("--folder", type=pathlib.Path, help="for a plot")
  args = parser.parse_args()
  sweeps = [name for name in args.sweep.split(",") if name]
  for name in sweeps:
    if name not in SWEEPS:
      parser.error(f"unknown sweep {name!r}; use some of {', '.join(SWEEPS)}")
  if args.rounds < 1:
    parser.error(f"--rounds={args.rounds} must be at least 1")

  # All processes share an accelerator's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  everything: list[Case] = []
  for setting in settings_of(sweeps):
    known = [case.setting for case in everything if case.what == "plain"]
    everything += [
      case
      for case in _measure(setting, args.rounds, args.compile_peer)
      if case.what != "plain" or case.setting not in known
    ]
  ceilings = {
    name: ceiling(*compilation.PRECISIONS[name])
    for name in dict.fromkeys(case.setting.precision for case in everything)
  }
  _print_table(everything, ceilings)
  if args.folder:
    _draw(everything, sweeps, args.folder)
  print(json.dumps(_result(everything, ceilings)))


class _Worker:
  """A process that times the cases of one side when it is asked to."""

  def __init__(self, setting: cases.Setting, peer: Peer | None):
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, setting, peer))
    self._process.start()
    theirs.close()
    self.name = str(peer or _OURS)
    self.cases: list[Case] = []

  def prepare(self) -> None:
    """Wait for what is timed; raises EOFError where the process fails."""
    self.cases = self._connection.recv()

  def measure(self) -> None:
    """Time each case once more; raises EOFError where the process fails."""
    for index, case in enumerate(self.cases):
      self._connection.send(index)
      case.times.append(self._connection.recv())

  def close(self) -> None:
    self._connection.close()
    self._process.join()


def _serve(connection, setting, peer):
  timers = peer_timers(setting, peer) if peer else our_timers(setting)
  for timer in timers:
    timer.warm_up()
  connection.send([timer.case for timer in timers])
  with contextlib.suppress(EOFError, OSError):
    while True:
      connection.send(timers[connection.recv()].measure())


def _measure(setting, rounds, compile_peer):
  """Time a setting: ours, the peer's, and the plain steps of both."""
  print(setting, file=sys.stderr, flush=True)
  workers: list[_Worker] = []
  with contextlib.ExitStack() as stack:
    # One after the other: what compiles shall not be disturbed.
    for peer in (None, *_peers(setting, compile_peer)):
      worker = _Worker(setting, peer)
      stack.callback(worker.close)
      if _succeeds(worker.prepare, worker, setting):
        workers.append(worker)
    for _ in range(rounds):
      workers = [
        worker
        for worker in workers
        if _succeeds(worker.measure, worker, setting)
      ]
  for worker in workers:
    for case in worker.cases:
      case.plain_seconds = worker.cases[0].median
  return [case for worker in workers for case in worker.cases]


def _succeeds(task, worker, setting):
  try:
    task()
  except (EOFError, OSError):
    failure = f"{worker.name}: failed"
    if setting == cases.Setting() and worker.name == _OURS:
      sys.exit(failure)  # Nothing could be compared with it.
    print(failure, file=sys.stderr)
    return False
  return True


def _peers(setting, compile_peer):
  base = cases.Setting()
  has_peer = setting.mode == base.mode and setting.num_seeds == 1
  if not (has_peer and importlib.util.find_spec("torch")):
    return []
  if setting != base:
    return [Peer(_LAYOUTS[0])]
  peers = [Peer(layout) for layout in _LAYOUTS]
  return [*peers, Peer(_LAYOUTS[0], compiled=True)] if compile_peer else peers


def _plain(setting):
  base = cases.Setting()
  return setting._replace(
    method="scratch", mode=base.mode, num_inner_steps=base.num_inner_steps
  )


def _print_table(everything, ceilings):
  rows = table.Table(title=f"{_device()}, {_versions()}")
  for name in ("step", "by", "mode", "T", "batch", "precision"):
    rows.add_column(name)
  for name in (
    "ms",
    "±",
    "plain steps",
    "GFLOP",
    "GFLOP/s",
    "of ceiling",
    "MiB",
    "compile s",
  ):
    rows.add_column(name, justify="right")
  show = lambda value, form: "" if value is None else format(value, form)
  for case in everything:
    s = case.setting
    is_ours = case.who == _OURS
    speed = case.flops / case.median if case.flops else None
    share = speed / ceilings[s.precision] if speed else None
    rows.add_row(
      case.what + (f", {s.num_seeds} seeds" if s.num_seeds > 1 else ""),
      case.who,
      s.mode if is_ours and case.what == "iteration" else "",
      str(s.num_inner_steps) if case.what == "iteration" else "",
      str(s.batch_size),
      s.precision,
      f"{case.median * 1e3:,.1f}",
      f"{case.spread:.0%}",
      f"{case.median / case.plain_seconds:.1f}",
      show(case.flops and case.flops / 1e9, ".0f"),
      show(speed and speed / 1e9, ".0f"),
      show(share, ".0%"),
      show(case.memory_bytes and case.memory_bytes / 2**20, ".0f"),
      show(case.compile_seconds, ".1f"),
    )
  console.Console(width=150).print(rows)
  for name, value in ceilings.items():
    print(
      f"ceiling, a square matrix product in {name}: {value / 1e9:,.0f} GFLOP/s"
    )


def _result(everything, ceilings):
  base = cases.Setting()
  at_base = [
    case
    for case in everything
    if case.setting in (base, base._replace(method="scratch"))
  ]
  ours = {case.what: case for case in at_base if case.who == _OURS}
  peers = [case for case in at_base if case.who != _OURS]
  best = lambda what: min(
    (case.median for case in peers if case.what == what), default=None
  )
  over = lambda what: best(what) and round(best(what) / ours[what].median, 3)
  return {
    "ratio_peer": over("iteration"),
    "ratio_peer_plain": over("plain"),
    "ratio_peer_by_variant": {
      case.who: round(case.median / ours["iteration"].median, 3)
      for case in peers
      if case.what == "iteration"
    },
    "ratio_plain": round(ours["iteration"].median / ours["plain"].median, 3),
    "device": _device(),
    "versions": _versions(),
    "commit": _commit(),
    "ceiling_flops": ceilings,
    "cases": [
      {
        "by": case.who,
        "step": case.what,
        **case.setting._asdict(),
        "seconds": case.median,
        "spread": case.spread,
        "flops": case.flops,
        "memory_bytes": case.memory_bytes,
        "compile_seconds": case.compile_seconds,
      }
      for case in everything
    ],
  }


def _draw(everything, sweeps, folder):
  """The paper's setting, then a panel for each sweep."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  base = cases.Setting()
  figure, axes = pyplot.subplots(
    1, 1 + len(sweeps), figsize=(4.5 * (1 + len(sweeps)), 3.4), squeeze=False
  )
  bars, *panels = axes[0]
  at_base = [
    case
    for case in everything
    if case.setting in (base, base._replace(method="scratch"))
  ]
  bars.barh(
    [f"{case.what}: {case.who}" for case in at_base],
    [case.median * 1e3 for case in at_base],
    color=["C0" if case.who == _OURS else "0.7" for case in at_base],
  )
  bars.invert_yaxis()
  bars.set_xlabel("ms")
  for axis, name in zip(panels, sweeps, strict=True):
    field, values = SWEEPS[name]
    for who in dict.fromkeys(case.who for case in everything):
      medians = {
        getattr(case.setting, field): case.median * 1e3
        for case in everything
        if case.who == who
        and case.what == "iteration"
        and case.setting
        == base._replace(**{field: getattr(case.setting, field)})
      }
      found = [value for value in values if value in medians]
      axis.plot(
        [str(value) for value in found],
        [medians[value] for value in found],
        "o-",
        label=who,
      )
    axis.set_xlabel(field.replace("_", " "))
    axis.set_ylabel("ms an iteration")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
  for axis in axes[0]:
    axis.spines[["top", "right"]].set_visible(False)
  figure.suptitle(
    f"{_device()}: ResNet-32 → VGG-9, batch 128, T = 2, float32", fontsize=10
  )
  figure.tight_layout()
  folder.mkdir(parents=True, exist_ok=True)
  figure.savefig(folder / "step_time.png", dpi=150)
  print(f"plot: {folder / 'step_time.png'}")


def _device():
  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  return f"{len(os.sched_getaffinity(0))} CPU cores"


def _versions():
  names = ["jax", "jaxlib", "torch"]
  found = [name for name in names if importlib.util.find_spec(name)]
  versions = [f"{name} {importlib.metadata.version(name)}" for name in found]
  return ", ".join((f"Python {platform.python_version()}", *versions))


def _commit():
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty"],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


if __name__ == "__main__":
  main()
