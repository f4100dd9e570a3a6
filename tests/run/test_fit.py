"""The interface for notebooks: arrays and networks in, a trained target out."""

import functools

from flax import linen as nn
from flax import nnx
import jax
import matplotlib.figure
import numpy as np
import pytest
from sklearn import datasets

from examples import networks, tasks
from l2t_jax import errors, models, types
from l2t_jax.data import from_arrays, splits
from l2t_jax.models import weight_files
from l2t_jax.run import compare, experiments, fit, loop, predictor, sources
from l2t_jax.run import setup as setups
from tests.support import bad_input

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def arrays():
  digits = datasets.load_digits()
  images = np.uint8(digits.images * 15)
  return {
    "x_train": images[:500],
    "y_train": digits.target[:500],
    "x_val": images[500:600],
    "y_val": digits.target[500:600],
    "x_test": images[600:1000],
    "y_test": digits.target[600:1000],
  }


def small_config(method, epochs):
  config = fit.default_config()
  config.method = method
  config.epochs = epochs
  config.batch_size = 50
  config.optimizer.learning_rate = 0.05
  config.bilevel.num_inner_steps = 1
  config.data.augment = "none"
  return config


def test_a_field_that_does_not_exist():
  config = fit.default_config()
  config.optimizer.warmup = 1
  with pytest.raises(
    errors.InputError, match=r"unknown field config\.optimizer"
  ):
    fit.fit(None, {"x_train": np.zeros((4, 8, 8))}, config=config)


def test_methods_are_compared_seed_by_seed(arrays, tmp_path, monkeypatch):
  network = networks.NnxConvNeXt(10, 1, rngs=nnx.Rngs(0))
  again = functools.partial(
    compare.compare,
    lambda rngs: networks.NnxConvNeXt(10, 1, rngs=rngs),
    arrays,
    source=experiments.Source(network),
    methods=("scratch", "linear_probe"),
    config=small_config("l2t_ww", 2),
    workdir=tmp_path,
  )
  comparison = again(seeds=np.array([3, 5]))
  (difference,) = comparison.differences.values()
  tests = {
    (cell.method, summary["seed"]): summary["test_accuracy"]
    for cell in comparison.cells
    for summary in cell.summaries
  }
  by_hand = [
    100 * (tests["linear_probe", seed] - tests["scratch", seed])
    for seed in (3, 5)
  ]
  assert difference.values == pytest.approx(by_hand)
  assert difference.mean == pytest.approx(np.mean(by_hand))
  assert "| method | test % | validation % | minus scratch |" in (
    comparison._repr_markdown_()
  )
  assert len(comparison.figure().axes) == 1
  target = predictor.load(
    tmp_path / "scratch" / "seed5",
    networks.NnxConvNeXt(10, 1, rngs=nnx.Rngs(0)),
  )
  accuracy = np.mean(
    target.outputs(arrays["x_test"][..., None]).argmax(-1) == arrays["y_test"]
  )
  assert tests["scratch", 5] == pytest.approx(accuracy)
  # What is done is not trained again.
  monkeypatch.setattr(loop.Loop, "train", None)
  assert again(seeds=(3, 5)).cells == comparison.cells


def test_a_method_that_diverges_is_left_out(arrays, tmp_path):
  config = small_config("scratch", 1)
  config.lwf.weight = 3e38
  comparison = compare.compare(
    models.create("vgg_tiny", 10),
    arrays,
    source=experiments.Source(networks.NnxConvNeXt(10, 1, rngs=nnx.Rngs(0))),
    methods=("lwf", "scratch"),
    reference="scratch",
    seeds=2,
    config=config,
    workdir=tmp_path,
  )
  diverged, trained = comparison.cells
  assert not diverged.summaries
  assert [text[:25] for text in diverged.errors] == [
    "seed 0: iteration 1: not ",
    "seed 1: iteration 1: not ",
  ]
  assert [summary["seed"] for summary in trained.summaries] == [0, 1]
  assert comparison.differences == {}
  assert "lwf, seed 1: iteration 1: not finite" in comparison.table()
  comparison.figure()


