"""The table of fields: what is built from it, and what its rules refuse."""

import re

import pytest

from l2t_jax import cli, errors
import l2t_jax.config

RULED = [name for name, field in l2t_jax.config.FIELDS.items() if field.rule]


def scratch():
  config = l2t_jax.config.get_config()
  config.method = "scratch"
  return config


def with_value(name, value):
  config = scratch()
  with config.ignore_type():
    config.update_from_flattened_dict({name: value})
  return config


def refusal(config):
  with pytest.raises(errors.InputError) as error:
    l2t_jax.config.check(config)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_defaults_follow_their_rules():
  l2t_jax.config.check(scratch())


@pytest.mark.parametrize("name", RULED)
def test_each_rule_refuses_something_and_says_what_is_right(name):
  default = l2t_jax.config.FIELDS[name].default
  wrong = {str: "nonsense", tuple: (float("nan"),), int: -1, float: -1.0}
  value = wrong[type(default)]
  must = l2t_jax.config.FIELDS[name].rule.must
  assert refusal(with_value(name, value)) == (
    f"config.{name} is {value!r}; it must {must}"
  )


@pytest.mark.parametrize(
  ("name", "wrong", "right"),
  [
    ("epochs", 0, 1),
    ("checkpoint_steps", -1, 0),
    ("seed", 2**32, 2**32 - 1),
    ("optimizer.learning_rate", 0.0, 1e-9),
    ("optimizer.learning_rate", float("inf"), 1e9),
    ("optimizer.learning_rate", float("nan"), 0.1),
    ("optimizer.momentum", 1.0, 0.99),
    ("optimizer.momentum", -0.1, 0.0),
    ("meta.clip_norm", float("inf"), 0.0),
    ("source.mean", (float("inf"),), (0.0, -1.0)),
    ("source.mean", ("a",), ()),
    ("source.std", (0.0,), (0.1,)),
  ],
)
def test_where_a_range_ends(name, wrong, right):
  assert f"config.{name} is {wrong!r}; " in refusal(with_value(name, wrong))
  l2t_jax.config.check(with_value(name, right))


@pytest.mark.parametrize("value", [1.5, True, "2"])
def test_whole_numbers(value):
  """`fit` takes configs that do not check types."""
  message = refusal(with_value("data.rand_augment", value))
  assert message == (
    f"config.data.rand_augment is {value!r}; it must be a whole number"
  )


def test_each_of_several_sources_follows_the_rules():
  config = scratch()
  config.sources.mine = l2t_jax.config.source()
  l2t_jax.config.check(config)
  config.sources.mine.image_size = -1
  assert refusal(config) == (
    "config.sources.mine.image_size is -1; it must be 0 or more"
  )


def test_configs_share_nothing():
  """The defaults are built anew for each config."""
  before = l2t_jax.config.get_config().to_json()
  config = l2t_jax.config.get_config()
  config.sources.mine = l2t_jax.config.source()
  config.optimizer.momentum = 0.0
  assert l2t_jax.config.get_config().to_json() == before


@pytest.mark.parametrize(
  ("name", "nearest"),
  [
    ("config.epoch", "config.epochs"),
    ("config.sources.mine.tap", "config.source.taps"),
  ],
)
def test_unknown_fields(name, nearest):
  message = f"unknown field {name}; did you mean {nearest}?"
  with pytest.raises(errors.InputError, match=re.escape(message)):
    l2t_jax.config.check_fields([name])


def test_known_fields():
  l2t_jax.config.check_fields(
    ["config.epochs", "config.source.taps", "config.sources.mine.taps"]
  )


@pytest.mark.parametrize("text", ["a,b", "(a, b)", "('a','b')", "a,b,"])
def test_lists_of_names_on_the_command_line(text):
  config = cli.load_config(
    "configs/default.py", [f"--config.source.taps={text}"]
  )
  assert config.source.taps == ("a", "b")
  assert cli.with_fields(config, {"trackers": text}).trackers == ("a", "b")
