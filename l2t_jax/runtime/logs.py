"""Output during training: metrics.jsonl, trackers and a progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import json
import pathlib
import time
from typing import Any

from flax import traverse_util
from rich import console, progress

from l2t_jax import files
from l2t_jax.runtime import run_folder, tracking

# Name in the progress bar -> metric.
_SHOWN = {
  "loss": "loss",
  "target": "target_loss",
  "matching": "matching_loss",
  "accuracy": "accuracy",
}


class MetricsLog:
  """Append records to metrics.jsonl and pass scalars to trackers.

  A context manager, which closes the file and the trackers when it exits, and
  tells trackers how the run ended.

  Records of iterations after the one that a run resumes from are dropped, so
  that the file has every iteration once.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    from_step: int,
    trackers: Sequence[str],
    config: Mapping[str, Any],
  ):
    """Open the log.

    Args:
      workdir: folder of the run.
      from_step: iterations done.
      trackers: names in `tracking.TRACKERS`.
      config: fields of the run as nested dicts, for the trackers.

    Raises:
      errors.InputError: a tracker is not installed.
    """
    path = workdir / run_folder.METRICS
    # A line that a crash cut short counts as later than any iteration.
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [
      line
      for line in lines
      if line.endswith(b"\n") and _step_of(line) <= from_step
    ]
    files.write(path, b"".join(kept))
    self._trackers = [
      tracking.TRACKERS[name](workdir, from_step, config) for name in trackers
    ]
    self._file = path.open("a")

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Write one record.

    Args:
      kind: "train" (one logging interval) or "epoch".
      step: iterations done.
      values: serializable as JSON. All numbers, also nested ones, go to the
        trackers.
    """
    record = {"kind": kind, "step": step, **values}
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    flat = traverse_util.flatten_dict({kind: dict(values)}, sep="/")
    scalars = {k: v for k, v in flat.items() if isinstance(v, int | float)}
    for tracker in self._trackers:
      tracker.write(scalars, step)

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, _, error: BaseException | None, __) -> None:
    with contextlib.ExitStack() as stack:
      stack.callback(self._file.close)
      for tracker in self._trackers:
        stack.callback(tracker.close, error)


class Progress:
  """Context manager: a progress bar; without a terminal, a line every 30 s."""

  def __init__(self, total_steps: int, batch_size: int, *, quiet: bool = False):
    self.console = console.Console(quiet=quiet)
    self._batch_size = batch_size
    self._last_line_at = time.time()
    self._bar = progress.Progress(
      progress.TextColumn("{task.fields[where]}"),
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TextColumn("{task.fields[values]}"),
      progress.TimeElapsedColumn(),
      progress.TextColumn("left"),
      progress.TimeRemainingColumn(),
      console=self.console,
      disable=not self.console.is_terminal,
    )
    self._task = self._bar.add_task(
      "", total=total_steps, where="", values="compiling"
    )
    self._bar.start()

  def begin(self, done: int) -> None:
    """Show that training begins after `done` steps."""
    self._bar.reset(self._task, completed=done)

  def update(self, epoch: int, steps: int, values: Mapping[str, float]) -> None:
    """Show that more steps are done.

    Args:
      epoch: the current epoch, from 1.
      steps: steps since the last call.
      values: metrics by name.
    """
    shown = "  ".join(
      f"{name} {values[key]:.3g}"
      for name, key in _SHOWN.items()
      if key in values
    )
    task = self._bar.tasks[self._task]
    if task.speed:
      shown += f"  {task.speed * self._batch_size:.0f} images/s"
    self._bar.update(
      self._task, advance=steps, where=f"epoch {epoch}", values=shown
    )
    silence = time.time() - self._last_line_at
    if self._bar.disable and silence > tracking.FLUSH_SECONDS:
      self.say(f"step {task.completed:.0f}/{task.total:.0f}  {shown}")

  def say(self, line: str) -> None:
    """Print a line above the bar."""
    self._last_line_at = time.time()
    self.console.print(line, highlight=False, soft_wrap=True)

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *_) -> None:
    self._bar.stop()


def _step_of(line: bytes) -> float:
  """Return the step of a record; infinity for a line cut short by a crash."""
  try:
    return float(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):
    return float("inf")
