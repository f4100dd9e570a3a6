"""From the command line to a trained network, on real digits."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from configs import default, digits
from l2t_jax import (
  build,
  checkpoint,
  experiment,
  logs,
  models,
  objectives,
  pretrained,
  types,
)

ROOT = pathlib.Path(__file__).parents[1]
# Runs and their compiled steps are shared by the tests of one process.
pytestmark = pytest.mark.xdist_group("experiment")


def run_train(*arguments):
  """Run train.py in a process of its own."""
  return subprocess.run(
    [sys.executable, "train.py", *map(str, arguments)],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Source weights, trained for one epoch through train.py."""
  workdir = tmp_path_factory.mktemp("source") / "run"
  result = run_train(
    "--config=configs/digits_source.py",
    "--config.epochs=1",
    f"--workdir={workdir}",
  )
  assert result.returncode == 0, result.stderr
  return workdir / "target.safetensors"


def small_config(source, epochs=3):
  config = digits.get_config()
  config.source.weights = str(source)
  config.epochs = epochs
  config.batch_size = 16
  config.data.image_size = 8
  config.data.val_fraction = 0.02
  config.data.test_fraction = 0.02
  config.transfer.pairs = "stage3_block1->conv3, stage1_block1->conv1"
  config.bilevel.num_inner_steps = 1
  config.checkpoint_every = 1
  return config


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
  """A finished run of three epochs."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  experiment.train_and_evaluate(small_config(source), workdir)
  return workdir


def records(workdir, kind):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_a_run_leaves_what_it_promises(finished):
  summary = json.loads((finished / "summary.json").read_text())
  assert summary["method"] == "l2t_ww"
  assert summary["seed"] == 0
  assert summary["epochs"] == 3
  assert summary["seconds"] > 0
  assert summary["versions"]["jax"] == jax.__version__
  epochs = records(finished, "epoch")
  assert [r["epoch"] for r in epochs] == [1, 2, 3]
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
  config = small_config(source, epochs=30)
  config.method = "scratch"
  config.data.per_class = 20
  summary = experiment.train_and_evaluate(config, tmp_path)
  losses = [r["train_loss"] for r in records(tmp_path, "epoch")]
  assert losses[-1] < 0.5 * losses[0]
  assert summary["test_accuracy"] > 0.5  # Chance is 0.1.


class Killed(Exception):
  pass


def test_a_run_that_is_cut_off_ends_bit_equal(
  source, finished, tmp_path, monkeypatch
):
  config = small_config(source)
  write = logs.MetricsLog.write

  def killed_in_epoch_3(self, kind, step, values):
    if values["epoch"] == 3:
      raise Killed
    write(self, kind, step, values)

  with monkeypatch.context() as patch:
    patch.setattr(logs.MetricsLog, "write", killed_in_epoch_3)
    with pytest.raises(Killed):
      experiment.train_and_evaluate(config, tmp_path)
  # What a crash can leave behind: a half-written record.
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "st')
  assert not (tmp_path / "summary.json").exists()
  resumed = experiment.train_and_evaluate(config, tmp_path)
  whole = json.loads((finished / "summary.json").read_text())
  for name in ("val_accuracy", "test_accuracy", "best_epoch", "split_hash"):
    assert resumed[name] == whole[name]
  assert records(tmp_path, "train") == records(finished, "train")
  assert records(tmp_path, "epoch") == records(finished, "epoch")
  ours, theirs = (
    safetensors.numpy.load_file(folder / "target.safetensors")
    for folder in (tmp_path, finished)
  )
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name])


def test_the_same_command_again_says_that_it_is_complete(
  source, finished, capsys
):
  before = (finished / "metrics.jsonl").read_bytes()
  experiment.train_and_evaluate(small_config(source), finished)
  assert "nothing to do" in capsys.readouterr().out
  assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_of_another_config_is_refused(source, finished):
  config = small_config(source)
  config.transfer.beta = 9.0
  message = r"transfer.beta was 2.0, is 9.0; use another --workdir"
  with pytest.raises(types.InputError, match=message):
    experiment.train_and_evaluate(config, finished)


def test_four_devices_compute_what_one_does(source, finished, tmp_path):
  """The batch statistics and the losses are those of the whole batch."""
  program = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 4)
from l2t_jax import experiment
from tests import test_experiment
config = test_experiment.small_config(sys.argv[1])
experiment.train_and_evaluate(config, sys.argv[2])
assert jax.device_count() == 4
"""
  subprocess.run(
    [sys.executable, "-c", program, str(source), str(tmp_path)],
    check=True,
    capture_output=True,
    cwd=ROOT,
  )
  one, four = records(finished, "train"), records(tmp_path, "train")
  for ours, theirs in zip(four, one, strict=True):
    for name in ("loss", "target_loss", "outer_loss", "meta_grad_norm"):
      np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-2)
  first = four[0]["loss"], one[0]["loss"]
  np.testing.assert_allclose(*first, rtol=1e-4)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("epochs", 0, "config.epochs is 0; it must be at least 1"),
    ("bilevel.num_inner_steps", 0, "config.bilevel.num_inner_steps is 0"),
    ("optimizer.momentum", 1.0, "at least 0 and less than 1"),
    ("precision", "f16", "'f16'; it must be one of f32, tf32, bf16"),
    ("method", "l2t", "config.method is 'l2t'; it must be one of scratch"),
    ("target.model", "vgg", "config.target.model is 'vgg'"),
    ("bilevel.mode", "fast", "one of reverse, remat, mixed"),
    ("source.weights", "", "needs config.source.weights"),
    ("source.weights", "nowhere.safetensors", "no source weights at nowhere"),
    ("transfer.pairs", "a->conv1", "unknown source tap 'a'"),
    ("data.name", "letters", "letters"),
    ("data.name", "", "source 'bundled' needs data.name"),
    ("data.val_fraction", 0.0, "no validation images"),
    ("data.image_size", 4, "maps of 1x1 are too small for a max-pool of 2x2"),
    ("optimizer.learning_rate", 1e30, "is (nan|inf) within the iterations"),
    ("batch_size", 51, "51"),
  ],
)
def test_a_wrong_value_is_named(source, tmp_path, field, value, message):
  config = small_config(source)
  with config.ignore_type():
    config.update_from_flattened_dict({field: value})
  with pytest.raises(types.InputError, match=message) as error:
    experiment.train_and_evaluate(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  if field != "optimizer.learning_rate":
    # A corrected command can use the same folder.
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=configs/nope.py"], "No such file or directory"),
    (
      ["--config=configs/digits.py", "--config.source.wieghts=x"],
      "unknown field config.source.wieghts; did you mean config.source.weights",
    ),
    (
      ["--config=configs/digits.py", "--config.epochs=ten"],
      "flag --config.epochs=ten: invalid literal",
    ),
    (["--config=configs/digits.py", "x=1"], "unexpected argument 'x=1'"),
    ([], "flag --config"),
    (
      [
        "--config=configs/stl10.py",
        "--config.method=scratch",
        "--config.data.source=folder",
        "--config.data.path=/nowhere",
      ],
      "/nowhere",
    ),
  ],
)
def test_a_wrong_command_is_one_line(tmp_path, arguments, message):
  result = run_train(*arguments, f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.startswith("error: ")
  assert result.stderr.count("\n") == 1


def test_a_wrong_field_in_a_config_file(tmp_path):
  config = tmp_path / "mine.py"
  config.write_text(
    "from configs import digits\n"
    "def get_config():\n"
    "  config = digits.get_config()\n"
    "  with config.unlocked():\n"
    "    config.data.per_clas = 5\n"
    "  return config\n"
  )
  result = run_train(f"--config={config}", f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 2
  assert result.stderr.startswith("error: unknown field config.data.per_clas;")


def test_a_wrong_tap_is_named(source, tmp_path):
  config = small_config(source)
  config.transfer.pairs = ""
  config.source.taps = ("stage9",)
  message = "unknown tap 'stage9'; the network's taps are stage1_block1"
  with pytest.raises(types.InputError, match=message):
    experiment.train_and_evaluate(config, tmp_path)


def test_a_target_becomes_a_source(source, finished, tmp_path):
  """Of another architecture than the first source, and for another target."""
  config = small_config(finished / "target.safetensors", epochs=1)
  config.method = "fm_single"
  config.target.model = "resnet_tiny"
  config.transfer.pairs = ""
  experiment.train_and_evaluate(config, tmp_path)
  content = json.loads((tmp_path / "transfer_map.json").read_text())
  pair = content["pairs"][0]
  assert (pair["source"], pair["target"]) == ("conv3", "stage3_block1")
  assert content["fixed"]


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


def test_a_folder_without_images(tmp_path):
  (tmp_path / "images" / "cat").mkdir(parents=True)
  result = run_train(
    "--config=configs/stl10.py",
    "--config.method=scratch",
    "--config.data.source=folder",
    f"--config.data.path={tmp_path / 'images'}",
    f"--workdir={tmp_path / 'run'}",
  )
  assert result.returncode == 2
  assert result.stderr.startswith("error: ")
  assert result.stderr.count("\n") == 1
  assert "images" in result.stderr


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
  result = run_train(
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


def test_workdir_in_the_place_of_a_file(source, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(types.InputError, match="cannot use --workdir="):
    experiment.train_and_evaluate(small_config(source), tmp_path / "file")


def test_configs_are_complete():
  """Each experiment has the default's fields, no more and no fewer."""
  names = [path.stem for path in (ROOT / "configs").glob("[!_]*.py")]
  assert len(names) > 10
  fields = set(experiment._flatten(default.get_config().to_dict()))
  for name in names:
    config = importlib.import_module(f"configs.{name}").get_config()
    assert set(experiment._flatten(config.to_dict())) == fields
    if name != "default":
      build.check(config)


def test_lists_of_methods_agree():
  """What the default config says are the methods that there are."""
  comment = (ROOT / "configs" / "default.py").read_text().split("config.method")
  for method in objectives.METHODS:
    assert re.search(rf"\b{method}\b", comment[0]), method


@pytest.mark.parametrize(
  "method", ["lwf", "at", "lwf_at", "fm_all_to_all", "kd", "finetune"]
)
def test_a_method_is_switched_by_its_name_alone(source, tmp_path, method):
  config = small_config(source, epochs=1)
  config.method = method
  config.transfer.pairs = ""
  config.data.image_size = 16
  if method == "finetune":  # Needs the source's architecture.
    config.target.model = "resnet_tiny"
  summary = experiment.train_and_evaluate(config, tmp_path)
  assert summary["method"] == method
  (record,) = records(tmp_path, "epoch")
  losses = {
    "lwf": {"lwf"},
    "at": {"attention"},
    "lwf_at": {"lwf", "attention"},
    "fm_all_to_all": {"matching"},
    "kd": {"kd"},
    "finetune": set(),
  }[method]
  assert {n for n in LOSSES if f"train_{n}_loss" in record} == losses
  total = sum(record[f"train_{name}_loss"] for name in ("target", *losses))
  np.testing.assert_allclose(record["train_loss"], total, rtol=1e-4)
  assert (tmp_path / "transfer_map.json").exists() == ("matching" in losses)


LOSSES = ("matching", "attention", "lwf", "kd")


def test_fine_tuning_starts_from_the_source(source):
  config = small_config(source)
  config.method = "finetune"
  config.target.model = "resnet_tiny"
  config.data.image_size = 16
  run = build.build(config)
  state = run.create_state(0)
  variables, _ = pretrained.load(source)
  chex.assert_trees_all_equal(state.inner.params["target"], variables["params"])
  chex.assert_trees_all_equal(
    state.inner.model_state["batch_stats"], variables["batch_stats"]
  )
  # Of other classes: the classifier alone starts afresh.
  config.data.classes = (1, 2, 3)
  config.batch_size = 15
  run = build.build(config)
  state = run.create_state(0)
  assert run.notes[-1].endswith("afresh: params/fc/bias, params/fc/kernel")
  params = state.inner.params["target"]
  chex.assert_trees_all_equal(params["block1"], variables["params"]["block1"])
  assert params["fc"]["kernel"].shape == (64, 3)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"method": "finetune"},
      "fine-tuning needs a source of the target's architecture, but only",
    ),
    (
      {"method": "kd", "data.classes": (0, 1, 2), "batch_size": 15},
      "the source has 10, the data have 3; use 'lwf'",
    ),
    ({"lwf.temperature": 0.0}, "config.lwf.temperature is 0.0; it must be"),
    ({"meta.update_every": 0}, "config.meta.update_every is 0"),
    ({"transfer.pair_activation": "gelu"}, "one of relu6, relu, softplus"),
    ({"bilevel.look_ahead_loss": "sum"}, "one of auxiliary, total"),
    ({"optimizer.schedule": "linear"}, "one of cosine, step"),
    ({"method": "at", "transfer.map": "x.json"}, "'at' matches no features"),
    ({"transfer.map": "nowhere.json"}, "nowhere.json"),
    ({"source.mean": (0.1, 0.2)}, "of 1 channels; set its field mean to 1"),
    ({"data.unlabeled_path": "images"}, "unlabeled"),
  ],
)
def test_values_that_do_not_fit_together(source, tmp_path, fields, message):
  config = small_config(source)
  with config.ignore_type():
    config.update_from_flattened_dict(fields)
  with pytest.raises(types.InputError, match=re.escape(message)) as error:
    experiment.train_and_evaluate(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "config.json").exists()


