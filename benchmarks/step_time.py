"""Time an iteration against a plain training step, and against PyTorch.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --sweep mode T precision batch --folder=DIR
    python -m benchmarks.step_time --sweep precision=tf32,bf16 seeds=3

ResNet-32 -> VGG-9, 15 pairs, random images, on the first device. Ours, the
peer's and both plain steps take turns, so that their ratios do not depend on
what else the machine does. We and each variant of the peer have a process of
our own, as users do: what one leaves in the allocator makes another faster or
slower by a third. One that does not fit into memory stops no other. SIGTERM or
Ctrl-C ends the measurements; what was measured is reported. Prints a table and,
on its last line, a JSON object, which --folder also keeps up to date in a file:

  ratio_peer     the peer's time for an iteration over ours, the peer being the
                 fastest of its variants (see benchmarks/peer_torch.py)
  ratio_authors  the same for the scheme of the authors' code
  ratio_plain    our iteration over our plain training step

all at the base setting, batch 128, T = 2, float32; null where one of the two is
missing. `failures` names what was not measured, and why.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import console, table

from benchmarks import cases, measuring
from l2t_jax import files
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
_OURS = "l2t_jax"
_KERNELS = 10  # So many are listed of a profile.
_STOPS = (signal.SIGINT, signal.SIGTERM)


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
  # Where the device's time went, from a profile: see `profile`.
  kernels: dict[str, Any] | None = None
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
  authors: bool = False  # By the scheme of the authors' code.
  # By `torch.compile`, which has no double backward: the plain step alone.
  compiled: bool = False

  def __str__(self) -> str:
    scheme = ", authors' scheme" if self.authors else ""
    return f"torch, {self.layout}{scheme}{', compiled' * self.compiled}"


PEERS = {
  "contiguous": Peer("contiguous"),
  "channels-last": Peer("channels-last"),
  "authors": Peer("contiguous", authors=True),
  "compiled": Peer("channels-last", compiled=True),
}


def our_timers(setting: cases.Setting) -> list[Timer]:
  """Compile our plain step and our iteration."""
  return [_our_timer(_plain(setting)), _our_timer(setting)]


def _our_timer(setting):
  iteration = cases.create(setting)
  program = cases.compile_iteration(setting, iteration)
  latest = {"state": iteration.state}

  def run():
    latest["state"], _ = program.call(
      latest["state"],
      iteration.setup.scalars,
      iteration.setup.sources,
      iteration.batch,
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
  settings = peer_torch.Settings(setting.num_inner_steps)
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
  whole = peer_torch.authors_iteration if peer.authors else peer_torch.iteration
  plain = peer_torch.plain_step
  if peer.compiled:
    plain = torch.compile(plain)
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
  timers = [Timer(plain_case, run_plain, wait)]
  if not peer.compiled:
    timers.append(
      Timer(Case(str(peer), "iteration", setting), run_iteration, wait)
    )
  return timers


def profile(timer: Timer, num_steps: int = 3) -> dict[str, Any] | None:
  """Profile some steps on a GPU; None on other devices.

  Returns:
    Per step: "busy_seconds" of the device, "kernels", how many run, and
    "largest", a list of [name, seconds, how many] of those that take longest.
  """
  if jax.default_backend() != "gpu":
    return None
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(num_steps):
        timer.run()
      timer.wait()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [
      (event.name, event.duration_ns * 1e-9)
      for plane in planes
      if plane.name.startswith("/device:GPU")
      for line in plane.lines
      if line.name.startswith("Stream")
      for event in line.events
    ]
  seconds: collections.Counter[str] = collections.Counter()
  counts: collections.Counter[str] = collections.Counter()
  for name, duration in events:
    seconds[name] += duration / num_steps
    counts[name] += 1
  return {
    "busy_seconds": sum(seconds.values()),
    "kernels": len(events) / num_steps,
    "largest": [
      [name, value, counts[name] / num_steps]
      for name, value in seconds.most_common(_KERNELS)
    ],
  }


def ceiling(dtype: Any, precision: str) -> float:
  """Measure FLOP/s of a square matrix product."""
  size = 4096 if jax.default_backend() == "cpu" else 16384
  with jax.default_matmul_precision(precision):
    product = jax.jit(jnp.matmul, compiler_options=compilation.options())
    # Products of random numbers are slower than those of equal ones.
    x = jax.random.normal(jax.random.key(0), (size, size), dtype or jnp.float32)
    best = float("inf")
    for _ in range(4):
      start = time.perf_counter()
      product(x, x).block_until_ready()
      best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def parse_sweep(text: str) -> tuple[str, tuple[Any, ...]]:
  """Turn "NAME" or "NAME=VALUE,VALUE" into a field and values to try."""
  name, _, chosen = text.partition("=")
  if name not in SWEEPS:
    raise argparse.ArgumentTypeError(
      f"unknown sweep {name!r}; use some of {', '.join(SWEEPS)}"
    )
  field, values = SWEEPS[name]
  if not chosen:
    return field, values
  by_text = {str(value): value for value in values}
  for one in chosen.split(","):
    if one not in by_text:
      raise argparse.ArgumentTypeError(
        f"{name} is not {one!r}, but one of {', '.join(by_text)}"
      )
  return field, tuple(by_text[one] for one in chosen.split(","))


def settings_of(
  base: cases.Setting, sweeps: Iterable[tuple[str, tuple[Any, ...]]]
) -> list[cases.Setting]:
  """List the settings of some sweeps around a base, each once, it first."""
  varied = [
    base._replace(**{field: value})
    for field, values in sweeps
    for value in values
  ]
  return list(dict.fromkeys((base, *varied)))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--sweep",
    type=parse_sweep,
    nargs="*",
    default=[],
    metavar="NAME[=VALUE,VALUE]",
    help=f"what to vary, in this order: {', '.join(SWEEPS)}",
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--batch_size", type=int, default=128, help="where it is not varied (128)"
  )
  parser.add_argument(
    "--precision",
    choices=SWEEPS["precision"][1],
    default="f32",
    help="where it is not varied (f32)",
  )
  parser.add_argument(
    "--peers",
    default="contiguous,channels-last,authors",
    help=f"variants of the peer, some of {', '.join(PEERS)}",
  )
  parser.add_argument(
    "--profile", action="store_true", help="the largest kernels; on a GPU"
  )
  parser.add_argument(
    "--folder", type=pathlib.Path, help="for a plot and the JSON object"
  )
  args = parser.parse_args()
  if args.rounds < 1:
    parser.error(f"--rounds={args.rounds} must be at least 1")
  peers = args.peers.split(",") if args.peers else []
  if unknown := [name for name in peers if name not in PEERS]:
    parser.error(f"unknown peer {unknown[0]!r}; use {', '.join(PEERS)}")
  # Also where Ctrl-C is ignored, as in the background of a script.
  for number in _STOPS:
    signal.signal(number, _stop)

  # All processes share an accelerator's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if peers and not importlib.util.find_spec("torch"):
    print("torch is not installed: no peer", file=sys.stderr)
    peers = []
  measured = _Measured(
    cases.Setting(batch_size=args.batch_size, precision=args.precision)
  )
  left = settings_of(measured.base, args.sweep)
  try:
    for setting in left[:]:
      _measure(measured, setting, peers, args)
      left.remove(setting)
      _save(measured, args.folder)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    for setting in left:
      measured.failures[str(setting)] = "interrupted"
    _save(measured, args.folder)
  _print_table(measured)
  if args.folder and measured.cases:
    _draw(measured, args.sweep, args.folder)
  print(json.dumps(_result(measured)))
  if not any(case.who == _OURS for case in measured.at_base()):
    sys.exit(f"{_OURS}: failed")  # Nothing could be compared with it.


def _save(measured, folder):
  measured.measure_ceilings()
  if folder:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_result(measured), indent=1)
    files.write(folder / "step_time.json", text)


def _stop(number, frame):
  """Interrupt the measurements, but not their report: timeout sends two."""
  for one in _STOPS:
    signal.signal(one, signal.SIG_IGN)
  raise KeyboardInterrupt


class _Measured:
  """What was measured so far."""

  def __init__(self, base: cases.Setting):
    self.base = base
    self.cases: list[Case] = []
    self.ceilings: dict[str, float] = {}
    self.failures: dict[str, str] = {}

  def at_base(self) -> list[Case]:
    """Return the cases of the base setting, the plain steps among them."""
    wanted = (self.base, _plain(self.base))
    return [case for case in self.cases if case.setting in wanted]

  def add(self, workers: list[_Worker]) -> None:
    """Take over what workers have timed, but no plain step twice."""
    known = [(c.who, c.setting) for c in self.cases if c.what == "plain"]
    for worker in workers:
      timed = [case for case in worker.cases if case.times]
      for case in timed:
        case.plain_seconds = timed[0].median
      self.cases += [
        case
        for case in timed
        if case.what != "plain" or (case.who, case.setting) not in known
      ]

  def measure_ceilings(self) -> None:
    """Measure what the device can do in the precisions of the cases."""
    for case in self.cases:
      name = case.setting.precision
      if name not in self.ceilings:
        self.ceilings[name] = ceiling(*compilation.PRECISIONS[name])


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

  def warm_up(self) -> None:
    """Wait for what is timed; raises EOFError where the process fails."""
    self._connection.send("warm up")
    self.cases = self._connection.recv()

  def measure(self) -> None:
    """Time each case once more; raises EOFError where the process fails."""
    for index, case in enumerate(self.cases):
      self._connection.send(index)
      case.times.append(self._connection.recv())

  def profile(self) -> None:
    """Profile each case; raises EOFError where the process fails."""
    for index, case in enumerate(self.cases):
      self._connection.send(("profile", index))
      case.kernels = self._connection.recv()

  def close(self) -> None:
    self._connection.close()
    self._process.join(timeout=5)
    self._process.kill()


def _serve(connection, setting, peer):
  for number in _STOPS:  # The main process ends this one.
    signal.signal(number, signal.SIG_IGN)
  timers = peer_timers(setting, peer) if peer else our_timers(setting)
  with contextlib.suppress(EOFError, OSError):
    while True:
      match connection.recv():
        case "warm up":
          for timer in timers:
            timer.warm_up()
          connection.send([timer.case for timer in timers])
        case ("profile", index):
          connection.send(profile(timers[index]))
        case index:
          connection.send(timers[index].measure())


def _measure(measured, setting, peers, args):
  """Time a setting: ours, the peer's, and the plain steps of both."""
  print(setting, file=sys.stderr, flush=True)
  workers: list[_Worker] = []

  def succeeds(task, worker):
    try:
      task()
    except (EOFError, OSError):
      print(f"{worker.name}: failed", file=sys.stderr, flush=True)
      measured.failures[f"{worker.name}, {setting}"] = "its process failed"
      return False
    return True

  with contextlib.ExitStack() as stack:
    stack.callback(lambda: measured.add(workers))

    def start(peer):
      worker = _Worker(setting, peer)
      stack.callback(worker.close)
      return worker

    def warm_up(worker):
      if succeeds(worker.warm_up, worker):
        workers.append(worker)
        if not succeeds(worker.measure, worker):
          workers.remove(worker)

    # What compiles or chooses algorithms shall not be disturbed: ours is ready
    # before the peers start, and they warm up one after the other.
    ours = start(None)
    warm_up(ours)
    for worker in [
      start(PEERS[name]) for name in _peers_of(setting, measured.base, peers)
    ]:
      warm_up(worker)
    for _ in range(args.rounds - 1):
      for worker in workers[:]:
        if not succeeds(worker.measure, worker):
          workers.remove(worker)
    if args.profile and ours in workers:
      succeeds(ours.profile, ours)


