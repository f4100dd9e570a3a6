"""What a run says while it goes: metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
import json
import pathlib
import time
from typing import Any

from rich import console, progress
import tensorboardX

METRICS = "metrics.jsonl"
# What a progress line shows, and the metric behind it.
_SHOWN = {
  "loss": "loss",
  "target": "target_loss",
  "matching": "matching_loss",
  "accuracy": "accuracy",
}
_SECONDS_OF_SILENCE = 30


class MetricsLog:
  """Append records to metrics.jsonl and scalars to TensorBoard files.

  A context manager that closes both.

  What was written after the iteration that a run resumes from is dropped, so
  that each iteration stands in the file once.
  """

  def __init__(self, workdir: pathlib.Path, *, from_step: int):
    path = workdir / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= from_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
    self._file = path.open("a")
    self._tensorboard = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=from_step + 1
    )

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Write one record.

    Args:
      kind: "train" (one logging interval) or "epoch".
      step: iterations done.
      values: JSON-able; numbers, also inside of dicts, go to TensorBoard too.
    """
    record = {"kind": kind, "step": step, **values}
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for name, value in values.items():
      if isinstance(value, Mapping):
        for key, entry in value.items():
          self._tensorboard.add_scalar(f"{kind}/{name}/{key}", entry, step)
      elif isinstance(value, int | float):
        self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, *_) -> None:
    self._file.close()
    self._tensorboard.close()


class Progress:
  """A live bar on a terminal, as a context; elsewhere a line now and then."""

  def __init__(self, total_steps: int, done: int, batch_size: int):
    self.console = console.Console()
    self._batch_size = batch_size
    self._said_at = time.time()
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
      "", total=total_steps, completed=done, where="", values="compiling"
    )
    self._bar.start()

  def update(self, epoch: int, steps: int, values: Mapping[str, float]) -> None:
    """Show that more steps are done.

    Args:
      epoch: the running epoch, from 1.
      steps: done since the last call.
      values: to be shown, by name.
    """
    shown = "  ".join(
      f"{name} {values[key]:.3g}"
      for name, key in _SHOWN.items()
      if key in values
    )
    speed = self._bar.tasks[self._task].speed
    if speed:
      shown += f"  {speed * self._batch_size:.0f} images/s"
    self._bar.update(
      self._task, advance=steps, where=f"epoch {epoch}", values=shown
    )
    task = self._bar.tasks[self._task]
    if self._bar.disable and time.time() - self._said_at > _SECONDS_OF_SILENCE:
      self.say(f"step {task.completed:.0f}/{task.total:.0f}  {shown}")

  def say(self, line: str) -> None:
    """Print a line above the bar."""
    self._said_at = time.time()
    self.console.print(line, highlight=False, soft_wrap=True)

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *_) -> None:
    self._bar.stop()


def _step_of(line: str) -> float:
  """Step of a record; a line that a crash cut short is dropped."""
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError):
    return float("inf")