def test_two_sources_with_formats_of_their_own(source, finished, tmp_path):
  """Two architectures, sizes and normalisations; RGB images, grey sources."""
  config = small_config(source, epochs=1)
  config.source.weights = ""
  config.sources.digits = default.source()
  config.sources.digits.weights = str(source)
  config.sources.digits.image_size = 16
  config.sources.mnist = default.source()
  config.sources.mnist.weights = str(finished / "target.safetensors")
  config.data.channels = 3
  config.transfer.pairs = "single"
  run = build.build(config)
  assert [pair.name for pair in run.pairs] == [
    "digits/stage3_block1->conv3",
    "mnist/conv3->conv3",
  ]
  assert run.source_taps["digits/stage3_block1"] == (4, 4, 64)
  assert run.source_taps["mnist/conv3"] == (2, 2, 64)
  # A source sees what it was trained on.
  batch = next(run.dataset.train_batches(0))
  network = build._load_source(
    config.sources.mnist, run.image_format, None, "mnist"
  )
  seen, *_ = network.apply_fn(*network.variables, batch.images, train=False)
  red_green_blue = jnp.array([0.299, 0.587, 0.114])
  grey = jnp.sum(batch.images * red_green_blue, axis=-1, keepdims=True)
  module, *variables = pretrained.load_network(
    finished / "target.safetensors", (8, 8, 1)
  )
  alone, *_ = models.as_apply_fn(module)(*variables, grey, train=False)
  np.testing.assert_allclose(seen, alone, rtol=1e-3, atol=1e-4)
  experiment.train_and_evaluate(config, tmp_path)
  content = json.loads((tmp_path / "transfer_map.json").read_text())
  assert set(content["source_shares"]) == {"digits", "mnist"}
  np.testing.assert_allclose(sum(content["source_shares"].values()), 1)


