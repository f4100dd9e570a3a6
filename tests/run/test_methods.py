"""What a config can choose: methods, sources, data, frozen maps, seeds."""

import json
import re
import shutil

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from l2t_jax import errors, models, types
import l2t_jax.config
from l2t_jax.data import image_formats
from l2t_jax.method import objectives
from l2t_jax.models import weight_files
from l2t_jax.results import run_reader, tables
from l2t_jax.run import (
  experiments,
  from_config,
  predictor,
  sources,
  train,
  trainer,
)
from l2t_jax.run import setup as setups
from l2t_jax.runtime import sharding
from tests.support import small_runs

# Runs and their compiled steps are shared by the tests of one process.
pytestmark = pytest.mark.xdist_group("methods")
LOSSES = ("matching", "attention", "lwf", "kd", "aft")


def test_lists_of_methods_agree():
  """The comment above the field `method` explains each of the methods."""
  text = (small_runs.ROOT / "l2t_jax" / "config.py").read_text()
  _, begin, rest = text.partition("# How the target learns:")
  comment, end, _ = rest.partition('"method": Field(')
  assert begin
  assert end
  for method in objectives.METHODS:
    assert re.search(rf"^  # .*\b{method}\b", comment, re.MULTILINE), method


@pytest.mark.parametrize(
  "method",
  ["lwf", "at", "lwf_at", "kd", "finetune", "aft", "kd+at+l2t_w_one_to_one"],
)
def test_a_method_is_switched_by_its_name_alone(source, tmp_path, method):
  config = small_runs.small_config(source, epochs=1)
  config.method = method
  config.transfer.pairs = ""
  if method == "finetune":  # Needs the source's architecture.
    config.target.model = "resnet_tiny"
  summary = small_runs.train(config, tmp_path)
  assert summary["method"] == method
  (record,) = small_runs.records(tmp_path, "epoch")
  losses = {
    "lwf": {"lwf"},
    "at": {"attention"},
    "lwf_at": {"lwf", "attention"},
    "kd": {"kd"},
    "aft": {"aft"},
    "kd+at+l2t_w_one_to_one": {"kd", "attention", "matching"},
    "finetune": set(),
  }[method]
  assert {n for n in LOSSES if f"train_{n}_loss" in record} == losses
  total = sum(record[f"train_{name}_loss"] for name in ("target", *losses))
  np.testing.assert_allclose(record["train_loss"], total, rtol=1e-4)
  # Where nothing is matched, there is no map.
  has_map = (tmp_path / "transfer_map.json").exists()
  assert has_map == ("matching" in losses)


@pytest.mark.parametrize("method", ["afd", "l2t_ww_joint"])
def test_pair_weights_learned_with_the_target_have_a_map(
  source, tmp_path, method
):
  config = small_runs.small_config(source, epochs=2)
  config.method = method
  config.transfer.pairs = ""
  small_runs.train(config, tmp_path)
  first, last = small_runs.records(tmp_path, "epoch")
  assert first["pair_weights"] != last["pair_weights"]
  content = json.loads((tmp_path / "transfer_map.json").read_text())
  assert content["method"] == method
  assert not content["fixed"]
  assert content["channels_fixed"] == (method == "afd")
  assert (tmp_path / "transfer_map.png").exists()
  weights = [pair["pair_weight"] for pair in content["pairs"]]
  if method == "afd":  # They sum to 1 over the pairs of a source tap.
    assert content["maximum"] == 1
    assert sum(weights) == pytest.approx(len(content["source_taps"]))
  else:
    assert content["maximum"] == len(weights)
    assert sum(weights) == pytest.approx(len(weights))