@pytest.mark.parametrize(
  ("methods", "reference", "message"),
  [
    ((), "", "give at least two different methods"),
    ("kd", "", r"methods are \('kd',\)"),
    (("kd",), "", "give at least two different methods"),
    (("kd", "kd"), "", "give at least two different methods"),
    (("kd", "lwf"), "scratch", "the reference is 'scratch'"),
    (("kd", "l2t"), "", "unknown method 'l2t'"),
    (("fm_single", "fm_all_to_all"), "", "fm_all_to_all are the same"),
  ],
)
def test_what_cannot_be_compared(arrays, methods, reference, message):
  config = fit.default_config()
  config.transfer.pairs = "nearest"
  with pytest.raises(errors.InputError, match=message):
    compare.compare(
      None, arrays, methods=methods, reference=reference, config=config
    )


@pytest.mark.parametrize("seeds", [0, (), (1, 1)])
def test_seeds_that_cannot_be_compared(arrays, seeds):
  with pytest.raises(errors.InputError, match="give at least one, each once"):
    compare.compare(None, arrays, methods=("kd", "lwf"), seeds=seeds)


def test_what_does_not_fit_is_known_before_anything_is_trained(
  arrays, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop.Loop, "train", None)
  with pytest.raises(errors.InputError, match="does not name its 10 classes"):
    compare.compare(
      models.create("vgg_tiny", 10),
      arrays,
      methods=("scratch", "kd"),
      source=experiments.Source(networks.NnxConvNeXt(10, 1, rngs=nnx.Rngs(0))),
      seeds=np.int64(1),
      config=small_config("scratch", 1),
      workdir=tmp_path,
    )


@pytest.mark.parametrize("method", ["linear_probe", "finetune_source"])
def test_a_source_in_place_of_a_target(arrays, method):
  """Its predictions are those that were evaluated."""
  network = networks.NnxConvNeXt(10, 1, rngs=nnx.Rngs(0))
  trained = fit.fit(
    networks.NnxConvNeXt(10, 1, rngs=nnx.Rngs(1)),
    arrays,
    source=experiments.Source(network),
    config=small_config(method, 2),
  )
  predicted = trained.predict(arrays["x_test"]).argmax(-1)
  accuracy = np.mean(predicted == arrays["y_test"])
  assert trained.summary["test_accuracy"] == pytest.approx(accuracy)
  assert trained.transfer_map is None


def test_a_target_learns_from_a_source(arrays, tmp_path):
  network = networks.NnxConvNeXt(10, 1, rngs=nnx.Rngs(0))
  trained = fit.fit(network, arrays, config=small_config("scratch", 10))
  assert trained.summary["test_accuracy"] > 0.6
  with pytest.raises(errors.InputError, match="'scratch' has no transfer map"):
    trained.figure()
  source = trained.as_source(taps="stages/*")
  assert source.mean == trained.predictor.image_format.mean
  result = fit.fit(
    networks.ConvNeXt(10),
    arrays,
    source=source,
    config=small_config("l2t_ww", 5),
    workdir=tmp_path,
  )
  assert result.summary["test_accuracy"] > 0.4
  assert isinstance(result.figure(), matplotlib.figure.Figure)
  pairs = {(p["source"], p["target"]) for p in result.transfer_map["pairs"]}
  assert pairs == {
    (f"stages/{m}", f"stage{n}_0") for m in range(3) for n in range(2)
  }
  logits = result.predict(arrays["x_test"], batch_size=150)
  assert logits.shape == (400, 10)
  accuracy = np.mean(logits.argmax(axis=-1) == arrays["y_test"])
  assert accuracy == pytest.approx(result.summary["test_accuracy"], abs=1e-6)
  assert result.predict(arrays["x_test"][:0]).shape == (0, 10)
  with pytest.raises(errors.InputError, match=r"must be uint8 \[N, 8, 8, 1\]"):
    result.predict(arrays["x_test"] / 255)
  # The same folder with another source is another run.
  other = source._replace(
    params=jax.tree.map(lambda x: x + 1, trained.predictor.params)
  )
  with pytest.raises(errors.InputError, match=r"source.weights was"):
    fit.fit(
      networks.ConvNeXt(10),
      arrays,
      source=other,
      config=small_config("l2t_ww", 5),
      workdir=tmp_path,
    )


def test_what_predicts_is_compiled_once(arrays):
  network = models.create("vgg_tiny", 10)
  traced = []
  result = fit.fit(network, arrays, config=small_config("scratch", 1))
  as_apply_fn = models.as_apply_fn

  def counting(*args):
    apply_fn = as_apply_fn(*args)

    def count(params, model_state, images, **options):
      traced.append(images.shape)
      return apply_fn(params, model_state, images, **options)

    return count

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(models, "as_apply_fn", counting)
    for _ in range(2):  # Of 400 images, 100 are left for the last batch.
      result.predict(arrays["x_test"], batch_size=150)
  assert traced == [(150, 8, 8, 1)]


