"""From the command line to a trained network, on real digits."""

import copy
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shutil
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest

from configs import default
from l2t_jax import cli, errors, types
import l2t_jax.config
from l2t_jax.data import memory, streaming
from l2t_jax.models import weight_files
from l2t_jax.run import from_config, loop, train, trainer
from l2t_jax.run import predictor as predictors
from l2t_jax.run import setup as setups
from l2t_jax.runtime import checkpoint, run_folder
from tests.support import data_sets, small_runs

# Runs and their compiled steps are shared by the tests of one process.
pytestmark = pytest.mark.xdist_group("experiment")


def test_a_run_leaves_what_it_promises(finished):
  summary = json.loads((finished / "summary.json").read_text())
  assert summary["method"] == "l2t_ww"
  assert summary["seed"] == 0
  assert summary["epochs"] == 3
  assert summary["seconds"] > 0
  assert summary["versions"]["jax"] == jax.__version__
  assert set(summary["phases"]) >= {"iterations", "evaluations", "saving"}
  epochs = small_runs.records(finished, "epoch")
  assert [r["epoch"] for r in epochs] == [1, 2, 3]
  assert [r["learning_rate"] for r in epochs] == pytest.approx(
    [0.1, 0.075, 0.025]
  )
  best = max(epochs, key=lambda r: r["val_accuracy"])
  assert summary["val_accuracy"] == best["val_accuracy"]
  assert summary["test_accuracy"] == best["test_accuracy"]
  assert summary["best_epoch"] == best["epoch"]
  config = json.loads((finished / "config.json").read_text())
  assert config["bilevel"]["num_inner_steps"] == 1
  content = json.loads((finished / "transfer_map.json").read_text())
  pairs = [(p["source"], p["target"]) for p in content["pairs"]]
  assert pairs == [("stage3_block1", "conv3"), ("stage1_block1", "conv1")]
  assert [len(p["history"]) for p in content["pairs"]] == [3, 3]
  assert (finished / "transfer_map.png").stat().st_size > 10_000
  assert list((finished / "tensorboard").iterdir())
  assert list((finished / "checkpoints").iterdir())


def test_it_learns(source, tmp_path):
  config = small_runs.small_config(source, epochs=30)
  config.method = "scratch"
  config.data.per_class = 20
  summary = small_runs.train(config, tmp_path)
  losses = [r["train_loss"] for r in small_runs.records(tmp_path, "epoch")]
  assert losses[-1] < 0.5 * losses[0]
  assert summary["test_accuracy"] > 0.5  # Chance is 0.1.


def test_the_same_command_again_says_that_it_is_complete(
  source, finished, capsys
):
  before = (finished / "metrics.jsonl").read_bytes()
  small_runs.train(small_runs.small_config(source), finished)
  assert "nothing to do" in capsys.readouterr().out
  assert (finished / "metrics.jsonl").read_bytes() == before


def test_values_that_begin_like_a_field():
  arguments = ("--config", "config.py", "--workdir", "config.run")
  result = small_runs.run_python("train.py", *arguments)
  assert result.stderr.startswith("error: --config=config.py: there is no file")
  # A field has two dashes.
  result = small_runs.run_python("train.py", *arguments, "-config.epochs=3")
  assert "unexpected argument '-config.epochs=3'" in result.stderr


