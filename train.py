"""Train one experiment.

    python train.py --config=configs/digits.py --workdir=runs/digits

The same command again resumes, or says that the run is complete.
"""

from collections.abc import Iterable
import difflib
import sys

from absl import app, flags, logging
import flax
import ml_collections
from ml_collections import config_flags

from configs import default
from l2t_jax import experiment, types

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Experiment.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
flags.mark_flag_as_required("config")


def parse_flags(argv: list[str]) -> list[str]:
  """Parse flags; whatever is wrong with them is one `InputError`."""
  names = [argument.split("=")[0].lstrip("-") for argument in argv[1:]]
  _check_fields(n for n in names if n.startswith("config."))
  try:
    rest = flags.FLAGS(argv)
    _check_fields(_fields(_CONFIG.value))
  except OSError as error:
    reason = str(error).splitlines()[-1].strip()
    raise types.InputError(f"--config: {reason}") from error
  except (flags.Error, TypeError, ValueError) as error:
    raise types.InputError(str(error)) from error
  if rest[1:]:
    raise types.InputError(
      f"unexpected argument {rest[1]!r}; set a field as --config.field=value"
    )
  return rest


def _fields(config: ml_collections.ConfigDict) -> list[str]:
  paths = flax.traverse_util.flatten_dict(config.to_dict())
  return [".".join(("config", *path)) for path in paths]


def _check_fields(names: Iterable[str]) -> None:
  """Refuse fields that the default config does not have."""
  known = _fields(default.get_config())
  for name in names:
    if name not in known:
      nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      raise types.InputError(
        f"unknown field {name}; did you mean {nearest}? configs/default.py"
        " lists all fields"
      )


def main(_: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  experiment.train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
  try:
    app.run(main, flags_parser=parse_flags)
  except types.InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