def test_a_reused_map_is_frozen_and_costs_no_look_ahead(source, tmp_path):
  config = small_config(source, epochs=1)
  config.method = "fm_single"
  config.transfer.pairs = ""
  config.log_every = 1
  experiment.train_and_evaluate(config, tmp_path / "fixed")
  config.method = "l2t_ww"
  config.transfer.map = str(tmp_path / "fixed" / "transfer_map.json")
  experiment.train_and_evaluate(config, tmp_path / "reused")
  fixed, reused = (
    records(tmp_path / name, "train") for name in ("fixed", "reused")
  )
  # The same weights, seed and pairs: the same loss, from step 0 on.
  for ours, theirs in zip(reused, fixed, strict=True):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
  assert "outer_loss" not in reused[0]
  # A map's weights are what the loss is weighted with.
  content = json.loads((tmp_path / "fixed" / "transfer_map.json").read_text())
  content["pairs"][0]["pair_weight"] = 3.0
  edited = tmp_path / "edited.json"
  edited.write_text(json.dumps(content))
  config.transfer.map = str(edited)
  experiment.train_and_evaluate(config, tmp_path / "edited")
  first = records(tmp_path / "edited", "train")[0]
  np.testing.assert_allclose(
    first["matching_loss"], 3 * fixed[0]["matching_loss"], rtol=1e-4
  )


