"""metrics.jsonl and the trackers."""

import contextlib
import importlib.util
import json
import struct
from unittest import mock

import pytest
from tensorboardX.proto import event_pb2

from l2t_jax import errors
from l2t_jax.runtime import logs, run_folder, tracking
from tests.support import small_runs

RECORD = {"loss": 0.5, "pair_weights": {"m->n": 1.5}, "name": "no number"}
SCALARS = {"train/loss": 0.5, "train/pair_weights/m->n": 1.5}


class Recorder:
  """A tracker that records its calls."""

  def __init__(self, workdir, from_step, config):
    self.opened, self.written, self.ends = (from_step, config), [], []
    Recorder.latest = self

  def write(self, scalars, step):
    self.written.append((scalars, step))

  def close(self, error):
    self.ends.append(error)


def open_log(workdir, *trackers):
  return logs.MetricsLog(
    workdir, from_step=3, trackers=trackers, config={"a": {"b": 1}}
  )


def test_tensorboard_needs_no_torch():
  """To import torch takes seconds; afterwards it can be imported."""
  pytest.importorskip("torch")
  program = "import sys; from l2t_jax.runtime import tracking; "
  program += "tracking.import_trackers(['tensorboard']); "
  program += "assert 'torch' not in sys.modules; import torch"
  result = small_runs.run_python("-c", program)
  assert result.returncode == 0, result.stderr


def test_tensorboard_can_read_what_is_written(tmp_path):
  with open_log(tmp_path, "tensorboard") as log:
    log.write("train", 7, RECORD)
  (path,) = (tmp_path / "tensorboard").iterdir()
  version, start, *scalars = read_events(path.read_bytes())
  assert version.file_version == "brain.Event:2"
  assert start.step == 4 and start.session_log.status == start.session_log.START
  found = {
    (value.tag, value.simple_value, event.step)
    for event in scalars
    for value in event.summary.value
  }
  # TensorBoard allows no ">" in a name.
  assert found == {
    (name.replace(">", "_"), value, 7) for name, value in SCALARS.items()
  }


def read_events(content):
  """Split a file of TFRecords: length, checksum, event, checksum."""
  while content:
    (length,) = struct.unpack_from("Q", content)
    yield event_pb2.Event.FromString(content[12 : 12 + length])
    content = content[16 + length :]


def test_a_line_without_its_end_is_dropped(tmp_path):
  with open_log(tmp_path) as log:
    log.write("train", 2, {"loss": 1.0})
    log.write("train", 3, {"loss": 2.0})
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(file.read_bytes()[:-1])
  with open_log(tmp_path) as log:
    log.write("train", 4, {"loss": 3.0})
  records = run_folder.read_metrics(tmp_path)
  assert [record["step"] for record in records] == [2, 4]


def test_trackers_get_scalars(tmp_path, monkeypatch):
  monkeypatch.setattr(tracking, "TRACKERS", {"recorder": Recorder})
  with open_log(tmp_path, "recorder") as log:
    log.write("train", 7, RECORD)
  tracker = Recorder.latest
  assert tracker.opened == (3, {"a": {"b": 1}})
  assert tracker.written == [(SCALARS, 7)] and tracker.ends == [None]
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[0]) == {"kind": "train", "step": 7, **RECORD}


@pytest.mark.parametrize(
  ("error", "status", "exit_code"),
  [
    (None, "FINISHED", 0),
    (errors.BadNumbersError("nan"), "FAILED", 1),
    (errors.Interrupted("asked to stop"), "KILLED", 1),
    (KeyboardInterrupt(), "KILLED", 1),
  ],
)
def test_trackers_are_told_how_a_run_ended(
  error, status, exit_code, tmp_path, monkeypatch
):
  library = mock.MagicMock()
  monkeypatch.setattr(tracking, "_tracker_module", lambda name: library)
  with (
    contextlib.suppress(type(error)),
    open_log(tmp_path, "mlflow", "wandb"),
  ):
    if error:
      raise error
  client = library.MlflowClient()
  client.update_run.assert_called_once_with(mock.ANY, "RUNNING")  # Resumed.
  client.set_terminated.assert_called_once_with(mock.ANY, status)
  run = library.init()
  run.finish.assert_called_once_with(exit_code=exit_code)


def test_lines_that_are_no_records_are_dropped(tmp_path):
  good = b'{"kind": "train", "step": 3}\n'
  later = b'{"kind": "train", "step": 4}\n'
  bad = b'3\n"x"\n\xff\n{}\n{"step": null}\n{"step": 3'
  (tmp_path / "metrics.jsonl").write_bytes(good + later + bad)
  with open_log(tmp_path):
    pass
  assert (tmp_path / "metrics.jsonl").read_bytes() == good


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_trackers_that_are_not_installed(tracker, tmp_path):
  if importlib.util.find_spec(tracker):
    pytest.skip(f"{tracker} is installed")
  refused = pytest.raises(
    errors.InputError, match=f"needs {tracker}: pip install"
  )
  with refused:
    open_log(tmp_path, tracker)
  with refused:
    tracking.check_trackers(["tensorboard", tracker])


def test_a_folder_is_no_tracker(tmp_path, monkeypatch):
  """wandb and mlflow create folders of their names in the working directory."""
  monkeypatch.setattr(tracking, "_MODULES", {"wandb": "some_folder"})
  (tmp_path / "some_folder").mkdir()
  monkeypatch.syspath_prepend(str(tmp_path))
  with pytest.raises(errors.InputError, match="needs some_folder"):
    tracking.check_trackers(["wandb"])


def test_mlflow(tmp_path):
  mlflow = pytest.importorskip("mlflow")
  mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
  for step in (1, 2):  # Opened again, it goes on with the same run.
    with open_log(tmp_path, "mlflow") as log:
      log.write("train", step, RECORD)
  (run,) = mlflow.MlflowClient().search_runs(
    [mlflow.get_experiment_by_name("l2t_jax").experiment_id]
  )
  assert run.data.params == {"a.b": "1"}
  history = mlflow.MlflowClient().get_metric_history(
    run.info.run_id, "train/pair_weights/m to n"
  )
  assert [(metric.step, metric.value) for metric in history] == [
    (1, 1.5),
    (2, 1.5),
  ]


def test_wandb(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  with open_log(tmp_path, "wandb") as log:
    log.write("train", 1, RECORD)
  (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
  assert run.stat().st_size > 0
