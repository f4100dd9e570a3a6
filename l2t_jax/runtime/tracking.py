from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import hashlib
import re
import time
from typing import Protocol

from flax import traverse_util

from l2t_jax import errors, imports

SECONDS_OF_SILENCE = 30
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
    if time.monotonic() - self._flushed > SECONDS_OF_SILENCE:
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
  """Raise `errors.InputError` for an unknown or missing tracker."""
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


def import_trackers(names: Iterable[str]) -> None:
  """Import what trackers need, which may take seconds, ahead of their use."""
  for name in names:
    _tracker_module(name)


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