def test_meta_updates_now_and_then(source, finished, tmp_path):
  config = small_config(source, epochs=1)
  config.log_every = 1
  config.meta.update_every = 2
  experiment.train_and_evaluate(config, tmp_path)
  steps = records(tmp_path, "train")
  assert ["outer_loss" in record for record in steps] == [
    step % 2 == 0 for step in range(len(steps))
  ]
  assert len(steps) == 3
  # The target itself trains in every iteration.
  assert "train_outer_loss" in records(tmp_path, "epoch")[0]


def test_images_without_labels(source, tmp_path):
  config = small_config(source, epochs=1)
  config.method = "fm_single"
  config.transfer.pairs = ""
  experiment.train_and_evaluate(config, tmp_path / "without")
  config.data.unlabeled = True
  config.data.unlabeled_batch_size = 24
  summary = experiment.train_and_evaluate(config, tmp_path / "with")
  assert summary["num_unlabeled"] == 5000 - 2 * 100 - 50
  assert summary["num_train"] == 50
  ours, theirs = (
    records(tmp_path / name, "train")[0] for name in ("with", "without")
  )
  assert ours["matching_loss"] != theirs["matching_loss"]
  # A method that transfers nothing never opens them.
  config.method = "scratch"
  summary = experiment.train_and_evaluate(config, tmp_path / "scratch")
  assert summary["num_unlabeled"] == 0