def _training_images(arrays):
  """Return which images `fit` does not take for validation and test."""
  fields = fit.default_config().data
  return splits.seeded_split(
    from_arrays.image_set(jax.tree.map(np.asarray, arrays), ""),
    val_fraction=fields.val_fraction,
    test_fraction=fields.test_fraction,
    seed=fields.split_seed,
  ).train


def test_mean_and_std_are_those_of_the_training_images():
  rng = np.random.default_rng(0)
  images = np.uint8(rng.integers(0, 256, (300, 8, 8, 3)) // [1, 2, 4])
  arrays = {"x_train": images, "y_train": np.arange(300) % 10}
  seen = {}
  for std in ((), (0.5,)):
    config = small_config("scratch", 1)
    config.data.std = std
    result = fit.fit(models.create("vgg_tiny", 10), arrays, config=config)
    seen[std] = result.predictor.image_format
  values = images[_training_images(arrays)] / 255
  for image_format in seen.values():
    expected = values.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(image_format.mean, expected, atol=1e-4)
  expected = values.std(axis=(0, 1, 2))
  np.testing.assert_allclose(seen[()].std, expected, atol=1e-4)
  assert seen[(0.5,)].std == (0.5,)


def test_what_differs_is_another_run(arrays, tmp_path):
  config = small_config("scratch", 1)
  fit.fit(
    models.create("vgg_tiny", 10), arrays, config=config, workdir=tmp_path
  )
  other = models.create("vgg_tiny", 11)
  with pytest.raises(errors.InputError, match=r"target.model was 'VGG"):
    fit.fit(other, arrays, config=config, workdir=tmp_path)


def test_a_file_that_changes_makes_another_run(arrays, tmp_path):
  """The same path is not enough: the run would be taken for complete."""
  target = models.create("vgg_tiny", 10)
  config = small_config("scratch", 1)
  config.data.split_file = str(tmp_path / "split.npz")

  config.data.split_prefix = "one"

  def train(num_train):
    parts = {"train": num_train, "val": range(200, 300), "test": range(400)}
    indices = {f"one_{name}": np.array(part) for name, part in parts.items()}
    np.savez(config.data.split_file, **indices)
    fit.fit(target, arrays, config=config, workdir=tmp_path / "run")

  train(range(100))
  train(range(100))
  with pytest.raises(errors.InputError, match=r"split_file .*holds other"):
    train(range(150))


def test_a_source_from_a_weight_file(arrays, tmp_path):
  bad_input.write_program()(tmp_path)
  result = fit.fit(
    models.create("vgg_tiny", 10),
    arrays,
    source=tmp_path / "source.safetensors",
    config=small_config("fm_single", 1),
  )
  (pair,) = result.transfer_map["pairs"]
  assert pair["source"] == "stem"
  with pytest.raises(errors.InputError, match="it was converted for 8"):
    sources.load_source(tmp_path / "source.safetensors", image_size=16)
  with pytest.raises(errors.InputError, match="precision is 'fp32'; it must"):
    sources.load_source(tmp_path / "source.safetensors", precision="fp32")


@pytest.mark.parametrize(
  ("source", "message"),
  [
    (
      experiments.Source(networks.ConvNeXt(10)),
      "source ConvNeXt has no params",
    ),
    ([1], "source is of type list; it must be a Source, the path"),
    ({"a/b": "x"}, "the name of a source is 'a/b'"),
    (
      experiments.Source(networks.ConvNeXt(10), {}, mean=(0.5,), std=(-1.0,)),
      r"std of the source .*\(-1.0,\); it must be finite and above 0",
    ),
    (
      experiments.Source(
        networks.ConvNeXt(10), {"head": {"bias": np.zeros(10)}}
      ),
      r"source on images of 8x8x1 does not fit.*missing, expected \[16\]",
    ),
  ],
)
def test_sources_that_cannot_be(arrays, source, message):
  with pytest.raises(errors.InputError, match=message):
    fit.fit(
      networks.ConvNeXt(10),
      arrays,
      source=source,
      config=small_config("fm_single", 1),
    )


@pytest.mark.parametrize(
  ("fields", "names", "message"),
  [
    ({"source.taps": ("a",)}, ("a", "b"), r"reads config\.source\.taps"),
    ({"sources": {"c": {}}}, ("a", "b"), r"sources\.c, because .* 'a', 'b'"),
    ({"sources": {"c": {}}}, (), r"sources\.c, because .* has no name"),
    ({"method": "linear_probe"}, ("a", "b"), "start from one source"),
    ({"method": "scratch", "init_from": "none"}, (), "no checkpoint in none"),
  ],
)
def test_what_is_refused_before_images_are_read(
  arrays, monkeypatch, fields, names, message
):
  network = experiments.Source(networks.convnext_nnx(10, rngs=nnx.Rngs(0)))
  source = dict.fromkeys(names, network) if names else network
  config = small_config("fm_single", 1)
  for name, value in fields.items():
    with config.ignore_type(), config.unlocked():
      config.update_from_flattened_dict({name: value})
  monkeypatch.setattr(setups, "_load_data", lambda _: 1 / 0)
  with pytest.raises(errors.InputError, match=message):
    fit.fit(networks.ConvNeXt(10), arrays, source=source, config=config)


def test_a_network_without_maps_learns(arrays):
  class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1))))

  result = fit.fit(MLP(), arrays, config=small_config("scratch", 10))
  assert result.summary["test_accuracy"] > 0.6