def _peers_of(setting, base, peers):
  """Return the names of the peers that a setting is compared with."""
  if setting == base:
    return peers
  if setting == base._replace(precision=setting.precision):
    return [name for name in peers if name in ("channels-last", "authors")]
  if setting.mode == base.mode and setting.num_seeds == 1:
    return [name for name in peers if name == "channels-last"]
  return []


def _plain(setting):
  base = cases.Setting()
  return setting._replace(
    method="scratch", mode=base.mode, num_inner_steps=base.num_inner_steps
  )


def _print_table(measured):
  # On a GPU XLA does not count FLOPs: those columns are empty.
  rows = table.Table(title=f"{measuring.device()}, {measuring.versions()}")
  for name in ("step", "by", "mode", "T", "batch", "precision"):
    rows.add_column(name, no_wrap=True)
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
  for case in measured.cases:
    s = case.setting
    is_ours = case.who == _OURS
    speed = case.flops / case.median if case.flops else None
    share = speed / measured.ceilings[s.precision] if speed else None
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
  console.Console(width=170).print(rows)
  for name, value in measured.ceilings.items():
    print(
      f"ceiling, a square matrix product in {name}: {value / 1e9:,.0f} GFLOP/s"
    )
  for case in measured.cases:
    if case.kernels and case.what == "iteration":
      _print_kernels(case)
  for what, reason in measured.failures.items():
    print(f"not measured: {what}: {reason}")


