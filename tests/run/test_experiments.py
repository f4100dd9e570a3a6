"""Experiments of objects: no config is needed, and another one is refused."""

import json

from flax import nnx
import numpy as np
import pytest

from examples import networks
from l2t_jax import errors
from l2t_jax.method import transfer
from l2t_jax.run import experiments, train
from tests.support import object_experiment, small_runs

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
    *(usual._replace(frozen=weights(value)) for value in (0.5, 0.6)),
  )
  described = [json.dumps(experiments.describe(one)) for one in experiments_of]
  assert len(set(described)) == len(described)
