"""Experiments of objects: no config is needed, and another one is refused."""

import json

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import networks
from l2t_jax import errors, models
from l2t_jax.method import loss_functions, objectives, training, transfer
from l2t_jax.run import experiments, fit, from_config, plan, train
from l2t_jax.run import predictor as predictors
from l2t_jax.run import setup as setups
from l2t_jax.runtime import compilation
from tests.support import object_experiment, small_runs

# They share a run, made by another process.
pytestmark = pytest.mark.xdist_group("objects")

_WITHOUT_CONFIGS = """
import sys
sys.modules["l2t_jax.config"] = None  # To import it is an error now.
from l2t_jax.run import train
from tests.support import object_experiment
train.train(object_experiment.create(), sys.argv[1])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of l2t_ww by a process that cannot import the configs."""
  workdir = tmp_path_factory.mktemp("objects")
  result = small_runs.run_python("-c", _WITHOUT_CONFIGS, workdir)
  assert result.returncode == 0, result.stderr
  return workdir


def test_no_config_is_needed(trained):
  summary = json.loads((trained / "summary.json").read_text())
  assert summary["method"] == "l2t_ww"
  assert 0 <= summary["test_accuracy"] <= 1
  epochs = small_runs.records(trained, "epoch")
  assert [record["epoch"] for record in epochs] == [1, 2]
  assert all(np.isfinite(record["val_loss"]) for record in epochs)
  weights = epochs[-1]["pair_weights"]
  assert len(weights) == 4 and all(w != 1 for w in weights.values())
  assert (trained / "transfer_map.json").exists()