def _print_kernels(case):
  print(
    f"{case.setting}: the device is busy for"
    f" {case.kernels['busy_seconds'] * 1e3:.2f} ms of"
    f" {case.median * 1e3:.2f} ms with {case.kernels['kernels']:.0f} kernels"
  )
  for name, seconds, count in case.kernels["largest"]:
    print(f"  {seconds * 1e3:8.3f} ms {count:6.0f} x {name[:110]}")


def _result(measured):
  at_base = measured.at_base()
  ours = {case.what: case for case in at_base if case.who == _OURS}
  peers = [case for case in at_base if case.who != _OURS]

  def ratio(what, among):
    best = min((case.median for case in among if case.what == what), default=0)
    return round(best / ours[what].median, 3) if best and what in ours else None

  authors = str(PEERS["authors"])
  by_authors = [case for case in peers if case.who == authors]
  in_plain_steps = None
  if len(ours) == 2:
    quotient = ours["iteration"].median / ours["plain"].median
    in_plain_steps = round(quotient, 3)
  return {
    "ratio_peer": ratio("iteration", peers),
    "ratio_authors": ratio("iteration", by_authors),
    "ratio_peer_plain": ratio("plain", peers),
    "ratio_peer_by_variant": {
      case.who: ratio("iteration", [case])
      for case in peers
      if case.what == "iteration"
    },
    "ratio_plain": in_plain_steps,
    "device": measuring.device(),
    "versions": measuring.versions(),
    "commit": measuring.commit(),
    "ceiling_flops": measured.ceilings,
    "failures": measured.failures,
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
        "profile": case.kernels,
      }
      for case in measured.cases
    ],
  }