def test_fine_tuning_starts_from_the_source(source):
  config = small_runs.small_config(source)
  config.method = "finetune"
  config.target.model = "resnet_tiny"
  config.data.image_size = 16
  run = setups.build(from_config.resolve(config))
  state = run.create_state(0)
  variables, _ = weight_files.load(source)
  chex.assert_trees_all_equal(state.inner.params["target"], variables["params"])
  chex.assert_trees_all_equal(
    state.inner.model_state["batch_stats"], variables["batch_stats"]
  )
  # Of other classes: the classifier alone starts afresh.
  config.data.classes = (1, 2, 3)
  config.batch_size = 15
  config.data.mean = (0.5,)
  run = setups.build(from_config.resolve(config))
  state = run.create_state(0)
  start, mean = run.notes[1:]
  assert start.endswith("afresh: params/fc/bias, params/fc/kernel")
  assert "mean of the images is (0.5,), but the source was trained wi" in mean
  params = state.inner.params["target"]
  chex.assert_trees_all_equal(params["block1"], variables["params"]["block1"])
  assert params["fc"]["kernel"].shape == (64, 3)
  other = run.create_state(1).inner.params["target"]  # And for each seed.
  assert (other["fc"]["kernel"] != params["fc"]["kernel"]).all()


@pytest.mark.parametrize("method", ["linear_probe", "finetune_source"])
def test_the_source_itself_can_be_trained(source, tmp_path, method):
  """In place of a target, with a new linear classifier."""
  config = small_runs.small_config(source, epochs=2)
  config.method = method
  config.transfer.pairs = ""
  config.source.mean, config.source.std = (0.4,), (0.3,)  # Not the target's.
  config.source.image_size = config.data.image_size  # Not that of its file.
  config.data.classes = (1, 2, 3)
  config.batch_size = 15
  summary = small_runs.train(config, tmp_path)
  before, _ = weight_files.load(source)
  after, metadata = weight_files.load(tmp_path / "target.safetensors")
  if method == "linear_probe":
    chex.assert_trees_all_equal(after["source"], before)
    statistics = after["classifier_stats"]
    assert (statistics["mean"] != 0).any()
    assert set(after["params"]) == {"classifier"}
  else:
    kernel = lambda params: params["block1"]["conv1"]["kernel"]
    trained = after["params"]["source"]
    assert (kernel(trained) != kernel(before["params"])).any()
    statistics = jax.tree.leaves(after["source"]["batch_stats"])
    moved = zip(statistics, jax.tree.leaves(before["batch_stats"]), strict=True)
    assert all((new != old).any() for new, old in moved)
  # The trained network, computed by hand, is the one that was evaluated.
  setup = setups.build(from_config.resolve(config))
  batches = list(setup.dataset.eval_batches("test"))
  images, labels = (
    np.concatenate([getattr(b, name)[b.mask > 0] for b in batches])
    for name in ("images", "labels")
  )
  network = weight_files.load_network(source).network
  if method == "linear_probe":
    params, state = before["params"], {"batch_stats": before["batch_stats"]}
  else:
    params, state = after["params"]["source"], after["source"]
  as_the_source = ((images * 0.3081 + 0.1307) - 0.4) / 0.3
  _, features, _ = models.as_apply_fn(network)(
    params, state, as_the_source, train=False
  )
  last = features[list(models.trace(network, images.shape[1:]).taps)[-1]]
  classifier = after["params"]["classifier"]
  pooled = last.mean((1, 2))
  if method == "linear_probe":
    statistics = after["classifier_stats"]
    pooled = (pooled - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
  logits = pooled @ classifier["kernel"] + classifier["bias"]
  accuracy = float((logits.argmax(-1) == labels).mean())
  assert summary["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
  assert metadata["num_classes"] == "3"
  # It can be used like any trained target, but not as a source.
  pixels = np.round(255 * (images * 0.3081 + 0.1307)).astype(np.uint8)
  outputs = predictor.load(tmp_path).outputs(pixels)
  np.testing.assert_allclose(outputs, logits, rtol=1e-3, atol=1e-3)
  with pytest.raises(errors.InputError, match="use the source's own weight"):
    weight_files.load_network(tmp_path / "target.safetensors")


def test_a_probe_finds_its_source_again(source, tmp_path):
  """Wherever it is now, but no other one in its place."""
  place = tmp_path / "source.safetensors"
  shutil.copy(source, place)
  config = small_runs.small_config(place, epochs=1)
  config.method, config.transfer.pairs = "linear_probe", ""
  small_runs.train(config, tmp_path / "run")
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
  outputs = predictor.load(tmp_path / "run").outputs(images)
  variables, metadata = weight_files.load(place)
  weight_files.save(place, variables, metadata | {"mean": "[0.9]"})
  with pytest.raises(errors.InputError, match="another file than the source"):
    predictor.load(tmp_path / "run")
  place.unlink()
  with pytest.raises(errors.InputError, match="is not there; give it"):
    predictor.load(tmp_path / "run")
  again = predictor.load(tmp_path / "run", source=source)
  np.testing.assert_array_equal(again.outputs(images), outputs)
  with pytest.raises(errors.InputError, match="source is of type int"):
    predictor.load(tmp_path / "run", source=3)
  other = models.create("vgg_tiny", 10)
  params, state = models.init(other, jax.random.key(0), (8, 8, 1))
  with pytest.raises(errors.InputError, match="does not fit its weights"):
    predictor.load(
      tmp_path / "run", source=experiments.Source(other, params, state)
    )


def test_test_images_can_be_left_alone(source, tmp_path, monkeypatch):
  evaluate = trainer.Trainer.evaluate
  seen = []

  def note(self, split):
    seen.append(split)
    return evaluate(self, split)

  monkeypatch.setattr(trainer.Trainer, "evaluate", note)
  config = small_runs.small_config(source, epochs=2)
  config.method = "scratch"
  config.evaluate_test = False
  summary = small_runs.train(config, tmp_path)
  assert seen == ["val", "val"]
  assert summary["test_accuracy"] is None
  records = small_runs.records(tmp_path, "epoch")
  assert not any("test_accuracy" in record for record in records)
  best = max(record["val_accuracy"] for record in records)
  assert summary["val_accuracy"] == best
  (run,) = run_reader.find_runs([tmp_path], ())
  assert run.best["val_accuracy"] == best
  (row,) = tables.run_rows([run])
  assert row["test"] == run_reader.UNKNOWN
  assert row["validation"] != run_reader.UNKNOWN


def test_a_probe_averages_features_in_float32(source):
  image_format = image_formats.ImageFormat(8, 1, (0.5,), (0.5,))
  traced = sources.trace_one(
    "", sources.load_source(source, precision="bf16"), image_format
  )
  network = sources.as_target(traced, 3, image_format, trains="classifier")
  images = jax.random.normal(jax.random.key(0), (32, *image_format.shape))
  params, state = network.init(jax.random.key(1))
  logits, _, after = network.apply(params, state, images, train=True)
  assert logits.dtype == jnp.float32
  tap = models.last_tap(traced.layout.taps)
  apply_source = traced.make_apply_fn({tap: tap}, image_format)
  variables = dict(state["source"])
  _, features, _ = apply_source(
    variables.pop("params"), variables, images, train=False
  )
  assert features[tap].dtype == jnp.bfloat16
  mean = np.asarray(features[tap], np.float64).mean((0, 1, 2))
  np.testing.assert_allclose(
    after["classifier_stats"]["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6
  )


class Noisy(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(4, (3, 3))(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    x = nn.Conv(4, (1, 1), name="last")(x)
    return nn.Dense(5)(jnp.mean(x, axis=(1, 2)))


@pytest.mark.parametrize("trains", ["classifier", "source"])
def test_groups_of_batch_norm_in_a_source_that_is_trained(trains):
  """Each has its own dropout; what is frozen stays as it is."""
  image_format = image_formats.ImageFormat(8, 1, (0.5,), (0.5,))
  trained = models.init(Noisy(), jax.random.key(0), image_format.shape)
  traced = sources.trace_one(
    "", experiments.Source(Noisy(), *trained), image_format
  )
  network = sources.as_target(traced, 3, image_format, trains=trains)
  params, state = network.init(jax.random.key(1))
  images = jax.random.normal(jax.random.key(2), (2, *image_format.shape))
  logits, _, after = models.as_apply_fn(network, (), batch_norm_groups=3)(
    params, state, jnp.concatenate([images] * 3), train=True
  )
  difference = float(jnp.abs(logits[:2] - logits[2:4]).max())
  if trains == "source":
    assert difference > 1e-3
  else:
    assert difference < 1e-5
    chex.assert_trees_all_equal(after["source"], state["source"])


def test_a_linear_probe_needs_one_source(source):
  config = small_runs.small_config(source)
  config.method = "linear_probe"
  config.transfer.pairs = ""
  config.source.weights = ""
  config.sources.one = default.source()
  config.sources.one.weights = str(source)
  setups.build(from_config.resolve(config))  # A named one will do.
  config.sources.two = default.source()
  config.sources.two.weights = str(source)
  with pytest.raises(errors.InputError, match="are 2: one, two"):
    setups.build(from_config.resolve(config))


@pytest.mark.parametrize(
  ("method", "split"),
  [("l2t_ww", False), ("l2t_ww", True), ("lwf_at", False), ("finetune", False)],
)
def test_shapes_are_those_of_the_first_state(source, method, split):
  """Programs are compiled for the shapes, and called with the state."""
  config = small_runs.small_config(source)
  config.method = method
  config.shard_params = split
  if method == "finetune":
    config.transfer.pairs = ""
    config.target.model = "resnet_tiny"
  run = setups.build(from_config.resolve(config))
  one = run.create_state(2**32 - 1)
  state, shapes = one, run.state_shapes
  for _ in range(2):
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    for name in ("weak_type", "sharding"):
      named = lambda leaf, name=name: getattr(leaf, name)
      assert jax.tree.map(named, state) == jax.tree.map(named, shapes)
    # And of several seeds.
    shapes = sharding.stacked(run.state_shapes, 2)
    together = trainer.Trainer(run, 2)
    other = run.create_state(0)
    together.start([one, other], run.sources)
    state = together._state
    chex.assert_trees_all_equal(together.state_of(1), other)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"lwf.temperature": 0.0}, "config.lwf.temperature is 0.0; it must be"),
    ({"meta.update_every": 0}, "config.meta.update_every is 0"),
    ({"transfer.pair_activation": "gelu"}, "one of relu6, relu, softplus"),
    ({"bilevel.look_ahead_loss": "sum"}, "one of auxiliary, total"),
    ({"optimizer.schedule": "linear"}, "one of cosine, step"),
    (
      {"optimizer.warmup_steps": 3, "optimizer.warmup_epochs": 1.0},
      "set only one of the two",
    ),
    ({"method": "at", "transfer.map": "x.json"}, "'at' has no pair weights"),
    (
      {"transfer.map": "x.json", "transfer.pair_weights": "constant"},
      "decides what config.transfer.pairs would; leave that at ''",
    ),
    ({"source.image_size": -3}, "config.source.image_size is -3"),
    ({"data.unlabeled_path": "images"}, "unlabeled"),
  ],
)
def test_values_that_do_not_fit_together(source, tmp_path, fields, message):
  config = small_runs.small_config(source)
  with config.ignore_type():
    config.update_from_flattened_dict(fields)
  with pytest.raises(errors.InputError, match=re.escape(message)) as error:
    small_runs.train(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"data.image_size": 224}, "random_resized_crop_flip"),
    ({"transfer.map": "x.json", "transfer.pairs": ""}, "x.json"),
  ],
)
def test_check_refuses_what_resolve_would(source, fields, message):
  config = small_runs.small_config(source)
  config.update_from_flattened_dict(fields)
  with pytest.raises(errors.InputError, match=message):
    from_config.check(config)


