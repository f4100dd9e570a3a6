"""What the commands share: config files, overrides, errors of one line.

Config files are Python files with `get_config()`, as those in configs/, whose
l2t_jax/config.py says which fields there are. A field is set on the command
line as --config.field=value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import os
import pathlib
import sys

# XLA reads it when jax is imported: it warns in long lines that code from its
# own cache may not fit this CPU.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from l2t_jax import errors
import l2t_jax.config
from l2t_jax.runtime import compilation, cpu_lowering, signals

FLAGS = flags.FLAGS
# What ml_collections calls the module that it makes of a config file.
_MODULE = "config_config"

flags.DEFINE_string("workdir", None, "Folder that the results go to.")


def run(main: Callable[[list[str]], object]) -> None:
  """Run `main` with the overrides of the command line.

  A `errors.Stop`, SIGTERM among them, becomes one line on stderr and its exit
  code; what `main` returns is the exit code otherwise.
  """
  _, overrides = _split(sys.argv)

  def parse(argv: list[str]) -> list[str]:
    arguments, _ = _split(argv)
    try:
      rest = FLAGS(arguments)
    except flags.Error as error:
      raise errors.InputError(str(error)) from error
    if rest[1:]:
      raise errors.InputError(
        f"unexpected argument {rest[1]!r}; set a field as --config.field=value"
      )
    return rest

  def quietly(_: list[str]) -> object:
    # Errors of libraries reach the user as exceptions.
    logging.set_verbosity(logging.FATAL)
    compilation.use_cache()
    cpu_lowering.install()
    return main(overrides)

  with errors.errors_in_one_line(), signals.StopRequests(for_command=True):
    app.run(quietly, flags_parser=parse)


def load_config(
  path: str, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Read a config file and set fields.

  Args:
    path: of the file; what follows a ":" is handed to its `get_config`. Or of a
      run's config.json.
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
    # Where the file's module is kept: what it lacks must not come from the
    # last.
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
  return config


def _reason(path: str, overrides: Sequence[str], error: Exception) -> str:
  """Say in one line why a config file or an override cannot be."""
  sources = [o for o in overrides if _name(o).startswith("config.sources.")]
  if isinstance(error, KeyError) and sources:
    return (
      f"{' '.join(sources)}: {path} has no such source; sources are added in"
      " a config file, config.sources.NAME = default.source()"
    )
  lines = str(error).strip().splitlines() or [""]
  if any(line.startswith("Traceback") for line in lines):  # Of the file.
    return f"--config={path}: {lines[-1]}"
  if isinstance(error, flags.Error):
    return " ".join(str(error).split())
  reason = " ".join(lines).replace(f"module {_MODULE!r}", "the file")
  return f"--config={path}: {type(error).__name__}: {reason}"


def _config_of_run(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Read the config.json that a run left."""
  try:
    content = json.loads(path.read_text(), object_hook=_with_tuples)
  except ValueError as error:
    raise errors.InputError(f"--config={path} is not JSON: {error}") from error
  config = l2t_jax.config.get_config()
  try:
    config.update(content)
  except (AttributeError, TypeError, ValueError) as error:
    raise errors.InputError(
      f"--config={path} is no config of a run: {error}"
    ) from error
  return config


def _with_tuples(fields):
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def column_name(path: str) -> str:
  """Name a config file's column of a table: its stem, and its argument."""
  file, _, argument = path.partition(":")
  stem = pathlib.Path(file).stem
  return f"{stem}:{argument}" if argument else stem


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Return (the other arguments, those that set a field of the config)."""
  others, overrides = list(argv[:1]), []
  rest = list(argv[1:])
  while rest:
    argument = rest.pop(0)
    if not _name(argument).startswith(("config.", "noconfig.")):
      others.append(argument)
      continue
    if "=" not in argument and rest and not rest[0].startswith("-"):
      argument += f"={rest.pop(0)}"
    overrides.append(argument)
  return others, overrides


def _name(argument: str) -> str:
  return argument.partition("=")[0].lstrip("-")