def _draw(measured, sweeps, folder):
  """The base setting, then a panel for each sweep."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  base = measured.base
  figure, axes = pyplot.subplots(
    1, 1 + len(sweeps), figsize=(4.5 * (1 + len(sweeps)), 3.4), squeeze=False
  )
  bars, *panels = axes[0]
  at_base = measured.at_base()
  bars.barh(
    [f"{case.what}: {case.who}" for case in at_base],
    [case.median * 1e3 for case in at_base],
    color=["C0" if case.who == _OURS else "0.7" for case in at_base],
  )
  bars.invert_yaxis()
  bars.set_xlabel("ms")
  for axis, (field, values) in zip(panels, sweeps, strict=True):
    for who in dict.fromkeys(case.who for case in measured.cases):
      medians = {
        getattr(case.setting, field): case.median * 1e3
        for case in measured.cases
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
    axis.set_ylabel("ms per iteration")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
  for axis in axes[0]:
    axis.spines[["top", "right"]].set_visible(False)
  figure.suptitle(
    f"{measuring.device()}: ResNet-32 → VGG-9, batch {base.batch_size}, T = 2,"
    f" {base.precision}",
    fontsize=10,
  )
  figure.tight_layout()
  folder.mkdir(parents=True, exist_ok=True)
  figure.savefig(folder / "step_time.png", dpi=150)
  print(f"plot: {folder / 'step_time.png'}")


if __name__ == "__main__":
  main()
