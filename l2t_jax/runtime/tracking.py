"""Trackers: TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import contextlib
import hashlib
import re
import time
from typing import Protocol

from flax import traverse_util

from l2t_jax import errors, imports
from l2t_jax.runtime import phases

FLUSH_SECONDS = 30  # Output is flushed at least this often.
_PROJECT = "l2t_jax"  # Name of the project or experiment in trackers.


class Tracker(Protocol):
  """A destination of scalars in addition to metrics.jsonl."""

  def write(self, scalars: Mapping[str, float], step: int) -> None:
    """Record scalars by name."""

  def close(self, error: BaseException | None) -> None:
    """Flush buffers and close; `error` is the exception that ended the run."""


class _TensorBoard:
  """TensorBoard event files, written in the calling thread.

  tensorboardX's SummaryWriter writes in a thread of its own. A full disk ends
  that thread, and then the run waits for it forever.
  """

  def __init__(self, workdir, from_step, config):
    del config
    self._library = _tracker_module("tensorboard")
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    self._events = self._library.event_file_writer.EventsWriter(
      str(folder / "events")
    )
    # START makes TensorBoard hide earlier records of the steps from here on.
    start = self._library.proto.event_pb2.SessionLog(status="START")
    self._add(from_step + 1, session_log=start)
    self._flushed = time.monotonic()

  def write(self, scalars, step):
    for name, value in scalars.items():
      self._add(step, summary=self._library.summary.scalar(name, value))
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
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
  """A run of Weights & Biases, resumed if there is one."""

  def __init__(self, workdir, from_step, config):
    del from_step
    self._run = _tracker_module("wandb").init(
      project=_PROJECT,
      name="/".join(workdir.absolute().parts[-3:]),
      id=_id_of(workdir),
      dir=str(workdir),
      config=config,
      resume="allow",
      # Seeds that train together have one run each in the same process.
      reinit="create_new",
    )

  def write(self, scalars, step):
    self._run.log(dict(scalars), step=step)

  def close(self, error):
    self._run.finish(exit_code=int(error is not None))


class _MLflow:
  """A run of MLflow at MLFLOW_TRACKING_URI, resumed if there is one."""

  def __init__(self, workdir, from_step, config):
    del from_step
    self._mlflow = mlflow = _tracker_module("mlflow")
    # The client API, because the fluent API allows only one active run, and
    # seeds that train together have one each.
    self._client = client = mlflow.MlflowClient()
    known = client.get_experiment_by_name(_PROJECT)
    group = known.experiment_id if known else client.create_experiment(_PROJECT)
    id_ = _id_of(workdir)
    found = client.search_runs([group], f"tags.`l2t_jax.id` = '{id_}'")
    if found:
      self._run_id = found[0].info.run_id
      client.update_run(self._run_id, "RUNNING")
    else:
      run = client.create_run(group, tags={"l2t_jax.id": id_})
      self._run_id = run.info.run_id
      fields = traverse_util.flatten_dict(config, sep=".")
      mlflow.log_params(fields, run_id=self._run_id)

  def write(self, scalars, step):
    named = {_mlflow_name(name): value for name, value in scalars.items()}
    self._mlflow.log_metrics(named, step, run_id=self._run_id)

  def close(self, error):
    status = "FINISHED" if error is None else "FAILED"
    if isinstance(error, errors.Interrupted | KeyboardInterrupt):
      status = "KILLED"
    self._client.set_terminated(self._run_id, status)


_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
TRACKERS: Mapping[str, Callable[..., Tracker]] = {
  "tensorboard": _TensorBoard,
  "wandb": _Wandb,
  "mlflow": _MLflow,
}


def check_trackers(names: Iterable[str]) -> None:
  """Raise `errors.InputError` if a tracker is unknown or not installed."""
  for name in names:
    if name not in TRACKERS:
      raise errors.InputError(
        f"config.trackers has {name!r}; there are {', '.join(TRACKERS)}"
      )
    if not imports.is_installed(_MODULES[name]):
      raise errors.InputError(
        f"tracker {name!r} needs {_MODULES[name]}: pip install"
        f" {_MODULES[name]}, or leave it out of config.trackers"
      )


@phases.phase("imports")
def import_trackers(names: Iterable[str]) -> None:
  """Import the libraries of trackers early, because it can take seconds."""
  for name in names:
    _tracker_module(name)


def _mlflow_name(name):
  """Replace the characters that MLflow does not allow in names."""
  return re.sub(r"[^/\w.\- ]", "_", name.replace("->", " to "))


def _tracker_module(name):
  # tensorboardX imports torch, if it is installed, only for a type check. Hide
  # torch, because importing it is slow.
  hides = name == "tensorboard"
  with imports.hidden("torch") if hides else contextlib.nullcontext():
    return imports.require(
      _MODULES[name],
      needed_for=f"tracker {name!r}",
      otherwise="leave it out of config.trackers",
    )


def _id_of(workdir):
  """Return 16 hex digits that identify a folder."""
  return hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
