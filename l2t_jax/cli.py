"""Commands that take a config: files, overrides and errors in one line.

A config file is a Python file with `get_config()`, like those in configs/;
l2t_jax/config.py lists the fields. `--config.field=value` sets one of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
import copy
import json
import logging
import pathlib
import sys

from absl import flags
import ml_collections
from ml_collections import config_flags

from l2t_jax import errors, quiet  # noqa: F401
import l2t_jax.config
from l2t_jax.runtime import compilation, cpu_lowering, phases, signals

# The name that ml_collections gives to the module of a config file.
_MODULE = "config_config"


def run(
  parser: errors.Parser,
  main: Callable[[argparse.Namespace, list[str]], int | None],
) -> None:
  """Run a command and exit with the code that `main` returns.

  An `errors.Stop` is printed in one line on stderr and sets the exit code.
  SIGTERM and Ctrl-C raise one.

  Args:
    parser: parser of the arguments that are not overrides.
    main: (arguments, overrides such as "--config.epochs=5") -> exit code.
  """
  phases.begin()
  arguments, overrides = _split(sys.argv[1:])
  # Libraries also raise the errors that they log: do not show them twice.
  logging.disable(logging.ERROR)
  with errors.errors_in_one_line(), signals.StopRequests(for_command=True):
    args, unexpected = parser.parse_known_args(arguments)
    if unexpected:
      raise errors.InputError(
        f"unexpected argument {unexpected[0]!r}; a field is set as"
        " --config.field=value, and --help lists the other arguments"
      )
    compilation.use_cache()
    cpu_lowering.install()
    sys.exit(main(args, overrides))


def load_config(
  path: str, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Read a config file and set fields.

  Args:
    path: a Python file, optionally followed by ":" and the argument of its
      `get_config`; or the config.json of a run.
    overrides: such as "--config.epochs=5".

  Raises:
    errors.InputError: the file, a field or a value is wrong.
  """
  l2t_jax.config.check_fields(
    _name(override).removeprefix("no") for override in overrides
  )
  file = path.partition(":")[0]
  if not pathlib.Path(file).is_file():
    raise errors.InputError(
      f"--config={path}: there is no file {file!r}; name a config file, such as"
      " configs/stl10.py, or config.json of a run"
    )
  values = flags.FlagValues()
  if pathlib.Path(path).suffix == ".json" and ":" not in path:
    arguments = ["", *overrides]
    holder = config_flags.DEFINE_config_dict(
      "config",
      _config_of_run(pathlib.Path(path)),
      flag_values=values,
      sys_argv=arguments,
    )
  else:
    arguments = ["", f"--config={path}", *overrides]
    holder = config_flags.DEFINE_config_file(
      "config", flag_values=values, sys_argv=arguments
    )
    # Remove the module of the previous config file, so that attributes missing
    # in this file do not come from it.
    sys.modules.pop(_MODULE, None)
  try:
    values(arguments)
    config = holder.value
  except Exception as error:  # The file is code: it may raise anything.
    raise errors.InputError(_reason(path, overrides, error)) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.InputError(
      f"--config={path}: get_config() returns a {type(config).__name__}; it"
      " must return the config of default.get_config(), changed"
    )
  l2t_jax.config.check_fields(
    f"config.{name}" for name in l2t_jax.config.flatten(config.to_dict())
  )
  _split_lists(config, overrides)
  l2t_jax.config.expand_home(config)
  return config


def with_fields(
  config: ml_collections.ConfigDict, values: Mapping[str, str]
) -> ml_collections.ConfigDict:
  """Return a copy of a config with fields set as on the command line.

  Args:
    config: the fields.
    values: dotted name -> text of the value.

  Raises:
    errors.InputError: a field or a value is wrong.
  """
  overrides = [f"--config.{field}={text}" for field, text in values.items()]
  l2t_jax.config.check_fields(map(_name, overrides))
  flag_values = flags.FlagValues()
  arguments = ["", *overrides]
  holder = config_flags.DEFINE_config_dict(
    "config",
    copy.deepcopy(config),
    flag_values=flag_values,
    sys_argv=arguments,
  )
  try:
    flag_values(arguments)
  except Exception as error:  # A parser may raise anything.
    raise errors.InputError(
      f"{' '.join(overrides)}: {errors.in_one_line(error)}"
    ) from error
  changed = holder.value
  _split_lists(changed, overrides)
  l2t_jax.config.expand_home(changed)
  return changed


def _split_lists(config, overrides):
  """Split values such as "a,b" of tuples, which are parsed as one string."""
  values = l2t_jax.config.flatten(config.to_dict())
  for override in overrides:
    field = _name(override).removeprefix("config.")
    _, _, text = override.partition("=")
    if "," in text and values.get(field) == (text,):
      parts = (part.strip(" ()[]'\"") for part in text.split(","))
      config.update_from_flattened_dict({field: tuple(filter(None, parts))})


def _reason(path: str, overrides: Sequence[str], error: Exception) -> str:
  """Say in one line what is wrong with a config file or an override."""
  sources = [o for o in overrides if _name(o).startswith("config.sources.")]
  if isinstance(error, KeyError) and sources:
    return (
      f"{' '.join(sources)}: {path} has no such source; sources are added in"
      " a config file, config.sources.NAME = default.source()"
    )
  lines = str(error).strip().splitlines() or [""]
  if any(line.startswith("Traceback") for line in lines):
    # An error in the code of the config file: its last line says what is wrong.
    return f"--config={path}: {lines[-1]}"
  if isinstance(error, flags.Error):
    return " ".join(str(error).split())
  reason = " ".join(lines).replace(f"module {_MODULE!r}", "the file")
  return f"--config={path}: {type(error).__name__}: {reason}"


def _config_of_run(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Read the config.json of a run."""
  try:
    content = json.loads(path.read_text(), object_hook=_with_tuples)
  except ValueError as error:
    raise errors.InputError(f"--config={path} is not JSON: {error}") from error
  config = l2t_jax.config.get_config()
  try:
    config.update(content)
  except (AttributeError, TypeError, ValueError) as error:
    raise errors.InputError(
      f"--config={path} is not the config of a run: {error}"
    ) from error
  return config


def _with_tuples(fields):
  # JSON has only lists, but sequences in the fields of a config are tuples.
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Split argv into (other arguments, overrides of config fields)."""
  others: list[str] = []
  overrides: list[str] = []
  rest = list(argv)
  while rest:
    argument = rest.pop(0)
    if not argument.startswith(("--config.", "--noconfig.")):
      others.append(argument)
      continue
    # Also accept the form "--config.field value".
    if "=" not in argument and rest and not rest[0].startswith("-"):
      argument += f"={rest.pop(0)}"
    overrides.append(argument)
  return others, overrides


def _name(argument: str) -> str:
  return argument.partition("=")[0].lstrip("-")