ANY_TARGETS = types.Task(
  lambda outputs, targets: jnp.mean(outputs),
  lambda outputs, targets: jnp.zeros(len(targets)),
)


@pytest.mark.parametrize(
  ("shape", "num_classes", "num_outputs", "outputs"),
  [
    ((), 0, 0, 1),
    ((1,), 0, 0, 1),
    ((4,), 4, 0, 4),
    ((4,), 0, 4, 4),
    ((4,), 0, 1, 1),  # What one output is compared with is the task's affair.
    ((4,), 0, 0, None),
    ((4,), 3, 0, None),
  ],
)
def test_outputs_of_a_task(shape, num_classes, num_outputs, outputs, tmp_path):
  """They are never fewer or more than the targets without being asked for."""
  arrays = {
    "x_train": np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8),
    "t_train": np.zeros((64, *shape), np.float32),
  }
  if num_classes:
    arrays["y_train"] = np.arange(64) % num_classes
  np.savez(tmp_path / "data.npz", **arrays)
  config = small_runs.small_config("")
  config.method = "scratch"
  config.data.source, config.data.path = "npz", str(tmp_path / "data.npz")
  config.data.per_class = 0
  config.data.val_fraction = config.data.test_fraction = 0.25
  config.target.num_outputs = num_outputs
  config.target.task = f"{__name__}:ANY_TARGETS"
  make = lambda: setups.build(from_config.resolve(config))
  if outputs:
    assert make().num_outputs == outputs
  else:
    with pytest.raises(errors.InputError, match=r"4 targets .*target\.num_out"):
      make()


