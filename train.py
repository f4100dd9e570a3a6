"""Train one experiment.

    python train.py --config=configs/digits.py --workdir=runs/digits

A field is set as --config.field=value. The same command again resumes, or says
that the run is complete. With --plan it says what memory and time the run
would need, and trains nothing. On several machines, or in several processes of
one, each process gets the same command and --distributed.
"""

from absl import flags

from l2t_jax import cli
from l2t_jax.run import from_config, plan
from l2t_jax.runtime import distributed

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
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "This is one of several processes, as Slurm, Open MPI, Kubernetes or a TPU"
  " pod tells; elsewhere the next three flags do.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, a free port there."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes train together."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this one, from 0.")
flags.register_multi_flags_validator(
  ["workdir", "plan"],
  lambda values: values["workdir"] or values["plan"],
  "--workdir must name a folder",
)


def main(overrides: list[str]) -> None:
  place = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if _DISTRIBUTED.value or place != (None, None, None):
    distributed.start(*place)
  with distributed.exit_together():
    config = cli.load_config(_CONFIG.value, overrides)
    if _PLAN.value:
      from_config.check(config)
      plan.show(plan.make(from_config.resolve(config)))
    else:
      from_config.train_and_evaluate(config, flags.FLAGS.workdir)


if __name__ == "__main__":
  cli.run(main)
