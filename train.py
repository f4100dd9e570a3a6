"""Train one experiment.

    python train.py --config=configs/digits.py --workdir=runs/digits

A field is set as --config.field=value. The same command again resumes, or says
that the run is complete.
"""

from absl import flags

from l2t_jax import commands, experiment

flags.declare_key_flag("workdir")
_CONFIG = flags.DEFINE_string(
  "config", None, "Config file, such as configs/stl10.py.", required=True
)


def main(overrides: list[str]) -> None:
  config = commands.load_config(_CONFIG.value, overrides)
  experiment.train_and_evaluate(config, commands.WORKDIR.value)


if __name__ == "__main__":
  commands.run(main)