def test_two_sources_with_formats_of_their_own(source, finished, tmp_path):
  """Two architectures, sizes and normalisations; RGB images, grey sources."""
  config = small_runs.small_config(source, epochs=1)
  config.source.weights = ""
  config.sources.digits = default.source()
  config.sources.digits.weights = str(source)
  config.sources.digits.image_size = 16
  config.sources.mnist = default.source()
  config.sources.mnist.weights = str(finished / "target.safetensors")
  config.sources.mnist.mean = (0.25,)
  config.data.channels = 3
  config.data.mean, config.data.std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
  config.transfer.pairs = "single"
  run = setups.build(from_config.resolve(config))
  assert [pair.name for pair in run.problem.pairs] == [
    "digits/stage3_block1->conv3",
    "mnist/conv3->conv3",
  ]
  assert run.source_taps["digits/stage3_block1"] == (4, 4, 64)
  assert run.source_taps["mnist/conv3"] == (2, 2, 64)
  # A source sees what it was trained on.
  batch = next(run.dataset.train_batches(0))
  seen, *_ = run.problem.source_fns["mnist"](
    *run.sources["mnist"], batch.images, train=False
  )
  # Its own mean as configured, its own deviation as its training recorded it.
  pixels = batch.images * jnp.array(config.data.std)
  pixels += jnp.array(config.data.mean)
  red_green_blue = jnp.array([0.299, 0.587, 0.114])
  grey = jnp.sum(pixels * red_green_blue, axis=-1, keepdims=True)
  grey = (grey - 0.25) / 0.3081
  module, *variables, _ = weight_files.load_network(
    finished / "target.safetensors"
  )
  alone, *_ = models.as_apply_fn(module)(*variables, grey, train=False)
  np.testing.assert_allclose(seen, alone, rtol=1e-3, atol=1e-4)
  small_runs.train(config, tmp_path)
  content = json.loads((tmp_path / "transfer_map.json").read_text())
  assert set(content["source_shares"]) == {"digits", "mnist"}
  np.testing.assert_allclose(sum(content["source_shares"].values()), 1)


