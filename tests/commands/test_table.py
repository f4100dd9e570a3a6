"""The table command: which runs it does, repeats, skips and shares."""

import argparse
import csv
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from rich import console

from l2t_jax import errors, table
from l2t_jax.run import cells as table_cells
from l2t_jax.run import from_config, train, trainer
from l2t_jax.runtime import run_folder
from tests.support import small_runs

pytestmark = pytest.mark.xdist_group("methods")


def arguments(workdir, source, *more):
  """The command line of a small table."""
  fields = {
    "source.weights": source,
    "epochs": 2,
    "batch_size": 16,
    "data.image_size": 8,
    "data.val_fraction": 0.02,
    "data.test_fraction": 0.02,
    "checkpoint_every": 1,
  }
  return [
    "-m",
    "l2t_jax.table",
    "--config=configs/digits.py",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
    *more,
  ]


def rows(workdir):
  with (workdir / "table.csv").open() as file:
    return list(csv.DictReader(file))


def summaries(workdir):
  return {
    str(path.parent.relative_to(workdir)): path.read_bytes()
    for path in workdir.glob("*/*/*/summary.json")
  }


def test_it_trains_what_is_missing_and_nothing_twice(source, tmp_path):
  command = arguments(tmp_path, source, "--methods=scratch,finetune,lwf")
  result = small_runs.run_python(*command, "--seeds=1")
  # Fine-tuning is not possible here: it fails alone, and is told of.
  assert result.returncode == 1, result.stderr
  assert "finetune, seed 0: fine-tuning needs a source" in result.stdout
  first = rows(tmp_path)
  assert [row["method"] for row in first] == ["scratch", "finetune", "lwf"]
  assert [row["seeds"] for row in first] == ["1", "0", "1"]
  assert next(iter(first[0])) == "method"
  summary = json.loads(
    (tmp_path / "digits" / "lwf" / "seed0" / "summary.json").read_text()
  )
  assert float(first[2]["test_mean"]) == pytest.approx(
    100 * summary["test_accuracy"], abs=1e-3
  )
  assert summary["memory_bytes"] > 0
  before = summaries(tmp_path)
  assert set(before) == {"digits/scratch/seed0", "digits/lwf/seed0"}
  # One more seed: what is there stays.
  command = arguments(tmp_path, source, "--methods=scratch,lwf")
  result = small_runs.run_python(*command, "--seeds=2", "--together=2")
  assert result.returncode == 0, result.stderr
  after = summaries(tmp_path)
  assert len(after) == 4
  assert all(after[name] == content for name, content in before.items())
  assert [row["seeds"] for row in rows(tmp_path)] == ["2", "2"]
  for name in ("table.md", "table.png"):
    assert (tmp_path / name).stat().st_size > 100
  # What failed is repeated, and its error forgotten once it works.
  failed = tmp_path / "digits" / "finetune" / "seed0"
  assert "Traceback" in (failed / "error.txt").read_text()
  command = arguments(tmp_path, source, "--methods=finetune", "--seeds=1")
  result = small_runs.run_python(*command, "--config.target.model=resnet_tiny")
  assert result.returncode == 0, result.stderr
  assert [row["seeds"] for row in rows(tmp_path)] == ["1"]
  assert not (failed / "error.txt").exists()


def test_seeds_that_fail_together_train_alone(tmp_path, monkeypatch):
  (job,) = table_cells.make_jobs(cells(tmp_path, 2)[:1], 2)
  asked = []

  def run(self, workdirs):
    asked.append(list(workdirs))
    if len(workdirs) > 1:
      raise trainer.DoesNotFit
    if 1 in workdirs:
      raise errors.InputError("no")
    return [{"val_accuracy": 0.5, "test_accuracy": 0.5}]

  monkeypatch.setattr(train.Training, "run", run)
  table_cells.Runner().run(job)
  assert asked == [[0, 1], [0], [1]]
  failed = [(w / "error.txt").exists() for w in job.workdirs.values()]
  assert failed == [False, True]


