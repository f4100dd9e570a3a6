"""What the paper reports, and whether a run has the paper's setting."""

import importlib
import json

import pytest

import l2t_jax.config
from l2t_jax.results import paper
from l2t_jax.run import experiments, from_config
from tests.support import small_runs


def config_of(name, **changes):
  """Return a shipped config, changed, as in the config.json of a run."""
  config = importlib.import_module(f"configs.{name}").get_config()
  for field, value in changes.items():
    config.update_from_flattened_dict({field.replace("__", "."): value})
  return json.loads(config.to_json())


def departures(name, config, **told):
  return paper.departures(
    name,
    experiments.comparable(config),
    experiments.comparable(from_config.describe(l2t_jax.config.get_config())),
    free_fields=l2t_jax.config.FREE_FIELDS,
    **told,
  )


@pytest.mark.parametrize("name", paper.REPORTED)
def test_the_shipped_configs_are_the_papers_settings(name):
  assert departures(name, config_of(name)) == ()


@pytest.mark.parametrize(
  ("changes", "found"),
  [
    ({"data__per_class": 50}, "data.per_class is 50, not 0"),
    ({"epochs": 5}, "epochs is 5, not 200"),
    ({"target__model": "vgg_tiny"}, "target.model is 'vgg_tiny', not 'vgg9'"),
    ({"optimizer__schedule": "step"}, "optimizer.schedule is 'step', not"),
    ({"transfer__beta": 1.0}, "transfer.beta is 1.0, not 0.5"),
    ({"data__name": "cifar10"}, "data.name is 'cifar10', not 'stl10'"),
    (
      {"data__source": "bundled", "data__name": "mnist"},
      "data.name is 'mnist'",
    ),
    ({"source__taps": ("a",)}, "source.taps is ['a'], not []"),
  ],
)
def test_what_decides_the_result_is_named(changes, found):
  (told,) = departures("stl10", config_of("stl10", **changes))
  assert told.startswith(found)


def test_what_does_not_decide_it_is_free():
  config = config_of(
    "stl10",
    seed=3,
    method="scratch",
    precision="tf32",
    log_every=1,
    data__source="npz",
    data__name="",
    data__path="elsewhere.npz",
    data__split_file="splits.npz",
    data__num_workers=0,
    source__weights="elsewhere.safetensors",
    bilevel__mode="mixed",
  )
  assert departures("stl10", config) == ()


def test_sources_and_images_are_those_of_the_paper():
  config = config_of("dogs", data__source="folder")
  network, images = "resnet34 of 1000 classes", (12_000, 8_580)
  assert departures("dogs", config, source=network, num_images=images) == ()
  assert departures(
    "dogs", config, source="resnet18 of 10 classes", num_images=(900, 100)
  ) == (
    "the source network is 'resnet18 of 10 classes', not 'resnet34 of 1000"
    " classes'",
    "number of labelled images is 900, not 12000",
    "number of test images is 100, not 8580",
  )
  config["sources"] = {"a": {"weights": "a.safetensors"}}
  (told,) = departures("dogs", config)
  assert told == "sources.a.weights is 'a.safetensors', not None"


def test_the_documentation_quotes_the_same_numbers():
  page = (small_runs.ROOT / "docs" / "paper.md").read_text("utf-8")
  table, _, _ = page.partition("## Reproducing them")
  lines = [line for line in table.splitlines() if line.startswith("|")]
  names = {"CIFAR-100": "cifar100", "STL-10": "stl10", "CUB-200": "cub200"}
  names |= {"MIT-67": "mit67", "Stanford-40": "stanford40", "Dogs": "dogs"}
  cut = lambda line: [cell.strip(" *") for cell in line.strip("|").split("|")]
  columns = [names[name] for name in cut(lines[0])[1:]]
  quoted = {column: {} for column in columns}
  for line in lines[2:]:
    method, *values = cut(line)
    for a, b in (("-", "_"), ("+", "_"), (", ", "_")):
      method = method.lower().replace(a, b)
    for column, value in zip(columns, values, strict=True):
      quoted[column][method] = float(value)
  assert quoted == paper.REPORTED