def test_a_reused_map_is_frozen_and_costs_no_look_ahead(
  source, tmp_path, monkeypatch
):
  config = small_runs.small_config(source, epochs=1)
  config.method = "fm_single"
  config.transfer.pairs = ""
  config.log_every = 1
  small_runs.train(config, tmp_path / "fixed")
  config.method = "l2t_ww"
  config.transfer.map = str(tmp_path / "fixed" / "transfer_map.json")
  small_runs.train(config, tmp_path / "reused")
  fixed, reused = (
    small_runs.records(tmp_path / name, "train") for name in ("fixed", "reused")
  )
  # The same weights, seed and pairs: the same loss, from step 0 on.
  for ours, theirs in zip(reused, fixed, strict=True):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
  assert "outer_loss" not in reused[0]
  read = lambda name: json.loads(
    (tmp_path / name / "transfer_map.json").read_text()
  )
  assert [read(name)["frozen"] for name in ("fixed", "reused")] == [False, True]
  # A map's weights are what the loss is weighted with.
  content = read("fixed")
  content["pairs"][0]["pair_weight"] = 3.0
  edited = tmp_path / "edited.json"
  edited.write_text(json.dumps(content))
  config.transfer.map, config.epochs = str(edited), 2
  train_edited = lambda: small_runs.train(config, tmp_path / "edited")
  small_runs.kill_in_epoch(2, train_edited, monkeypatch)
  first = small_runs.records(tmp_path / "edited", "train")[0]
  np.testing.assert_allclose(
    first["matching_loss"], 3 * fixed[0]["matching_loss"], rtol=1e-4
  )
  # A run goes on with the map that it began with.
  content["pairs"][0]["pair_weight"] = 2.0
  edited.write_text(json.dumps(content))
  with pytest.raises(errors.InputError, match=r"transfer\.map .* other files"):
    train_edited()
  (tmp_path / "edited" / "contents.json").unlink()
  with pytest.raises(errors.InputError, match="the transfer map changed since"):
    train_edited()


