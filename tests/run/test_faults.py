"""Runs that are killed, stopped, damaged or run into bad numbers."""

import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from l2t_jax import errors, types
from l2t_jax.data import memory
from l2t_jax.run import loop, train, trainer
from l2t_jax.runtime import checkpoint, run_folder
from tests.support import small_runs, small_setup

# Runs and their compiled steps are shared by the tests of one process.
pytestmark = pytest.mark.xdist_group("experiment")

# How often the run below is disturbed, and what its moments are drawn with.
_NUM_FAULTS = int(os.environ.get("L2T_FAULTS", 20))
_SEED = int(os.environ.get("L2T_FAULTS_SEED", 0))
_STATE = types.TrainState(
  jnp.zeros((), jnp.int32), jax.random.normal(jax.random.key(0), 30_000), {}, {}
)


@pytest.mark.long
@pytest.mark.xdist_group("disturbed")
@pytest.mark.parametrize(
  ("num_faults", "num_workers"),
  [(_NUM_FAULTS, 0), (_NUM_FAULTS // 2, 2)],
  ids=["in memory", "streamed"],
)
def test_a_run_ends_bit_equal_whatever_happens_to_it(
  source, tmp_path, num_faults, num_workers
):
  """Killed, stopped, out of disk space or damaged at random moments."""
  config_file = small_runs.write_config(
    tmp_path,
    source,
    epochs=24,
    log_every=3,
    checkpoint_steps=7,
    num_workers=num_workers,
  )
  train = lambda workdir, **options: small_runs.start_python(
    "train.py", f"--config={config_file}", f"--workdir={workdir}", **options
  )
  expected, disturbed = tmp_path / "expected", tmp_path / "disturbed"
  _finish(train(expected))
  rng = random.Random(_SEED)
  faults = [_kill, _kill_while_saving, _stop, _fill_disk, _damage]
  faults += rng.choices(faults, weights=(5, 2, 1, 1, 1), k=num_faults)
  for fault in faults[:num_faults]:
    fault(lambda **options: train(disturbed, **options), disturbed, rng)
  _finish(train(disturbed))
  _assert_same_runs(disturbed, expected)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_run_that_is_cut_off_ends_bit_equal(
  source, finished, tmp_path, monkeypatch, capsys, is_damaged
):
  config = small_runs.small_config(source)
  config.checkpoint_steps = 2  # Of the 3 that epoch and interval have.
  train_once = lambda: small_runs.train(config, tmp_path)
  small_runs.kill_in_epoch(3, train_once, monkeypatch)
  assert _checkpoints(tmp_path) == {6, 8}
  if is_damaged:
    _flip_a_bit(tmp_path, random.Random(0))
  # What a crash can leave behind: a half-written record.
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "st')
  train_once()
  step = 6 if is_damaged else 8
  assert f"resuming after iteration {step}" in capsys.readouterr().out
  _assert_same_runs(tmp_path, finished)


def test_the_best_so_far_is_remembered(source, tmp_path, monkeypatch):
  """The best on validation images, whatever the test images say."""
  accuracies = {"val": (0.6, 0.5), "test": (0.1, 0.9)}

  def evaluate(self, split):
    epoch = int(self.state_of(0).step) // 3
    return [{"loss": 1.0, "accuracy": accuracies[split][epoch - 1]}]

  monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)
  config = small_runs.small_config(source, epochs=2)
  config.method = "scratch"
  train_once = lambda: small_runs.train(config, tmp_path)
  small_runs.kill_in_epoch(2, train_once, monkeypatch)
  summary = train_once()
  epochs = small_runs.records(tmp_path, "epoch")
  assert [record["val_accuracy"] for record in epochs] == [0.6, 0.5]
  assert (summary["best_epoch"], summary["test_accuracy"]) == (1, 0.1)


def test_asked_to_stop_while_it_starts(source, tmp_path):
  """By when there is nothing that it could save."""
  config_file = small_runs.write_config(
    tmp_path, source, epochs=1, log_every=3, checkpoint_steps=7
  )
  process = small_runs.start_python(
    "train.py", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"
  )
  while not _listens(process.pid, signal.SIGTERM):
    assert process.poll() is None
    time.sleep(0.01)
  assert "asked to stop" in _ask_until_it_ends(process)


def test_control_c_saves_too(source, tmp_path):
  """It reaches the processes that read images as well."""
  config_file = small_runs.write_config(
    tmp_path, source, epochs=200, log_every=3, checkpoint_steps=7, num_workers=1
  )
  process = small_runs.start_python(
    "train.py",
    f"--config={config_file}",
    f"--workdir={tmp_path / 'run'}",
    start_new_session=True,
  )
  _wait_for_progress(process, tmp_path / "run", random.Random(0))
  os.killpg(process.pid, signal.SIGINT)
  _, stderr = process.communicate(timeout=small_runs.PATIENCE)
  assert process.returncode == errors.Interrupted.exit_code, stderr
  # Python may count shared memory that workers had filled, and frees it.
  asked, error, *_ = stderr.splitlines()
  assert asked == "stopping after this iteration; Ctrl-C again: at once"
  assert re.match(r"error: asked to stop; saved after iteration \d+ of", error)
  assert "Traceback" not in stderr


def _listens(pid, number):
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  mask = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
  return bool(mask >> (number - 1) & 1)


def _kill(train, workdir, rng):
  process = train()
  _wait_for_progress(process, workdir, rng)
  process.kill()
  process.wait(small_runs.PATIENCE)


def _kill_while_saving(train, workdir, rng):
  """A checkpoint is half-written."""
  process = train()
  _wait_for_progress(process, workdir, rng)
  is_saving = lambda: list(workdir.glob("checkpoints/*tmp*"))
  while not is_saving():
    assert process.poll() is None
  process.kill()
  process.wait(small_runs.PATIENCE)
  assert is_saving()


def _stop(train, workdir, rng):
  """Asked politely, it saves where it is, leaves and says so."""
  process = train()
  _wait_for_progress(process, workdir, rng)
  stderr = _ask_until_it_ends(process)
  step = int(re.search(r"saved after iteration (\d+) of 600", stderr)[1])
  assert step in _checkpoints(workdir)


def _ask_until_it_ends(process):
  while process.poll() is None:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
  _, stderr = process.communicate(timeout=small_runs.PATIENCE)
  assert process.returncode == errors.Interrupted.exit_code, stderr
  return stderr


def _fill_disk(train, workdir, rng):
  """A checkpoint can no longer be written; the ones before are kept."""
  before = _checkpoints(workdir)
  limit = (20_000, resource.RLIM_INFINITY)
  process = train(
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  )
  _, stderr = process.communicate(timeout=small_runs.PATIENCE)
  assert process.returncode == errors.StorageError.exit_code, stderr
  # Libraries' threads may complain before and after.
  (error,) = re.findall(r"^error: .*", stderr, re.MULTILINE)
  assert error.startswith("error: cannot write "), stderr
  assert "File too large" in error
  assert before <= _checkpoints(workdir)


def _damage(train, workdir, rng):
  """The newest checkpoint has changed on disk: the one before is used."""
  while len(_checkpoints(workdir)) < 2:
    _kill(train, workdir, rng)
  newest = max(_checkpoints(workdir))
  _flip_a_bit(workdir, rng)
  process = train()
  _wait_for_progress(process, workdir, rng)
  process.kill()
  stdout, _ = process.communicate(timeout=small_runs.PATIENCE)
  assert f"checkpoint of iteration {newest} is damaged" in stdout
  assert (workdir / f"damaged_checkpoint_{newest}").is_dir()


def _wait_for_progress(process, workdir, rng):
  """Wait for some records more, and then for any moment."""
  wanted = _num_records(workdir) + rng.randint(1, 5)
  is_new = lambda: _num_records(workdir) >= wanted
  while not is_new() and process.poll() is None:
    time.sleep(0.01)
  time.sleep(rng.uniform(0, 0.2))


def _num_records(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def _finish(process):
  _, stderr = process.communicate(timeout=small_runs.PATIENCE)
  assert process.returncode == 0, stderr


def _checkpoints(workdir):
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.exists() else []
  return {int(name) for name in names if name.isdigit()}


def _flip_a_bit(workdir, rng):
  """Flip one that the last checkpoint's numbers need: some are of no use."""
  step, before = _raw_state(workdir)
  largest = _largest_file(workdir / "checkpoints" / str(step))
  content = largest.read_bytes()
  while _is_state(workdir, before):
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    largest.write_bytes(changed)


def _largest_file(folder):
  return max(folder.rglob("*"), key=lambda path: path.stat().st_size)


def _is_state(workdir, expected):
  try:
    _, state = _raw_state(workdir)
  except Exception:  # Orbax raises this very type where it cannot read.
    return False
  return jax.tree.all(jax.tree.map(np.array_equal, state, expected))


def _assert_same_runs(ours, theirs):
  read = lambda name: [(w / name).read_bytes() for w in (ours, theirs)]
  names = {"metrics.jsonl"}
  if (theirs / "transfer_map.json").exists():
    names.add("transfer_map.json")
  for name in names:
    assert len(set(read(name))) == 1, name
  # Its bytes would differ: the header is in no fixed order.
  targets = map(safetensors.numpy.load, read("target.safetensors"))
  jax.tree.map(np.testing.assert_array_equal, *targets)
  times = ("seconds", "iteration_seconds", "compile_seconds", "phases")
  summaries = [
    {k: v for k, v in json.loads(text).items() if k not in times}
    for text in read("summary.json")
  ]
  assert summaries[0] == summaries[1]
  assert _checkpoints(ours) & _checkpoints(theirs)
  states = [_raw_state(workdir) for workdir in (ours, theirs)]
  jax.tree.map(np.testing.assert_array_equal, *states)


def _raw_state(workdir):
  """Read the last checkpoint without knowing what is in it."""
  import orbax.checkpoint as ocp

  with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
    step = manager.latest_step()
    content = ocp.args.Composite(state=ocp.args.StandardRestore())
    return step, manager.restore(step, args=content)["state"]


def test_the_only_checkpoint_is_not_thrown_away(source, tmp_path):
  config = small_runs.small_config(source, epochs=1)
  config.method = "scratch"
  small_runs.train(config, tmp_path)
  (tmp_path / "summary.json").unlink()
  (step,) = _checkpoints(tmp_path)
  _flip_a_bit(tmp_path, random.Random(0))
  written = (tmp_path / "metrics.jsonl").read_bytes()
  with pytest.raises(
    errors.StorageError, match="only checkpoint, of iteration"
  ):
    small_runs.train(config, tmp_path)
  assert _checkpoints(tmp_path) == {step}
  assert (tmp_path / "metrics.jsonl").read_bytes() == written


@pytest.mark.parametrize(
  ("steps", "group"),
  [
    ({"a": [3, 6], "b": [3]}, ["a", "b"]),  # Killed while both were saving.
    ({"a": [], "b": []}, ["a", "b"]),
    ({"a": [3, 6], "b": [], "c": [6]}, ["a", "c"]),  # b came later.
    ({"a": [], "b": [3], "c": []}, ["a", "c"]),
  ],
)
def test_seeds_go_on_from_what_they_share(tmp_path, steps, group):
  for name, those in steps.items():
    with checkpoint.Checkpoints(
      tmp_path / name / run_folder.CHECKPOINTS
    ) as checkpoints:
      for step in those:
        checkpoints.save(step, _STATE, {})
  folders = {name: tmp_path / name for name in steps}
  assert train._first_group(folders) == group


def test_two_runs_in_one_folder_are_refused(source, tmp_path):
  with run_folder.lock(tmp_path):
    message = "another process is training in"
    with pytest.raises(errors.InputError, match=message):
      small_runs.train(small_runs.small_config(source), tmp_path)
  assert not (tmp_path / "config.json").exists()


def test_a_run_goes_on_with_what_it_began_with(source, tmp_path, monkeypatch):
  """Other images or source weights under the same names are refused."""
  weights = tmp_path / "source.safetensors"
  shutil.copy(source, weights)
  config = small_runs.small_config(weights, epochs=2)
  config.method, config.transfer.pairs = "fm_single", ""
  config.data.source = "npz"
  config.data.path = str(tmp_path / "data.npz")
  rng = np.random.default_rng(0)
  arrays = {}
  for part, count in (("train", 64), ("val", 16), ("test", 16)):
    arrays[f"x_{part}"] = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
    arrays[f"y_{part}"] = np.arange(count) % 4

  def train_once(arrays):
    np.savez(config.data.path, **arrays)
    # Without the digests of files, what is read from them tells.
    (tmp_path / "run" / "contents.json").unlink(missing_ok=True)
    return small_runs.train(config, tmp_path / "run")

  small_runs.kill_in_epoch(2, lambda: train_once(arrays), monkeypatch)
  changed = "{} changed since iteration 1; bring"
  for name in ("x_val", "y_test"):
    with pytest.raises(
      errors.InputError, match=changed.format("the images and labels")
    ):
      train_once(arrays | {name: arrays[name][::-1]})
  tensors = safetensors.numpy.load_file(weights)
  metadata = safetensors.safe_open(weights, "np").metadata()
  other = tensors | {name: -tensors[name] for name in list(tensors)[:1]}
  normalised = metadata | {"mean": "[0.25]", "std": "[0.5]"}
  for changed_file in ((other, metadata), (tensors, normalised)):
    safetensors.numpy.save_file(changed_file[0], weights, changed_file[1])
    with pytest.raises(errors.InputError, match=changed.format("the source")):
      train_once(arrays)
  safetensors.numpy.save_file(tensors, weights, metadata)
  train_once(arrays)
  epochs = small_runs.records(tmp_path / "run", "epoch")
  assert [record["epoch"] for record in epochs] == [1, 2]


def test_checkpoints_of_an_unknown_config_are_refused(source, tmp_path):
  with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(3, _STATE, {})
  message = "holds a checkpoint of iteration 3, but no config.json"
  with pytest.raises(errors.InputError, match=message):
    small_runs.train(small_runs.small_config(source), tmp_path)


@pytest.fixture
def bad_batch(monkeypatch):
  """Let the second iteration of each epoch see an infinite pixel."""
  _spoil(monkeypatch, lambda epoch, number: number == 1)


def _spoil(monkeypatch, is_bad):
  """Let some iterations, by (epoch, number in it), see an infinite pixel."""
  read = memory.InMemoryDataset.train_batches

  def read_badly(self, epoch, start=0):
    for number, batch in enumerate(read(self, epoch, start), start=start):
      if is_bad(epoch, number):
        images = batch.images.at[0, 0, 0, 0].set(jnp.inf)
        batch = batch._replace(images=images)
      yield batch

  monkeypatch.setattr(memory.InMemoryDataset, "train_batches", read_badly)


def test_bad_numbers_are_named(source, tmp_path, bad_batch):
  config = small_runs.small_config(source)
  config.checkpoint_steps = 1
  with pytest.raises(errors.BadNumbersError) as error:
    small_runs.train(config, tmp_path)
  message = str(error.value)
  assert message.startswith("iteration 2: not finite: distances of all 2 pairs")
  for what in ("grad_norm (nan)", "loss (nan)"):
    assert what in message
  assert "the last good checkpoint is of iteration 1. The same command" in (
    message
  )
  assert max(_checkpoints(tmp_path)) == 1
  # As the message says; iteration 1 counts as not skipped.
  config.bad_numbers = "skip"
  small_runs.train(config, tmp_path)
  epochs = small_runs.records(tmp_path, "epoch")
  np.testing.assert_allclose([r["train_skipped"] for r in epochs], 1 / 3)


def test_bad_numbers_are_skipped(source, tmp_path, bad_batch, capsys):
  config = small_runs.small_config(source)
  config.bad_numbers = "skip"
  config.log_every = 1  # An interval of nothing else is no reason to stop.
  summary = small_runs.train(config, tmp_path)
  assert np.isfinite(summary["val_accuracy"])
  printed = capsys.readouterr().out
  assert "iteration 2 is skipped: not finite: distances of" in printed
  epochs = small_runs.records(tmp_path, "epoch")
  np.testing.assert_allclose([r["train_skipped"] for r in epochs], 1 / 3)
  target = safetensors.numpy.load_file(tmp_path / "target.safetensors")
  assert all(np.isfinite(values).all() for values in target.values())


NO_ACCURACY = types.Task(
  lambda outputs, targets: jnp.mean(outputs**2),
  lambda outputs, targets: jnp.full(len(targets), jnp.nan),
)


def test_what_no_update_depends_on_is_not_skipped(source, tmp_path):
  config = small_runs.small_config(source)
  config.method = "scratch"
  config.bad_numbers = "skip"
  config.target.task = f"{__name__}:NO_ACCURACY"
  message = r"^iteration 1: not finite: accuracy \(nan\), although .* the task"
  with pytest.raises(errors.BadNumbersError, match=message):
    small_runs.train(config, tmp_path)


@pytest.mark.parametrize(
  ("most", "message"),
  [(2, "the 2 iterations up to 5 were all skipped"), (20, "of epoch 2 were")],
)
def test_a_run_that_only_skips_stops(
  source, tmp_path, monkeypatch, most, message
):
  monkeypatch.setattr(loop, "_MAX_SKIPS", most)
  config = small_runs.small_config(source)
  config.bad_numbers = "skip"
  _spoil(monkeypatch, lambda epoch, number: epoch == 1)
  with pytest.raises(errors.BadNumbersError, match=message) as error:
    small_runs.train(config, tmp_path)
  assert "bad_numbers" not in str(error.value)  # It skips already.


@pytest.mark.parametrize(
  ("skip", "value"), [(False, np.nan), (True, np.nan), (True, 1e19)]
)
def test_a_bad_meta_update_never_takes_place(skip, value):
  state, sources, pairs, target_taps = small_setup.create()
  step = jax.jit(
    small_setup.make_train_step(
      "l2t_ww", pairs, target_taps, skip_bad_numbers=skip
    )
  )
  batch = small_setup.batch(4)
  bad = batch._replace(images=batch.images.at[0].mul(value))
  after, values = step(state, sources, bad)
  # An iteration that overflows and is skipped can have a finite look-ahead.
  assert np.isnan(values["loss" if skip else "meta_grad_norm"])
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  same(after.meta_params, state.meta_params)
  same(after.meta_opt_state, state.meta_opt_state)
  assert int(after.step) == 1
  if skip:
    assert values["skipped"] == 1
    same(after.inner, state.inner)
    after, values = step(after, sources, batch)
    assert values["skipped"] == 0
    assert np.isfinite(values["loss"])


def test_a_meta_update_that_overflows_never_takes_place(source, tmp_path):
  """The hypergradient is finite, what Adam makes of it is not."""
  config = small_runs.small_config(source)
  config.transfer.pairs = "stage3_block1->conv3"
  config.meta.learning_rate = 1e39
  config.checkpoint_steps = 1
  message = r"iteration 1: not finite: meta_update_norm \(nan|inf\);"
  with pytest.raises(errors.BadNumbersError, match=message):
    small_runs.train(config, tmp_path / "stop")
  config.bad_numbers = "skip"
  small_runs.train(config, tmp_path / "skip")
  (*_, last) = small_runs.records(tmp_path / "skip", "epoch")
  assert "train_loss" in last and "train_meta_update_norm" not in last
  # f stays at zero, and w uniform.
  content = json.loads((tmp_path / "skip" / "transfer_map.json").read_text())
  for pair in content["pairs"]:
    weights = pair["channel_weights"]
    np.testing.assert_allclose(weights, 1 / len(weights), rtol=1e-6)