def test_a_command_without_a_config(tmp_path):
  result = small_runs.run_python("train.py", f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 2
  assert result.stderr.startswith(
    "error: the following arguments are required: --config"
  )
  assert result.stderr.count("\n") == 1


def test_a_target_becomes_a_source(source, finished, tmp_path):
  """Of another architecture than the first source, and for another target."""
  config = small_runs.small_config(finished / "target.safetensors", epochs=1)
  config.method = "fm_single"
  config.target.model = "resnet_tiny"
  config.transfer.pairs = ""
  config.transfer.beta = 0.7
  small_runs.train(config, tmp_path)
  content = json.loads((tmp_path / "transfer_map.json").read_text())
  (pair,) = content["pairs"]
  assert (pair["source"], pair["target"]) == ("conv3", "stage3_block1")
  assert content["fixed"]
  (record,) = small_runs.records(tmp_path, "epoch")
  assert record["train_matching_loss"] == pytest.approx(
    0.7 * pair["matching_distance"], rel=1e-5
  )


def test_a_checkpoint_holds_what_it_was_given(tmp_path):
  """It is written in the background, while the loop goes on."""
  state = types.TrainState(jnp.zeros(()), jnp.ones(3), {}, {})
  for trial in range(5):
    progress = {"epoch": 1, "weights": list(range(10_000))}
    with checkpoint.Checkpoints(tmp_path / str(trial)) as checkpoints:
      checkpoints.save(1, state, progress)
      progress["epoch"] = 2
    with checkpoint.Checkpoints(tmp_path / str(trial)) as checkpoints:
      assert checkpoints.restore(1, like=state)[1]["epoch"] == 1


def test_a_folder_of_large_images(tmp_path):
  """Decoded in worker processes; the run ends, and they with it."""
  rng = np.random.default_rng(0)
  for label, brightness in (("dark", 60), ("light", 190)):
    for i in range(24):
      folder = tmp_path / "images" / label
      folder.mkdir(parents=True, exist_ok=True)
      noise = rng.integers(-50, 50, (120, 150, 3))
      image = PIL.Image.fromarray((brightness + noise).astype(np.uint8))
      image.save(folder / f"{i}.jpg")
  workdir = tmp_path / "run"
  result = small_runs.run_python(
    "train.py",
    "--config=configs/cub200.py",
    "--config.method=scratch",
    "--config.target.model=vgg_tiny",
    "--config.epochs=3",
    "--config.batch_size=8",
    "--config.data.source=folder",
    f"--config.data.path={tmp_path / 'images'}",
    "--config.data.image_size=112",
    "--config.data.eval_resize=128",
    "--config.data.num_workers=2",
    f"--workdir={workdir}",
  )
  assert result.returncode == 0, result.stderr
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["num_train"] + summary["num_val"] + summary["num_test"] == 48
  assert summary["test_accuracy"] == 1.0


def test_configs_are_complete():
  """Each experiment has the default's fields, no more and no fewer."""
  names = [path.stem for path in (small_runs.ROOT / "configs").glob("[!_]*.py")]
  assert len(names) > 10
  fields = set(l2t_jax.config.flatten(default.get_config().to_dict()))
  for name in names:
    config = importlib.import_module(f"configs.{name}").get_config()
    assert set(l2t_jax.config.flatten(config.to_dict())) == fields
    if name != "default":
      l2t_jax.config.check(config)


@pytest.mark.parametrize(
  ("workers", "advice"),
  [(8, "raise config.data.num_workers .8."), (20, "keep")],
)
def test_training_that_waits_for_images_says_so(
  source, tmp_path, monkeypatch, capsys, workers, advice
):
  config = small_runs.small_config(source, epochs=1)
  config.data.num_workers = workers
  monkeypatch.setattr(os, "cpu_count", lambda: 16)
  config.method = "scratch"
  in_memory = from_config.resolve(config)
  reading = dataclasses.replace(
    in_memory.reading, in_memory=False, augment="none"
  )
  streamed = in_memory._replace(reading=reading)
  train.train(streamed, tmp_path / "fast")
  assert "waited" not in capsys.readouterr().out
  for kind in (memory.InMemoryDataset, streaming.StreamingDataset):
    read = kind.train_batches

    def read_slowly(*args, read=read, **kwargs):
      for batch in read(*args, **kwargs):
        time.sleep(0.3)
        yield batch

    monkeypatch.setattr(kind, "train_batches", read_slowly)
  monkeypatch.setattr(loop, "_WAITING_SECONDS", 0.0)
  monkeypatch.setattr(loop, "_WAITING_SHARE", 0.0)
  # One that is made on the device waits for the iterations before.
  train.train(in_memory, tmp_path / "in memory")
  assert "waited" not in capsys.readouterr().out
  train.train(streamed, tmp_path / "slow")
  printed = capsys.readouterr().out
  assert re.search(r"waited \d+ of \d+ s for images; " + advice, printed)


@pytest.mark.parametrize(
  ("size", "before", "is_same"),
  [(32, 37, True), (224, 256, True), (224, 224, False), (112, 256, False)],
)
def test_a_run_that_evaluates_alike_is_the_same(
  tmp_path, size, before, is_same
):
  """`eval_resize` is not read for images in memory; 0 is 8/7 of the size."""
  config = default.get_config()
  config.data.image_size = size
  description = from_config.describe(config)
  old = json.loads(config.to_json())
  old["data"]["eval_resize"] = before
  (tmp_path / "config.json").write_text(json.dumps(old))
  if is_same:
    train.check_folders(description, {0: tmp_path}, (), {})
    return
  with pytest.raises(errors.InputError, match=f"eval_resize was {before}, is"):
    train.check_folders(description, {0: tmp_path}, (), {})


def test_a_run_and_its_files_may_move(source, tmp_path, monkeypatch):
  """What is in the files tells runs apart, not where they are."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  old, new = pathlib.Path("old"), pathlib.Path("new")
  data_sets.save_folder(old / "pictures", ("train", "test"), size=(16, 16))
  shutil.copy(source, old / "teacher.safetensors")
  config = small_runs.small_config(old / "teacher.safetensors", epochs=1)
  config.data.source, config.data.path = "folder", "old/pictures"
  config.data.val_fraction = 0.2
  config.batch_size = 4
  before = small_runs.train(config, old / "run")
  old.rename(new)
  moved = copy.deepcopy(config)
  moved.source.weights = str(new.absolute() / "teacher.safetensors")
  moved.data.path = "~/new/pictures"
  l2t_jax.config.expand_home(moved)
  assert small_runs.train(moved, new / "run") == before  # It is complete.
  (new / "run" / "summary.json").unlink()
  resumed = small_runs.train(moved, new / "run")
  assert resumed["test_accuracy"] == before["test_accuracy"]

  def check(message):
    with pytest.raises(errors.InputError, match=message):
      small_runs.train(moved, new / "run")

  file = new / "pictures" / "train" / "cat" / "0.png"
  content = file.read_bytes()
  file.write_bytes(content + b"longer")
  check("data.path ")
  file.write_bytes(content)
  file.rename(file.with_name("other.png"))
  check("data.path ")
  file.with_name("other.png").rename(file)
  small_runs.train(moved, new / "run")
  variables, metadata = weight_files.load(source)
  variables["params"]["fc"]["bias"] = variables["params"]["fc"]["bias"] + 1
  weight_files.save(new / "teacher.safetensors", variables, metadata)
  check("source.weights .* holds other files than before")
  # TensorFlow Datasets are known by name, and data.path is their cache.
  config.data.source, config.data.name = "tfds", "mnist"
  run_folder.make(tmp_path / "cached")
  for config.data.path in ("one", "two"):
    description = from_config.describe(config)
    contents = from_config.contents(config)
    train.check_folders(description, {0: tmp_path / "cached"}, (), contents)
    for name, content in (("config", description), ("contents", contents)):
      run_folder.write_json(tmp_path / "cached" / f"{name}.json", content)
  # A complete run needs none of them.
  moved.source.weights = str(source)
  old.mkdir()
  (new / "pictures").rename(old / "pictures")
  assert small_runs.train(moved, new / "run")["epochs"] == 1


def test_files_that_a_method_does_not_read(source, tmp_path):
  weights = shutil.copy(source, tmp_path / "teacher.safetensors")
  config = small_runs.small_config(weights, epochs=1)
  config.method = "scratch"
  small_runs.train(config, tmp_path / "run")
  (tmp_path / "run" / "summary.json").unlink()
  weights.unlink()
  assert small_runs.train(config, tmp_path / "run")["epochs"] == 1


def test_home_folders_on_the_command_line(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  parser = errors.Parser("")
  parser.add_argument("--workdir")
  parser.add_argument("path")
  args = parser.parse_args(["--workdir=~/runs", "~/a~b"])
  assert args.workdir == f"{tmp_path}/runs"
  assert args.path == f"{tmp_path}/a~b"
  assert parser.parse_args(["--workdir=a/~/b", "x~"]).workdir == "a/~/b"


def _learned(workdir):
  """Return the newest checkpoint's state as bytes, and the best target's."""
  folder = workdir / run_folder.CHECKPOINTS
  step = max(checkpoint.steps_in(folder))
  with ocp.StandardCheckpointer() as reader:
    state = reader.restore(folder.absolute() / str(step) / "state")
  return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_more_epochs_go_on_to_the_bits(source, tmp_path, monkeypatch):
  """With a constant learning rate: one run of 3 epochs, and 1 and then 3."""
  config = small_runs.small_config(source, epochs=3)
  config.optimizer.schedule = "constant"
  whole = small_runs.train(config, tmp_path / "whole")
  config.epochs = 1
  assert small_runs.train(config, tmp_path / "parts")["epochs"] == 1
  config.epochs = 3
  with monkeypatch.context() as patch:
    patch.setattr(loop.Loop, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      small_runs.train(config, tmp_path / "parts")
  assert not (tmp_path / "parts" / "summary.json").exists()
  parts = small_runs.train(config, tmp_path / "parts")
  assert parts["epochs"] == 3
  assert _learned(tmp_path / "parts") == _learned(tmp_path / "whole")
  for name in ("val_accuracy", "test_accuracy", "best_epoch"):
    assert parts[name] == whole[name]
  losses = [
    [
      record["train_loss"]
      for record in small_runs.records(tmp_path / n, "epoch")
    ]
    for n in ("whole", "parts")
  ]
  assert losses[0] == losses[1]
  config.epochs = 2
  with pytest.raises(errors.InputError, match="epochs was 3, is 2"):
    small_runs.train(config, tmp_path / "parts")


def test_a_strong_recipe_resumes_to_the_bits(source, tmp_path, monkeypatch):
  config = small_runs.small_config(source, epochs=2)
  config.optimizer.update(
    name="adamw",
    learning_rate=0.01,
    decayed="kernels",
    warmup_epochs=1.5,
    ema_decay=0.5,
  )
  config.data.update(rand_augment=1, random_erasing=0.3, mixup=0.8, cutmix=1.0)
  config.target.update(label_smoothing=0.1, batch_norm_groups=4)
  whole = small_runs.train(config, tmp_path / "whole")
  resumed = lambda: small_runs.train(config, tmp_path / "parts")
  small_runs.kill_in_epoch(2, resumed, monkeypatch)
  assert resumed()["test_accuracy"] == whole["test_accuracy"]
  assert whole["recipe"]["optimizer.name"] == "adamw"
  assert whole["recipe"]["optimizer.ema_decay"] == 0.5
  assert whole["recipe"]["data.cutmix"] == 1.0
  assert whole["recipe"]["optimizer.clip_norm"] == 0
  assert whole["recipe"]["target.batch_norm_groups"] == 4
  assert _learned(tmp_path / "parts") == _learned(tmp_path / "whole")
  records = small_runs.records(tmp_path / "whole", "epoch")
  assert records[1]["train_loss"] < records[0]["train_loss"]


def test_more_epochs_of_another_schedule_are_refused(source, tmp_path):
  config = small_runs.small_config(source, epochs=1)
  small_runs.train(config, tmp_path / "run")
  config.epochs = 2
  with pytest.raises(errors.InputError, match=r"--config\.init_from="):
    small_runs.train(config, tmp_path / "run")


def test_a_finished_run_without_checkpoints_cannot_go_on(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / "run")
  shutil.rmtree(workdir / run_folder.CHECKPOINTS)
  summary = json.loads((workdir / "summary.json").read_text())
  summary["epochs"] -= 1
  (workdir / "summary.json").write_text(json.dumps(summary))
  config = cli.load_config(str(workdir / "config.json"), ())
  with pytest.raises(errors.InputError, match="without its checkpoints"):
    small_runs.train(config, workdir)
  assert json.loads((workdir / "summary.json").read_text()) == summary


def test_a_summary_is_that_of_the_target_that_was_kept(
  source, tmp_path, monkeypatch, capsys
):
  """After a crash, iterations that are repeated can have other results."""
  evaluate = lambda *_: [{"loss": 1.0, "accuracy": 0.5}]
  monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)
  config = small_runs.small_config(source, epochs=2)
  config.method, config.checkpoint_every = "scratch", 1
  train_once = lambda: small_runs.train(config, tmp_path)
  small_runs.kill_in_epoch(2, train_once, monkeypatch)
  file = tmp_path / "target.safetensors"
  variables, metadata = weight_files.load(file)
  lost = {"best_epoch": 2, "val_accuracy": 0.9, "test_accuracy": 0.8}
  texts = {name: json.dumps(value) for name, value in lost.items()}
  weight_files.save(file, variables, metadata | texts)
  assert lost.items() <= train_once().items()
  # Without that target, the summary is that of the checkpoint.
  file.unlink()
  (tmp_path / "summary.json").unlink()
  assert train_once()["val_accuracy"] == 0.5
  assert f"{file}, which is of epoch 1, is gone" in capsys.readouterr().out


def test_predictions_have_the_precision_of_the_run(source, tmp_path):
  config = small_runs.small_config(source, epochs=1)
  config.method, config.precision = "scratch", "bf16"
  config.target.model = "vit_tiny"  # Its logits are bfloat16.
  summary = small_runs.train(config, tmp_path)
  predictor = predictors.load(tmp_path)
  assert predictor.network.dtype == jnp.bfloat16
  images = np.zeros((1, *predictor.image_format.shape), predictor.dtype)
  assert predictor.outputs(images).dtype == np.float32
  assert (predictor.precision, summary["hypergradient_mode"]) == (
    "default",
    None,
  )


def test_a_run_starts_from_what_another_has_learned(finished, source, tmp_path):
  config = small_runs.small_config(source, epochs=1)
  other = shutil.copytree(finished, tmp_path / "other")
  config.init_from = str(other)
  config.optimizer.learning_rate = 1e-30  # Nothing moves but the statistics.
  config.meta.learning_rate = 1e-30
  config.optimizer.momentum = 0.0
  small_runs.train(config, tmp_path / "next")
  run = setups.build(from_config.resolve(config))
  shapes, (old, new) = run.state_shapes, (finished, tmp_path / "next")
  states = []
  for workdir in (old, new):
    folder = workdir / run_folder.CHECKPOINTS
    with checkpoint.Checkpoints(folder) as checkpoints:
      step = max(checkpoints.steps())
      states.append(checkpoints.restore(step, shapes)[0])
  chex.assert_trees_all_close(states[0].inner.params, states[1].inner.params)
  chex.assert_trees_all_close(states[0].meta_params, states[1].meta_params)
  assert int(states[1].step) < int(states[0].step)
  fresh = run.create_state(config.seed)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(fresh.inner.params, states[1].inner.params)
  # It starts from the newest checkpoint, which tells other runs apart, too.
  with checkpoint.Checkpoints(other / run_folder.CHECKPOINTS) as checkpoints:
    newest = max(checkpoints.steps())
  digests = from_config.contents(config)
  assert digests["init_from"].endswith(f" {newest}")
  # The other run may move and train further, and is not needed once there is a
  # checkpoint.
  contents = (tmp_path / "next" / "contents.json").read_bytes()
  config.init_from = str(other.rename(tmp_path / "moved"))
  moved = tmp_path / "moved" / run_folder.CHECKPOINTS
  for change in (
    lambda: (moved / str(newest)).rename(moved / str(newest + 1)),  # Trained.
    lambda: shutil.rmtree(config.init_from),
    lambda: None,
  ):
    (tmp_path / "next" / "summary.json").unlink()
    small_runs.train(config, tmp_path / "next")
    change()
  assert (tmp_path / "next" / "contents.json").read_bytes() == contents
  done = train.train(from_config.resolve(config), tmp_path / "next")
  assert done["epochs"] == 1
  config.init_from = str(tmp_path)
  with pytest.raises(errors.InputError, match="init_from was"):
    small_runs.train(config, tmp_path / "next")
  with pytest.raises(errors.InputError, match="no checkpoint in"):
    small_runs.train(config, tmp_path / "third")
  config.init_from, config.method = str(finished), "scratch"
  with pytest.raises(errors.InputError, match="it cannot start this run"):
    small_runs.train(config, tmp_path / "fourth")
  config.init_from = ""  # What was refused has left no trace.
  small_runs.train(config, tmp_path / "fourth")


def test_a_run_starts_from_one_with_another_optimizer(
  finished, source, tmp_path
):
  """And from one with a moving average, which starts afresh."""
  config = small_runs.small_config(source, epochs=1)
  config.init_from = str(finished)
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = config.meta.learning_rate = 1e-30
  config.optimizer.ema_decay = 0.9
  small_runs.train(config, tmp_path / "adamw")
  config.init_from = str(tmp_path / "adamw")
  config.optimizer.update(name="sgd", momentum=0.0, ema_decay=0.0)
  small_runs.train(config, tmp_path / "sgd")
  states = []
  for workdir in (finished, tmp_path / "sgd"):
    folder = workdir / run_folder.CHECKPOINTS
    with checkpoint.Checkpoints(folder) as checkpoints:
      step = max(checkpoints.steps())
      sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      shapes = checkpoints.shapes(step, sharding)
      like = types.TrainState(**shapes)
      states.append(checkpoints.restore(step, like)[0])
  chex.assert_trees_all_close(
    states[0].inner["params"], states[1].inner["params"]
  )
  assert states[1].average is None
  for path in (tmp_path / "adamw").glob("checkpoints/*/state/_METADATA"):
    path.write_text("{")
  with pytest.raises(errors.StorageError, match="is damaged"):
    small_runs.train(config, tmp_path / "damaged")