def test_meta_updates_now_and_then(source, tmp_path):
  config = small_runs.small_config(source, epochs=1)
  config.log_every = 1
  config.meta.update_every = 2
  config.transfer.pairs = "stage3_block1->conv3"
  config.transfer.pair_activation = "softplus"
  small_runs.train(config, tmp_path)
  content = json.loads((tmp_path / "transfer_map.json").read_text())
  assert content["maximum"] is None
  steps = small_runs.records(tmp_path, "train")
  assert ["outer_loss" in record for record in steps] == [
    step % 2 == 0 for step in range(len(steps))
  ]
  assert len(steps) == 3
  # The target itself trains in every iteration.
  assert "train_outer_loss" in small_runs.records(tmp_path, "epoch")[0]


@pytest.mark.parametrize(
  ("fields", "learned"),
  [
    ({}, {"channel", "pair"}),
    ({"transfer.pair_weights": "constant"}, {"channel"}),
    ({"transfer.channel_weights": "uniform"}, {"pair"}),
  ],
)
def test_ablations_switch_off_what_is_learned(source, fields, learned):
  config = small_runs.small_config(source)
  config.update_from_flattened_dict(fields)
  run = setups.build(from_config.resolve(config))
  assert set(run.create_state(0).meta_params) == learned
  assert bool(run.update_every) == bool(learned)


def test_a_source_as_a_plain_dict_is_told_what_it_lacks(source):
  config = small_runs.small_config(source)
  config.source.weights = ""
  config.sources.mine = {"weights": str(source)}
  message = "lacks taps, image_size, mean, std, bands, class_names; start from"
  with pytest.raises(errors.InputError, match=message):
    l2t_jax.config.check(config)