def test_distillation_reads_no_features(arrays):
  """A source of which none can be tapped will do."""

  class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(10)(x.reshape(x.shape[0], -1))

  params = Linear().init(jax.random.key(0), np.zeros((1, *SHAPE)))["params"]
  result = fit.fit(
    models.create("vgg_tiny", 10),
    arrays,
    source=experiments.Source(
      Linear(), params, class_names=tuple("0123456789")
    ),
    config=small_config("kd", 1),
  )
  assert np.isfinite(result.summary["val_accuracy"])


class Averaging(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(nn.Conv(4, (3, 3), name="conv")(x).mean((1, 2)))


def _averaging(**fields):
  params = Averaging().init(jax.random.key(0), np.zeros((1, *SHAPE)))["params"]
  return experiments.Source(Averaging(), params, **fields)


def test_the_fields_of_a_source_may_be_arrays(arrays):
  source = _averaging(
    image_size=np.int64(8),
    mean=np.array([0.5]),
    std=np.float32(0.25),
    bands=range(1),
    class_names=list(range(10)),
  )
  config = small_config("kd", 1)
  made = fit.make_experiment(
    Averaging(), arrays, source=source, config=config, task=None
  )
  plain = made.sources[""]
  assert (plain.mean, plain.std, plain.bands) == ((0.5,), (0.25,), (0,))
  assert plain.class_names == tuple("0123456789")
  with pytest.raises(errors.InputError, match="mean of the source is 'half'"):
    fit.fit(Averaging(), arrays, source=source._replace(mean="half"))


def test_half_a_normalisation_is_refused(arrays):
  source = _averaging(mean=(123.68,))
  with pytest.raises(errors.InputError, match=r"has a mean, .*, but no std"):
    fit.fit(
      Averaging(), arrays, source=source, config=small_config("fm_single", 1)
    )


def test_a_run_states_the_size_of_its_images(source):
  assert sources.load_source(source).image_size == 16


def test_a_run_where_float64_is_on(arrays, x64):
  network = nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(10)])
  result = fit.fit(network, arrays, config=small_config("scratch", 1))
  assert result.summary["epochs"] == 1


def test_a_run_says_that_batch_statistics_stay(arrays, capsys):
  network = nn.Sequential(
    [lambda x: x.mean((1, 2)), nn.BatchNorm(True), nn.Dense(10)]
  )
  fit.fit(network, arrays, config=small_config("scratch", 1))
  assert "does not update the target's batch stat" in capsys.readouterr().out


def test_too_few_outputs(arrays):
  with pytest.raises(errors.InputError, match=r"\['B', 2\].*have 10 classes"):
    fit.fit(
      models.create("vgg_tiny", 2), arrays, config=small_config("scratch", 1)
    )