def test_accuracies_are_those_of_the_saved_target(trained):
  experiment = object_experiment.create()
  predictor = predictors.load(trained, experiment.target)
  summary = json.loads((trained / "summary.json").read_text())
  best = small_runs.records(trained, "epoch")[summary["best_epoch"] - 1]
  for part, images in (
    ("val", experiment.images.train),  # Its last 8.
    ("test", experiment.images.test),
  ):
    logits = predictor.outputs(images.pixels[-8:], batch_size=5)
    labels = images.labels[-8:]
    accuracy = np.mean(logits.argmax(axis=-1) == labels)
    assert summary[f"{part}_accuracy"] == accuracy
    if part == "val":
      loss = loss_functions.cross_entropy(logits, labels)
      assert best["val_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_another_network_does_not_fit_a_run(trained):
  with pytest.raises(errors.InputError, match=r"is given for .* does not fit"):
    predictors.load(trained, lambda rngs: networks.convnext_nnx(3, rngs=rngs))


def _target_loss(setup, inner, batch):
  loss, _ = setup.problem.losses.target(
    inner.params,
    None,
    inner.model_state,
    objectives.TransferBatch(*batch[:2]),
  )
  return loss


def test_labels_are_smoothed_in_training_alone():
  experiment = object_experiment.create()
  target_fn = models.as_apply_fn(experiment.target, ())
  losses = []
  for smoothing in (0.0, 0.3):
    setup = setups.build(experiment._replace(label_smoothing=smoothing))
    state = setup.create_state(0)
    inner = state.inner
    batch = next(setup.dataset.train_batches(0))
    loss = _target_loss(setup, inner, batch)
    logits, *_ = target_fn(
      inner.params["target"], inner.model_state, batch.images, train=True
    )
    expected = loss_functions.cross_entropy(
      logits, batch.labels, smoothing=smoothing
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    evaluated = setup.eval_step(
      training.evaluated(state), next(setup.dataset.eval_batches("test"))
    )
    losses.append((float(loss), float(evaluated["loss"])))
  assert losses[0][0] != losses[1][0]
  assert losses[0][1] == losses[1][1]


def test_groups_of_batch_norm_reach_the_target(source):
  by_hand = object_experiment.create()._replace(batch_norm_groups=2)
  config = small_runs.small_config(source)
  config.transfer.pairs, config.target.batch_norm_groups = "", 2
  fitted = fit.make_experiment(
    by_hand.target,
    {
      "x_train": np.random.default_rng(0).random((400, 8, 8, 1), np.float32),
      "y_train": np.arange(400) % 4,
    },
    source=by_hand.sources,
    config=config,
    task=None,
  )
  for experiment in (by_hand, fitted, from_config.resolve(config)):
    setup = setups.build(experiment)
    inner = setup.create_state(0).inner
    batch = next(setup.dataset.train_batches(0))
    loss = _target_loss(setup, inner, batch)
    logits, *_ = models.as_apply_fn(experiment.target, (), 2)(
      inner.params["target"], inner.model_state, batch.images, train=True
    )
    expected = loss_functions.cross_entropy(logits, batch.labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_program_serves_all_learning_rates_and_weights():
  """So tuning them compiles nothing: the cache on disk holds the program."""
  experiment = object_experiment.create()
  scalars = jax.tree.map(lambda x: 2 * x, experiment.settings.scalars)
  other = experiment._replace(
    settings=experiment.settings.with_scalars(scalars)
  )
  programs = []
  for setup in map(setups.build, (experiment, other)):
    step = setups.jit_step(setup, setup.state_shapes, mode="mixed")
    lowered = step.lower(
      setup.state_shapes, setup.scalars, setup.sources, setup.blank_batch
    )
    programs.append(lowered.as_text())
  assert programs[0] == programs[1]
  assert setup.scalars.beta == 2 * experiment.settings.transfer.beta


def test_a_plan_counts_iterations_without_a_meta_update(monkeypatch):
  experiment = object_experiment.create()
  settings = experiment.settings
  meta = settings.meta._replace(update_every=3)
  times = iter([4.0, 1.0])
  monkeypatch.setattr(plan, "_time", lambda *_: next(times))
  planned = plan.make(
    experiment._replace(settings=settings._replace(meta=meta))
  )
  assert planned.seconds == (4.0 + 1.0 + 1.0) / 3


def test_a_plan_does_not_run_what_does_not_fit(monkeypatch, capsys):
  monkeypatch.setattr(plan, "_time", lambda *_: 1 / 0)
  monkeypatch.setattr(compilation, "memory_limit", lambda: 2**10)
  plan.show(plan.make(object_experiment.create()))
  assert "does not fit" in (printed := capsys.readouterr().out)
  assert printed.strip().endswith(
    "0 MiB: lower config.batch_size or config.data.image_size"
  )


def test_settings_become_a_recipe():
  """With optimizers that are told apart by a step or two of θ = 2."""
  usual = object_experiment.create().settings
  settings = usual._replace(
    epochs=4,
    bad_numbers="skip",
    optimizer=usual.optimizer._replace(
      learning_rate=0.5, momentum=0.8, weight_decay=0.1, clip_norm=1.0
    ),
    meta=experiments.Meta(
      0.01, weight_decay=0.1, clip_norm=0.0, update_every=1
    ),
    bilevel=experiments.Bilevel(3, "total", "batch", "mixed", "unroll"),
  )
  recipe = setups._make_recipe(settings, 5, "mixed")
  numbers = (recipe.num_inner_steps, recipe.look_ahead_loss, recipe.mode)
  assert numbers == (3, "total", "mixed")
  assert (recipe.rolled, recipe.skip_bad_numbers) == (False, True)
  rates = [recipe.learning_rate_fn(step) for step in (4, 5, 10)]
  halves = [(1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in (0, 1, 2)]
  np.testing.assert_allclose(rates, 0.5 * np.array(halves), rtol=1e-6)

  def moved(optimizer, *grads):
    param = jnp.array(2.0)
    state = optimizer.init(param)
    for grad in grads:
      updates, state = optimizer.update(jnp.array(grad), state, param)
      param += updates[()]
    return float(param)

  # Clipped to 1; buffers of 1 + 0.1 * 2 and 0.8 * 1.2 + 1 + 0.1 * 1.4.
  target = moved(recipe.optimizer_fn(0.5), 3.0, 3.0)
  assert target == pytest.approx(2 - 0.5 * 1.2 - 0.5 * 2.1)
  # Adam's first step has the sign of -0.1 + 0.1 * 2.
  assert moved(recipe.meta_optimizer, -0.1) == pytest.approx(2 - 0.01)


def test_the_same_experiment_is_complete(trained, capsys):
  summary = train.train(object_experiment.create(), trained)
  assert summary == json.loads((trained / "summary.json").read_text())
  assert "holds a complete run" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "field"),
  [
    ({"image_seed": 1}, "data.name"),
    ({"source_seed": 1}, "source.weights"),
    ({"num_classes": 5}, "target.model"),
    ({"beta": 0.7}, "transfer.beta"),
  ],
)
def test_another_experiment_is_refused(trained, changes, field):
  """Objects have no names: their contents tell them apart."""
  with pytest.raises(errors.InputError, match=f"{field} was .*, is "):
    train.train(object_experiment.create(**changes), trained)


def test_fields_that_are_free_may_change(trained):
  experiment = object_experiment.create()
  settings = experiment.settings._replace(log_every=7)
  changed = experiment._replace(settings=settings)
  with pytest.raises(errors.InputError, match="log_every was 5, is 7"):
    train.train(changed, trained)
  train.train(changed._replace(free_fields=("log_every",)), trained)


def test_a_description_is_that_of_a_config(trained):
  """A report or a table reads it as it reads the config of a file."""
  described = experiments.describe(object_experiment.create())
  assert described == json.loads((trained / "config.json").read_text())
  config = json.loads(small_runs.small_config("x").to_json())
  assert described.keys() == config.keys()
  for name, fields in config.items():
    if isinstance(fields, dict) and name != "sources":
      assert described[name].keys() == fields.keys()


class _Nnx(nnx.Module):
  def __init__(self, activation, rate, rngs):
    self.activation = activation
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.head = nnx.Linear(64, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(self.activation(x.reshape(len(x), -1))))


def _functions(activation):
  """Return a network whose code is in functions."""
  return models.Functions(
    init=lambda key: ({"kernel": jax.random.normal(key, (64, 3))}, {}),
    apply=lambda params, state, x, *, train: (
      activation(x.reshape(len(x), -1)) @ params["kernel"],
      {},
      state,
    ),
  )


class _Dropout(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dropout(0.5, deterministic=not train)(nn.Conv(4, (3, 3))(x))
    return nn.Dense(4)(x.mean((1, 2)))


@pytest.mark.parametrize("method", ["finetune", "finetune_source"])
def test_seeds_that_start_from_a_source_differ_in_dropout(method):
  """The source's own PRNG key, which it need not have, is not theirs."""
  usual = object_experiment.create()
  variables = models.init(_Dropout(), jax.random.key(0), (8, 8, 1))
  for model_state in (None, variables[1]):
    experiment = usual._replace(
      target=_Dropout(),
      settings=usual.settings._replace(method=method),
      sources={"": experiments.Source(_Dropout(), variables[0], model_state)},
    )
    create_state = setups.build(experiment).create_state
    states = [create_state(seed).inner.model_state for seed in (0, 1, 0)]
    first, second, again = [
      [leaf.tolist() for leaf in jax.tree.leaves(state)] for state in states
    ]
    assert first == again != second


def test_seeds_that_start_from_a_run_differ_in_dropout(tmp_path):
  usual = object_experiment.create()
  first = usual._replace(
    target=_Dropout(), settings=usual.settings._replace(method="scratch")
  )
  train.train(first, tmp_path / "first")
  keys = []
  for seed in (1, 2):
    settings = first.settings._replace(
      seed=seed, init_from=str(tmp_path / "first")
    )
    workdir = tmp_path / f"seed{seed}"
    train.train(first._replace(settings=settings), workdir)
    model_state = predictors.load(workdir, _Dropout()).model_state
    keys.append(model_state["rng"]["key"].tolist())
  assert keys[0] != keys[1]


class _Masked(nnx.Module):
  """The mask is a constant, with -inf as in attention."""

  def __init__(self, rngs):
    self.mask = jnp.array([0.0, -jnp.inf, 0.0, 0.0])
    self.values = nnx.Linear(64, 4, rngs=rngs)
    self.head = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x):
    return self.head(
      nnx.softmax(self.values(x.reshape(len(x), -1)) + self.mask)
    )


def test_a_constant_may_be_infinite(tmp_path):
  usual = object_experiment.create()
  optimizer = usual.settings.optimizer._replace(ema_decay=0.5)
  settings = usual.settings._replace(method="scratch", optimizer=optimizer)
  experiment = usual._replace(
    target=lambda rngs: _Masked(rngs), settings=settings
  )
  train.train(experiment, tmp_path)
  loaded = predictors.load(tmp_path, experiment.target)
  assert np.asarray(loaded.model_state["mask"]).tolist() == [0, -np.inf, 0, 0]


def test_descriptions_tell_networks_of_equal_shapes_apart():
  usual = object_experiment.create()
  targets = [
    make(activation, rate)
    for make in (
      lambda *values: lambda rngs: _Nnx(*values, rngs),
      lambda *values: _Nnx(*values, nnx.Rngs(0)),
    )
    for activation, rate in ((nnx.relu, 0.0), (nnx.relu6, 0.0), (nnx.relu, 0.5))
  ]
  targets += [_functions(nnx.relu), _functions(nnx.relu6)]
  describe = lambda target: experiments.describe(
    usual._replace(target=target, target_taps=())
  )["target"]["model"]
  described = [describe(target) for target in targets]
  assert len(set(described)) == len(described)
  again = _Nnx(nnx.relu, 0.0, nnx.Rngs(0))
  again.eval()
  assert describe(again) == described[3]


def test_descriptions_tell_tasks_of_equal_names_apart():
  usual = object_experiment.create()

  def describe(power):
    # As if a cell of a notebook were edited and run again.
    text = f"lambda outputs, targets: (outputs - targets) ** {power}"
    task = usual.task._replace(loss=eval(text))
    return experiments.describe(usual._replace(task=task))["target"]["task"]

  assert describe(2) == describe(2)
  assert describe(2) != describe(4)


def test_descriptions_tell_contents_apart():
  """Where all else is equal, a complete run must not pass for another one."""
  usual = object_experiment.create()
  images = usual.images
  later = images._replace(num_official_val=images.num_official_val + 1)
  named = images._replace(class_names=("a", "b", "c", "d"))
  network = lambda seed: networks.convnext_nnx(3, rngs=nnx.Rngs(seed))
  weights = lambda value: transfer.TransferMap(
    {"a->b": np.full(2, value)}, {"a->b": np.ones(())}
  )
  experiments_of = (
    usual,
    usual._replace(images=later),
    usual._replace(images=named),
    *(
      usual._replace(sources={"": experiments.Source(network(seed))})
      for seed in (0, 1)
    ),
    *(usual._replace(target=network(seed)) for seed in (0, 1)),
    *(
      usual._replace(target=lambda rngs: networks.convnext_nnx(3, rngs=rngs)),
      usual._replace(target=lambda rngs: networks.convnext_nnx(4, rngs=rngs)),
    ),
    *(usual._replace(frozen=weights(value)) for value in (0.5, 0.6)),
  )
  described = [json.dumps(experiments.describe(one)) for one in experiments_of]
  assert len(set(described)) == len(described)