def test_one_source_without_a_common_resolution_is_no_error(source):
  config = small_runs.small_config(source)
  config.source.weights = ""
  for name, size in (("small", 4), ("same", 16)):
    config.sources[name] = default.source()
    config.sources[name].weights = str(source)
    config.sources[name].image_size = size
  config.data.image_size = 16
  config.target.taps = ("conv1",)  # 16x16.
  config.transfer.pairs = "one_to_one"
  run = setups.build(from_config.resolve(config))
  assert [pair.name for pair in run.problem.pairs] == [
    "same/stage1_block1->conv1"
  ]


def test_images_without_labels(source, tmp_path):
  config = small_runs.small_config(source, epochs=1)
  config.method = "fm_single"
  config.transfer.pairs = ""
  small_runs.train(config, tmp_path / "without")
  config.data.unlabeled = True
  config.data.unlabeled_batch_size = 24
  summary = small_runs.train(config, tmp_path / "with")
  assert summary["num_unlabeled"] == 5000 - 2 * 100 - 50
  assert summary["num_train"] == 50
  ours, theirs = (
    small_runs.records(tmp_path / name, "train")[0]
    for name in ("with", "without")
  )
  assert ours["matching_loss"] != theirs["matching_loss"]
  # A method that transfers nothing never opens them.
  config.method = "scratch"
  summary = small_runs.train(config, tmp_path / "scratch")
  assert summary["num_unlabeled"] == 0


def test_validation_images_in_the_outer_loss(source, tmp_path, capsys):
  config = small_runs.small_config(source, epochs=1)
  assert not small_runs.train(config, tmp_path / "batch")[
    "trained_on_validation"
  ]
  config.bilevel.outer_images = "validation"
  note = "the outer loss reads validation images"
  assert note not in capsys.readouterr().out
  assert small_runs.train(config, tmp_path / "validation")[
    "trained_on_validation"
  ]
  assert note in capsys.readouterr().out
  ours, theirs = (
    small_runs.records(tmp_path / name, "train")[0]
    for name in ("validation", "batch")
  )
  assert ours["outer_loss"] != theirs["outer_loss"]
  # A method without a look-ahead does not read them.
  config.method, config.transfer.pairs = "fm_single", ""
  assert not small_runs.train(config, tmp_path / "fixed")[
    "trained_on_validation"
  ]
  assert note not in capsys.readouterr().out


def together_config(source):
  config = small_runs.small_config(source, epochs=2)
  config.bilevel.outer_images = "validation"
  config.transfer.pairs = "stage3_block1->conv3"
  config.meta.update_every = 2
  config.log_every = 1
  config.data.mixup = 0.8
  config.optimizer.ema_decay = 0.5
  return config


@pytest.mark.long
def test_seeds_train_together_as_alone(source, tmp_path, monkeypatch):
  """Killed and resumed together, too."""
  config = together_config(source)
  for seed in (0, 1):
    config.seed = seed
    small_runs.train(config, tmp_path / f"alone{seed}")
  workdirs = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
  train_once = lambda: from_config.train_and_evaluate(config, workdirs)
  small_runs.kill_in_epoch(2, train_once, monkeypatch)
  summaries = train_once()
  for seed, summary in zip((0, 1), summaries, strict=True):
    assert summary["seed"] == seed
    assert summary["seeds_together"] == 2
    ours = small_runs.records(workdirs[seed], "train")
    alone = small_runs.records(tmp_path / f"alone{seed}", "train")
    assert [r["step"] for r in ours] == [r["step"] for r in alone]
    # float32 drifts apart; test_training.py compares in float64.
    for one, other in zip(ours, alone, strict=True):
      assert one.keys() == other.keys()
      np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-2)
    np.testing.assert_allclose(ours[0]["loss"], alone[0]["loss"], rtol=1e-5)
    assert (workdirs[seed] / "target.safetensors").exists()