def test_seeds_train_together_as_alone(source, tmp_path, monkeypatch):
  """Killed and resumed together, too."""
  config = small_config(source, epochs=2)
  config.method = "fm_single"
  config.transfer.pairs = ""
  config.log_every = 1
  for seed in (0, 1):
    config.seed = seed
    experiment.train_and_evaluate(config, tmp_path / f"alone{seed}")
  workdirs = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
  write = logs.MetricsLog.write

  def killed_in_epoch_2(self, kind, step, values):
    if values["epoch"] == 2:
      raise Killed
    write(self, kind, step, values)

  with monkeypatch.context() as patch:
    patch.setattr(logs.MetricsLog, "write", killed_in_epoch_2)
    with pytest.raises(Killed):
      experiment.train_together(config, workdirs)
  summaries = experiment.train_together(config, workdirs)
  for seed, summary in zip((0, 1), summaries, strict=True):
    assert summary["seed"] == seed
    assert summary["seeds_together"] == 2
    ours = records(workdirs[seed], "train")
    alone = records(tmp_path / f"alone{seed}", "train")
    assert [r["step"] for r in ours] == [r["step"] for r in alone]
    # float32 drifts apart; test_training.py compares in float64.
    for one, other in zip(ours, alone, strict=True):
      np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-2)
    np.testing.assert_allclose(ours[0]["loss"], alone[0]["loss"], rtol=1e-5)
    assert (workdirs[seed] / "target.safetensors").exists()