def test_tasks_of_ones_own(arrays, capsys):
  ink = {
    "x_train": arrays["x_train"],
    "t_train": np.int32(arrays["x_train"] > 120),
  }
  task = tasks.INK._replace(loss=functools.partial(tasks.INK.loss))
  result = fit.fit(
    tasks.Segmenter(), ink, task=task, config=small_config("scratch", 4)
  )
  accuracy = result.summary["test_accuracy"]
  assert accuracy > 0.6
  said = capsys.readouterr().out
  assert f"test {accuracy:.4g})" in said and "%" not in said
  assert result.predict(ink["x_train"]).shape == (500, 8, 8)
  assert result.predictor.class_names == ("0",)  # Its targets are no classes.


def test_classes_that_are_given_as_targets(arrays, tmp_path):
  """They have no names, but are predicted."""
  targets = {"x_train": arrays["x_train"], "t_train": arrays["y_train"]}
  result = fit.fit(
    models.create("vgg_tiny", 10), targets, config=small_config("scratch", 1)
  )
  assert result.predictor.class_names == tuple("0123456789")


def test_the_white_of_a_source_is_that_of_its_images(arrays, tmp_path):
  """Else it would see pixels that are scaled by a power of two."""
  deep = lambda scale: {
    name: np.uint16(array) * scale if name[0] == "x" else array
    for name, array in arrays.items()
  }
  network = models.create("vgg_tiny", 10)
  first = fit.fit(network, deep(60), config=small_config("scratch", 1))
  fm = small_config("fm_single", 1)
  again = lambda source, images: fit.fit(
    network, images, source=source, config=fm
  )
  again(first.as_source(), deep(60))
  message = r"16383 was white .*, but 1023 is .*mean and std to 4\.\d+ and 5\."
  with pytest.raises(errors.InputError, match=message):
    again(first.as_source(), deep(4))
  variables, metadata = weight_files.load(first.workdir / "target.safetensors")
  file = tmp_path / "source.safetensors"
  weight_files.save(file, variables, metadata | {"model": "vgg_tiny"})
  with pytest.raises(errors.InputError, match="16383 was white"):
    again(file, deep(4))


@pytest.mark.parametrize(
  ("loss", "accuracy", "message"),
  [
    (
      lambda o, t: (o - t) ** 2,
      tasks.INK.accuracy,
      r"shape \[50, 8, 8\] for 50",
    ),
    (tasks.INK.loss, lambda o, t: (o > 0) == t, "one value per image"),
  ],
)
def test_tasks_that_cannot_be(arrays, loss, accuracy, message):
  ink = {"x_train": arrays["x_train"], "t_train": arrays["x_train"] / 255}
  with pytest.raises(errors.InputError, match=message):
    fit.fit(
      tasks.Segmenter(),
      ink,
      task=types.Task(loss, accuracy),
      config=small_config("scratch", 1),
    )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"x_train": np.zeros((500, 8, 6), np.uint8)}
      | dict.fromkeys(("x_val", "y_val", "x_test", "y_test")),
      "8x6; they must be square",
    ),
    ({"x_train": np.zeros((500, 8, 8))}, r"x_train is float64 \[500, 8, 8\]"),
    ({"y_val": None}, "lacks 'y_val'"),
    ({"t_train": np.zeros((500, 3))}, "only one of train and val has targets"),
  ],
)
def test_arrays_that_cannot_be(arrays, changes, message):
  changed = {k: v for k, v in (arrays | changes).items() if v is not None}
  with pytest.raises(errors.InputError, match=message):
    fit.fit(models.create("vgg_tiny", 10), changed)


def test_targets_need_a_task(arrays):
  changed = {"x_train": arrays["x_train"], "t_train": np.zeros((500, 3))}
  with pytest.raises(
    errors.InputError, match=r"float32 \['N', 3\].*target.task"
  ):
    fit.fit(
      models.create("vgg_tiny", 3), changed, config=small_config("scratch", 1)
    )


def test_maps_and_augmentation(arrays):
  changed = {"x_train": arrays["x_train"], "t_train": arrays["x_train"]}
  config = small_config("scratch", 1)
  config.data.augment = "crop"
  with pytest.raises(errors.InputError, match="not their targets"):
    fit.fit(tasks.Segmenter(), changed, task=tasks.INK, config=config)


def test_without_a_source_nothing_reads_images_without_labels(arrays):
  config = small_config("scratch", 1)
  config.data.unlabeled = True
  result = fit.fit(models.create("vgg_tiny", 10), arrays, config=config)
  assert result.summary["num_unlabeled"] == 0