@pytest.mark.long
@pytest.mark.parametrize("method", ["linear_probe", "finetune_source"])
def test_seeds_of_the_source_train_together_as_alone(source, tmp_path, method):
  config = small_runs.small_config(source, epochs=1)
  config.method, config.transfer.pairs, config.log_every = method, "", 1
  for seed in (0, 1):
    config.seed = seed
    small_runs.train(config, tmp_path / f"alone{seed}")
  workdirs = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
  from_config.train_and_evaluate(config, workdirs)
  for seed, workdir in workdirs.items():
    ours, alone = (
      [record["loss"] for record in small_runs.records(folder, "train")]
      for folder in (workdir, tmp_path / f"alone{seed}")
    )
    np.testing.assert_allclose(ours, alone, rtol=1e-3)


def test_runs_in_turn_share_programs_and_nothing_else(
  source, tmp_path, monkeypatch
):
  config = together_config(source)
  config.method = "fm_single"
  config.seed = 1
  alone = small_runs.train(config, tmp_path / "alone")
  built, build = [], setups.build
  monkeypatch.setattr(
    setups, "build", lambda one: built.append(one) or build(one)
  )
  training = train.Training(from_config.resolve(config))
  for seed in (0, 1):
    (summary,) = training.run({seed: tmp_path / f"seed{seed}"})
  assert len(built) == 1
  for name in ("seed", "val_accuracy", "test_accuracy", "split_hash"):
    assert summary[name] == alone[name]
  ours, theirs = (
    weight_files.load(tmp_path / run / "target.safetensors")[0]
    for run in ("seed1", "alone")
  )
  chex.assert_trees_all_equal(ours, theirs)


def test_nothing_is_lost_where_seeds_cannot_train_together(
  source, tmp_path, monkeypatch
):
  """One is ahead; they do not fit; then they do, each from where it is."""
  config = together_config(source)
  config.method = "fm_single"
  workdirs = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
  train_one = lambda: small_runs.train(config, workdirs[0])
  small_runs.kill_in_epoch(2, train_one, monkeypatch)
  before = small_runs.records(workdirs[0], "epoch")
  assert [record["epoch"] for record in before] == [1]

  def does_not_fit(*_):
    raise trainer.DoesNotFit

  with monkeypatch.context() as patch:
    patch.setattr(trainer.Trainer, "compile", does_not_fit)
    with pytest.raises(trainer.DoesNotFit):
      from_config.train_and_evaluate(config, workdirs)
  assert small_runs.records(workdirs[0], "epoch") == before
  from_config.train_and_evaluate(config, workdirs)
  after = small_runs.records(workdirs[0], "epoch")
  assert after[0] == before[0]
  for workdir in workdirs.values():
    epochs = small_runs.records(workdir, "epoch")
    assert [record["epoch"] for record in epochs] == [1, 2]


def test_distillation_compares_classes_by_name(source, tmp_path):
  """A teacher whose classes have another order teaches the same."""
  losses = []
  variables, metadata = weight_files.load(source)
  order = np.random.default_rng(0).permutation(10)
  head = variables["params"]["fc"]
  for name, rows in (("own", np.arange(10)), ("other", order)):
    changed = {key: value[..., rows] for key, value in head.items()}
    file = tmp_path / f"{name}.safetensors"
    weight_files.save(
      file,
      variables | {"params": variables["params"] | {"fc": changed}},
      metadata | {"class_names": json.dumps([str(row) for row in rows])},
    )
    config = small_runs.small_config(file, epochs=1)
    config.method, config.transfer.pairs = "kd", ""
    small_runs.train(config, tmp_path / name)
    (record,) = small_runs.records(tmp_path / name, "epoch")
    losses.append(record["train_loss"])
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)
  # Wrong, but as one says; a command line gives numbers.
  config.source.class_names = tuple(range(10))
  small_runs.train(config, tmp_path / "said")
  (record,) = small_runs.records(tmp_path / "said", "epoch")
  assert abs(record["train_loss"] - losses[0]) > 1e-3
