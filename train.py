"""Train one experiment.

    python train.py --config=configs/digits.py --workdir=runs/digits

A field is set as --config.field=value. The same command again resumes, or says
that the run is complete. With --plan it says what memory and time the run
would need, and trains nothing.
"""

from absl import flags

from l2t_jax import commands, experiment, plan

flags.declare_key_flag("workdir")
_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Config file, such as configs/stl10.py, or config.json of a run.",
  required=True,
)
_PLAN = flags.DEFINE_bool(
  "plan", False, "Say what the run would need, and train nothing."
)
flags.register_multi_flags_validator(
  ["workdir", "plan"],
  lambda values: values["workdir"] or values["plan"],
  "--workdir must name a folder",
)


def main(overrides: list[str]) -> None:
  config = commands.load_config(_CONFIG.value, overrides)
  if _PLAN.value:
    plan.show(plan.make(config))
  else:
    experiment.train_and_evaluate(config, flags.FLAGS.workdir)


if __name__ == "__main__":
  commands.run(main)
