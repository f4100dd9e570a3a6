"""What a run says while it goes: metrics.jsonl, trackers, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import hashlib
import json
import pathlib
import re
import time
from typing import Any, Protocol

from flax import traverse_util
from rich import console, progress

from l2t_jax import files, imports, types

METRICS = "metrics.jsonl"
# What a progress line shows, and the metric behind it.
_SHOWN = {
  "loss": "loss",
  "target": "target_loss",
  "matching": "matching_loss",
  "accuracy": "accuracy",
}
_SECONDS_OF_SILENCE = 30
_PROJECT = "l2t_jax"  # What runs belong to, in trackers.


class Tracker(Protocol):
  """Where scalars go, beside metrics.jsonl."""

  def write(self, scalars: Mapping[str, float], step: int) -> None:
    """Record scalars by name."""

  def close(self, error: BaseException | None) -> None:
    """Write what is still held back; say what ended the run, if anything."""


class _TensorBoard:
  """Event files, written where a full disk can be seen.

  tensorboardX's SummaryWriter writes them in a thread. It dies of a full disk,
  and then the run waits for it forever.
  """

  def __init__(self, workdir, from_step, config):
    del config
    self._library = _tracker_module("tensorboard")
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    self._events = self._library.event_file_writer.EventsWriter(
      str(folder / "events")
    )
    # Hides what an earlier process has written of the steps from here on.
    start = self._library.proto.event_pb2.SessionLog(status="START")
    self._add(from_step + 1, session_log=start)
    self._flushed = time.monotonic()

  def write(self, scalars, step):
    for name, value in scalars.items():
      self._add(step, summary=self._library.summary.scalar(name, value))
    if time.monotonic() - self._flushed > _SECONDS_OF_SILENCE:
      self._events.flush()
      self._flushed = time.monotonic()

  def close(self, error):
    del error
    self._events.close()

  def _add(self, step, **content):
    event = self._library.proto.event_pb2.Event(
      wall_time=time.time(), step=step, **content
    )
    self._events.write_event(event)


class _Wandb:
  """A run of Weights & Biases, resumed with that of the folder."""

  def __init__(self, workdir, from_step, config):
    del from_step
    self._run = _tracker_module("wandb").init(
      project=_PROJECT,
      name="/".join(workdir.absolute().parts[-3:]),
      id=_id_of(workdir),
      dir=str(workdir),
      config=config,
      resume="allow",
      reinit="create_new",
    )

  def write(self, scalars, step):
    self._run.log(dict(scalars), step=step)

  def close(self, error):
    self._run.finish(exit_code=int(error is not None))


class _MLflow:
  """A run of MLflow, wherever MLFLOW_TRACKING_URI says; resumed likewise."""

  def __init__(self, workdir, from_step, config):
    del from_step
    mlflow = _tracker_module("mlflow")
    self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
    experiment = self._client.get_experiment_by_name(_PROJECT)
    experiment_id = (
      experiment.experiment_id
      if experiment
      else self._client.create_experiment(_PROJECT)
    )
    tag = {"l2t_jax.id": _id_of(workdir)}
    found = self._client.search_runs(
      [experiment_id], f"tags.`l2t_jax.id` = '{tag['l2t_jax.id']}'"
    )
    if found:
      self._run_id = found[0].info.run_id
      self._client.update_run(self._run_id, "RUNNING")
      return
    run = self._client.create_run(experiment_id, tags=tag)
    self._run_id = run.info.run_id
    for name, value in traverse_util.flatten_dict(config, sep=".").items():
      self._client.log_param(self._run_id, name, value)

  def write(self, scalars, step):
    now = int(time.time() * 1000)
    self._client.log_batch(
      self._run_id,
      metrics=[
        self._entities.Metric(_mlflow_name(name), value, now, step)
        for name, value in scalars.items()
      ],
    )

  def close(self, error):
    status = "FINISHED" if error is None else "FAILED"
    if isinstance(error, types.Interrupted | KeyboardInterrupt):
      status = "KILLED"
    self._client.set_terminated(self._run_id, status)


_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
TRACKERS: Mapping[str, Callable[..., Tracker]] = {
  "tensorboard": _TensorBoard,
  "wandb": _Wandb,
  "mlflow": _MLflow,
}


def check_trackers(names: Iterable[str]) -> None:
  """Raise `types.InputError` for a tracker that is unknown or not installed."""
  for name in names:
    if name not in TRACKERS:
      raise types.InputError(
        f"config.trackers has {name!r}; there are {', '.join(TRACKERS)}"
      )
    if not imports.is_installed(_MODULES[name]):
      raise types.InputError(
        f"tracker {name!r} needs {_MODULES[name]}: pip install"
        f" {_MODULES[name]}, or leave it out of config.trackers"
      )


def import_trackers(names: Iterable[str]) -> None:
  """Import what trackers need, which may take seconds, ahead of their use."""
  for name in names:
    _tracker_module(name)


class MetricsLog:
  """Append records to metrics.jsonl and hand scalars to trackers.

  A context manager that closes both, and tells trackers how the run ended.

  What was written after the iteration that a run resumes from is dropped, so
  that each iteration stands in the file once.
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
      trackers: names in `TRACKERS`.
      config: of the run, for the trackers.

    Raises:
      types.InputError: a tracker is not installed.
    """
    path = workdir / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= from_step]
    files.write(path, b"".join(kept))
    self._trackers = [
      TRACKERS[name](workdir, from_step, config) for name in trackers
    ]
    self._file = path.open("a")

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Write one record.

    Args:
      kind: "train" (one logging interval) or "epoch".
      step: iterations done.
      values: JSON-able; numbers, also inside of dicts, go to trackers too.
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


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
  """Read the records of a run's `metrics.jsonl`.

  A last line without its newline is one that the run was stopped in the middle
  of; it is left out unless it is complete.

  Args:
    workdir: the folder of the run.

  Returns:
    One dict per line, in the file's order.

  Raises:
    InputError: the file is missing, or a line is not a JSON object.
  """
  path = pathlib.Path(workdir) / METRICS
  if not path.is_file():
    raise types.InputError(
      f"{path} does not exist; name the folder of a run that was started."
    )
  lines = path.read_bytes().split(b"\n")
  records = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      if not isinstance(record, dict):
        raise ValueError("it is not an object")
    except ValueError as error:
      if number == len(lines):
        break
      raise types.InputError(
        f"{path}, line {number}: not a JSON object ({error}); "
        "mend or delete that line."
      ) from error
    records.append(record)
  return records


class Progress:
  """A live bar on a terminal, as a context; elsewhere a line now and then."""

  def __init__(self, total_steps: int, batch_size: int, *, quiet: bool = False):
    self.console = console.Console(quiet=quiet)
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
      "", total=total_steps, where="", values="compiling"
    )
    self._bar.start()

  def begin(self, done: int) -> None:
    """Show that training begins after some steps that were done before."""
    self._bar.reset(self._task, completed=done)

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


def _mlflow_name(name):
  """Leave out what MLflow's names may not have."""
  return re.sub(r"[^/\w.\- ]", "_", name.replace("->", " to "))


def _tracker_module(name):
  return imports.require(
    _MODULES[name],
    needed_for=f"tracker {name!r}",
    otherwise="leave it out of config.trackers",
  )


def _id_of(workdir):
  """16 hex digits that tell folders apart."""
  return hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]


def _step_of(line: bytes) -> float:
  """Step of a record; a line that a crash cut short is dropped."""
  try:
    return float(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):
    return float("inf")