def test_accuracies_of_a_task_are_shown_as_they_are(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(table_cells, "CONSOLE", console.Console(soft_wrap=True))
  monkeypatch.setattr(
    table_cells.Runner,
    "_train",
    lambda *_: [{"val_accuracy": -4.2, "test_accuracy": 0.5}],
  )
  for task, said in (
    ("classification", "validation -420.0%, test 50.0%"),
    ("mine:ERROR", "validation -4.2, test 0.5"),
  ):
    cell = cells(tmp_path, 1)[0]
    cell.config.target.task = task
    table_cells.Runner().run(cell)
    assert said in capsys.readouterr().out
    (result,) = table_cells.results([cell])
    assert result.in_percent == (task == "classification")


def test_a_run_of_another_process_has_not_failed(tmp_path):
  cell = cells(tmp_path, num_seeds=1)[0]
  (folder,) = cell.workdirs.values()
  folder.mkdir(parents=True)
  with run_folder.lock(folder), pytest.raises(run_folder.LockedError):
    table_cells.Runner().run(cell)
  assert not (folder / "error.txt").exists()


@pytest.mark.long
def test_a_stopped_table_goes_on(source, tmp_path):
  command = arguments(
    tmp_path, source, "--methods=scratch,kd", "--seeds=1", "--config.epochs=40"
  )
  process = subprocess.Popen(
    [sys.executable, *command], cwd=small_runs.ROOT, stdout=subprocess.DEVNULL
  )
  second = tmp_path / "digits" / "kd" / "seed0"
  checkpoints = second / "checkpoints"
  deadline = time.time() + 300
  is_saved = lambda: any(path.name.isdigit() for path in checkpoints.glob("*"))
  while not is_saved() and time.time() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(small_runs.PATIENCE) == errors.Interrupted.exit_code
  before = summaries(tmp_path)
  assert set(before) == {"digits/scratch/seed0"}
  result = small_runs.run_python(*command)
  assert result.returncode == 0, result.stderr
  assert "1 runs to do here" in result.stdout
  after = summaries(tmp_path)
  assert after["digits/scratch/seed0"] == before["digits/scratch/seed0"]
  assert "resuming after iteration" in (second / "train.log").read_text()
  epochs = [r["epoch"] for r in small_runs.records(second, "epoch")]
  assert epochs == list(range(1, 41))


def test_a_sweep_is_a_column_for_each_value(tmp_path):
  columns = table_cells.load_columns(
    ["configs/digits.py"], "data.per_class=5,10", ["--config.epochs=7"]
  )
  assert list(columns) == ["per_class=5", "per_class=10"]
  assert [c.data.per_class for c in columns.values()] == [5, 10]
  assert {c.epochs for c in columns.values()} == {7}
  columns = table_cells.load_columns(
    ["configs/stl10.py", "configs/svhn.py"], "", []
  )
  assert list(columns) == ["stl10", "svhn"]
  columns = table_cells.load_columns(
    ["configs/digits.py"], "source.weights=a/b,a/c", []
  )
  cells = table_cells.make_cells(columns, ["lwf"], 1, tmp_path)
  assert [cell.workdirs[0] for cell in cells] == [
    tmp_path / f"weights=a_{name}" / "lwf" / "seed0" for name in "bc"
  ]


@pytest.mark.parametrize(
  ("path", "override", "told"),
  [
    ("configs/stl10.py", "epochs=5", "epochs is 5, not 200"),
    ("mine/dogs.py", "seed=1", "target.model is 'vgg9', not 'resnet18'"),
    (
      "configs/stl10.py",
      "source.weights=SOURCE",
      "the source network is 'resnet_tiny of 10 classes', not 'resnet32 of 200"
      " classes'",
    ),
    ("configs/digits.py", "epochs=5", None),
  ],
)
def test_the_papers_numbers_need_its_setting(
  path, override, told, source, tmp_path
):
  """Also beside a file of one's own that has the name of a shipped one."""
  override = override.replace("SOURCE", str(source))
  if path.startswith("mine"):
    path = str(tmp_path / "dogs.py")
    pathlib.Path(path).write_text("from configs.default import get_config")
  columns = table_cells.load_columns([path], "", [f"--config.{override}"])
  made = table_cells.make_cells(columns, ["scratch", "lwf", "kd"], 1, tmp_path)
  scratch, lwf, kd = (cell.departures for cell in table_cells.results(made))
  assert kd == ()  # The paper does not have it.
  assert (told in lwf) if told else (lwf == ())
  # What is trained from scratch has no source.
  is_of_source = told is None or told.startswith("the source")
  assert (scratch == ()) == is_of_source


def test_images_of_ones_own_are_not_the_papers(tmp_path):
  columns = table_cells.load_columns(
    ["configs/dogs.py"], "", ["--config.data.source=folder"]
  )
  (cell,) = table_cells.make_cells(columns, ["scratch"], 1, tmp_path)
  assert table_cells.results([cell])[0].departures == ()
  folder = cell.workdirs[0]
  folder.mkdir(parents=True)
  summary = {"num_train": 800, "num_val": 100, "num_test": 300}
  summary["epochs"] = cell.config.epochs
  (folder / "summary.json").write_text(json.dumps(summary))
  assert table_cells.results([cell])[0].departures == (
    "number of labelled images is 900, not 12000",
    "number of test images is 300, not 8580",
  )


def cells(workdir, num_seeds=3):
  columns = table_cells.load_columns(["configs/digits.py"], "", [])
  methods = ["scratch", "lwf", "l2t_ww"]
  return table_cells.make_cells(columns, methods, num_seeds, workdir)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_shares_are_all_of_the_runs_once(tmp_path, together):
  everything = cells(tmp_path)
  # Also where some are done already, or were done with fewer epochs.
  epochs = everything[0].config.epochs
  for seed, number in ((1, epochs), (0, epochs - 1)):
    done = tmp_path / "digits" / "lwf" / f"seed{seed}"
    done.mkdir(parents=True)
    (done / "summary.json").write_text(json.dumps({"epochs": number}))
  done = done.with_name("seed1")
  shares = [
    table_cells.make_jobs(everything, together)[table.parse_shard(f"{i}/4")]
    for i in range(1, 5)
  ]
  runs = [
    workdir
    for share in shares
    for job in share
    for workdir in job.workdirs.values()
  ]
  wanted = {w for cell in everything for w in cell.workdirs.values()} - {done}
  assert len(runs) == len(wanted) == 8
  assert set(runs) == wanted


@pytest.mark.parametrize(
  ("methods", "sweep", "override", "message"),
  [
    ("lwf,lwf", "", "", "--methods=lwf,lwf names one twice"),
    ("lwf", "data.per_class", "", "must be a field and its values"),
    ("lwf", "data.perclass=1,2", "", "did you mean config.data.per_class?"),
    ("lwf", "method=lwf,at", "", "set --methods, not config.method"),
    ("lwf", "", "config.method=lwf", "set --methods, not config.method"),
    ("lwf,l2t", "", "", "unknown method 'l2t'"),
    (
      "lwf",
      "epochs=1,1",
      "",
      "would share the folder epochs=1; name each once",
    ),
    (
      "fm_single,fm_one_to_one",
      "",
      "config.transfer.pairs=single",
      "pairs=single, fm_single and fm_one_to_one are the same",
    ),
    (
      "fm_one_to_one,l2t_w_one_to_one",
      "",
      "config.transfer.channel_weights=uniform",
      "fm_one_to_one and l2t_w_one_to_one are the same",
    ),
    (
      "kd+l2t_ww,l2t_ww+kd",
      "",
      "",
      "kd+l2t_ww and l2t_ww+kd are the same; leave out one",
    ),
  ],
)
def test_a_table_that_cannot_be(tmp_path, methods, sweep, override, message):
  with pytest.raises(errors.InputError, match=re.escape(message)) as error:
    columns = table_cells.load_columns(
      ["configs/digits.py"], sweep, [f"--{override}"] if override else []
    )
    table_cells.make_cells(columns, methods.split(","), 2, tmp_path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("shard", ["0/4", "5/4", "half", "1/", "-1/2"])
def test_a_wrong_share(shard):
  with pytest.raises(argparse.ArgumentTypeError, match="from 1 to N"):
    table.parse_shard(shard)


def test_a_file_without_a_config_is_no_column(tmp_path):
  """Above all not that of the file before it."""
  (tmp_path / "empty.py").write_text("x = 1")
  paths = ["configs/svhn.py", str(tmp_path / "empty.py")]
  with pytest.raises(errors.InputError, match=r"empty\.py.*get_config"):
    table_cells.load_columns(paths, "", [])


def test_a_run_of_fewer_epochs_is_not_finished(tmp_path):
  (cell,) = cells(tmp_path, 1)[:1]
  (folder,) = cell.workdirs.values()
  folder.mkdir(parents=True)
  read = lambda: tuple(map(len, table_cells.read_runs(cell)))
  (folder / "summary.json").write_text('{"epochs": 3}')
  assert read() == (0, 0)
  (folder / "error.txt").write_text("not enough memory")
  assert read() == (0, 1)
  summary = json.dumps({"epochs": cell.config.epochs})
  (folder / "summary.json").write_text(summary)
  assert read() == (1, 0)


def test_a_folder_of_another_table_is_refused(tmp_path):
  (cell,) = cells(tmp_path, 1)[:1]
  folder = tmp_path / "digits" / "scratch" / "seed0"
  folder.mkdir(parents=True)
  (folder / "config.json").write_text('{"epochs": 3}')
  with pytest.raises(errors.InputError, match="epochs was 3, is 100"):
    from_config.check(cell.config, cell.workdirs)
