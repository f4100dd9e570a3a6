"""Train an experiment in a folder, or resume it there.

Seeds of one experiment can train together. Each has a folder of its own, with
the same files as if it had trained alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import contextlib
import json
import os
import pathlib
import platform
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax

from l2t_jax import errors
from l2t_jax.method import training
from l2t_jax.models import weight_files
from l2t_jax.results import map_picture, run_reader, transfer_map
from l2t_jax.run import experiments, feature_scales, loop
from l2t_jax.run import setup as setups
from l2t_jax.run import trainer as trainers
from l2t_jax.runtime import (
  checkpoint,
  compilation,
  distributed,
  logs,
  phases,
  run_folder,
  signals,
  tracking,
)

_VERSIONED = (jax, jaxlib, flax, optax, np)


def train(
  experiment: experiments.Experiment, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Train an experiment, or resume it if an earlier call was interrupted.

  Args:
    experiment: what is trained.
    workdir: folder of the run. Gets config.json, metrics.jsonl, tensorboard/,
      checkpoints/, target.safetensors (the target at its best validation
      epoch), summary.json and, if features were matched, transfer_map.json and
      transfer_map.png.

  Returns:
    The content of summary.json.

  Raises:
    errors.InputError: the data and networks cannot work together, or workdir
      holds a run of another experiment.
    errors.BadNumbersError: a loss, a gradient or a parameter is not finite; the
      last checkpoint is from before that.
    errors.StorageError: the folder can no longer be written.
    errors.Interrupted: on SIGTERM or Ctrl-C, after saving; the same call
      resumes.
  """
  (summary,) = Training(experiment).run({experiment.settings.seed: workdir})
  return summary


class Training:
  """Trains runs that differ only in their seeds.

  Images, networks and compiled programs are shared by all of them. They are
  made in the first call of `run` that needs them.
  """

  def __init__(self, experiment: experiments.Experiment):
    """Store the experiment; nothing is loaded or compiled yet.

    Args:
      experiment: its `settings.seed` is not read.
    """
    self._description = experiment.description or experiments.describe(
      experiment
    )
    self._experiment = experiment._replace(description=self._description)
    self._setup: setups.Setup | None = None
    self._trainer: trainers.Trainer | None = None

  def build(self) -> setups.Setup:
    """Read the images and trace the networks, if that is not done yet.

    Raises:
      errors.InputError: the data and networks cannot work together.
    """
    if self._setup is None:
      _, precision = compilation.PRECISIONS[self._experiment.settings.precision]
      with jax.default_matmul_precision(precision):
        self._setup = setups.build(self._experiment)
    return self._setup

  def run(
    self, workdirs: Mapping[int, str | os.PathLike[str]]
  ) -> list[dict[str, Any]]:
    """Train several seeds side by side, under `jax.vmap`.

    Each seed computes the same as on its own, up to rounding. Interrupted runs
    resume; those that can resume at the same iteration do so together.

    Args:
      workdirs: seed -> folder of its run; see `train`.

    Returns:
      The contents of the summary.json files, in the order given.

    Raises:
      errors.Stop: as `train`.
      trainer.DoesNotFit: the seeds need more memory than the accelerator has;
        no file of the runs is written.
    """
    settings = self._experiment.settings
    check_folders(
      self._description,
      workdirs,
      self._experiment.free_fields,
      self._experiment.contents,
    )
    tracking.check_trackers(settings.trackers)
    summaries = completed(workdirs, settings.epochs)
    left = {
      seed: pathlib.Path(workdir)
      for seed, workdir in workdirs.items()
      if seed not in summaries
    }
    if settings.init_from and not all(map(has_begun, left.values())):
      steps_to_start_from(settings.init_from)
    for workdir in left.values():
      run_folder.make(workdir)
    _, precision = compilation.PRECISIONS[settings.precision]
    with (
      phases.phase(phases.OTHER),
      contextlib.ExitStack() as stack,
      signals.StopRequests() as requests,
      jax.default_matmul_precision(precision),
      run_folder.storage_errors(list(left.values())),
    ):
      for workdir in left.values():
        stack.enter_context(run_folder.lock(workdir))
      while left:
        group = {seed: left.pop(seed) for seed in _first_group(left)}
        summaries |= self._run_group(group, requests)
    return [summaries[seed] for seed in workdirs]

  def _run_group(self, workdirs, requests):
    setup = self.build()
    group = {
      workdir: _with_seed(self._experiment, seed)
      for seed, workdir in workdirs.items()
    }
    if self._trainer is None or self._trainer.num_seeds != len(group):
      # Free the old trainer's programs before the new one compiles its own.
      self._trainer = None
      self._trainer = trainers.Trainer(setup, len(group))
    try:
      return _train(setup, self._trainer, group, requests)
    finally:
      self._trainer.drop_state()


def completed(
  workdirs: Mapping[int, str | os.PathLike[str]], epochs: int
) -> dict[int, dict[str, Any]]:
  """Return seed -> summary of the complete runs, and print which they are."""
  summaries = {}
  for seed, workdir in workdirs.items():
    # Process 0 decides: the others may not see its latest files yet.
    if distributed.from_first(is_complete(workdir, epochs)):
      if distributed.is_first():
        print(f"{workdir} holds a complete run; nothing to do")
      summaries[seed] = run_reader.read_summary(pathlib.Path(workdir)) or {}
  return summaries


def is_complete(workdir: str | os.PathLike[str], epochs: int) -> bool:
  """Return whether a folder holds a run that has trained all epochs."""
  summary = run_reader.read_summary(pathlib.Path(workdir)) or {}
  return summary.get("epochs", 0) >= epochs


def has_begun(workdir: str | os.PathLike[str]) -> bool:
  """Return whether a folder holds a run that resumes from a checkpoint."""
  return bool(
    checkpoint.steps_in(pathlib.Path(workdir) / run_folder.CHECKPOINTS)
  )


def check_folders(
  description: Mapping[str, Any],
  workdirs: Mapping[int, str | os.PathLike[str]],
  free_fields: Collection[str],
  contents: Mapping[str, str],
) -> None:
  """Make sure that folders hold no run of another experiment.

  Args:
    description: of the experiment; its seed is not read.
    workdirs: seed -> folder of its run, which need not exist.
    free_fields: dotted names of the fields that may differ.
    contents: dotted name of a field that is a path -> digest of its files.

  Raises:
    errors.InputError: naming the fields that differ; or a finished run cannot
      go on without its checkpoints.
  """
  for seed, path in workdirs.items():
    workdir = pathlib.Path(path)
    config_file = workdir / run_folder.CONFIG
    if not config_file.exists():
      if steps := checkpoint.steps_in(workdir / run_folder.CHECKPOINTS):
        raise errors.InputError(
          f"{workdir} holds a checkpoint of iteration {max(steps)}, but no"
          " config.json that says of what run; bring it back, or use another"
          " --workdir"
        )
      continue
    old = experiments.comparable(run_folder.read_json(config_file))
    new = experiments.comparable({**description, "seed": seed})
    if _only_goes_on(old, new):
      old["epochs"] = new["epochs"]
    before = run_folder.read_json(workdir / run_folder.CONTENTS) or {}
    differences = [
      f"{field} was {old.get(field)!r}, is {new.get(field)!r}"
      for field in new | old
      if old.get(field) != new.get(field)
      and field not in free_fields
      and (field not in contents or contents[field] != before.get(field))
    ]
    differences += [
      f"{field} {new[field]!r} holds other files than before"
      for field, digest in contents.items()
      if digest  # Missing files are reported when they are needed.
      # A run that has begun does not read init_from any more.
      and not (field == "init_from" and has_begun(workdir))
      and digest != before.get(field, digest)
      and old.get(field) == new.get(field)
    ]
    if (
      not differences
      and run_reader.read_summary(workdir)
      and not is_complete(workdir, new["epochs"])
      and not has_begun(workdir)
    ):
      raise errors.InputError(
        f"{workdir} holds a finished run without its checkpoints, which cannot"
        " go on: bring them back, or use another --workdir"
      )
    if differences:
      advice = "use another --workdir"
      # More epochs are the only difference, but the schedule depends on them.
      if len(differences) == 1 and old.get("epochs", 0) < new["epochs"]:
        advice += (
          f", where --config.init_from={workdir} starts from what this run has"
          " learned"
        )
      raise errors.InputError(
        f"{workdir} holds a run of another config: {'; '.join(differences)};"
        f" {advice}"
      )


def _only_goes_on(old, new):
  """Return whether the new fields only add epochs, at a constant rate.

  The other schedules depend on the number of epochs.
  """
  schedules = {fields.get("optimizer.schedule") for fields in (old, new)}
  return schedules == {"constant"} and old["epochs"] <= new["epochs"]


def _with_seed(experiment, seed):
  return experiment._replace(
    settings=experiment.settings._replace(seed=seed),
    description={**experiment.description, "seed": seed},
  )


def _first_group(workdirs):
  """Choose the seeds that resume from the same iteration as the first."""
  steps = {
    seed: checkpoint.steps_in(workdir / run_folder.CHECKPOINTS)
    for seed, workdir in workdirs.items()
  }
  if set.intersection(*steps.values()):
    group = set(steps)  # All go back to their newest common iteration.
  else:
    newest = {seed: max(one, default=0) for seed, one in steps.items()}
    first, *_ = newest.values()
    group = {seed for seed, step in newest.items() if step == first}
  # Process 0 decides: the others may not see its latest files yet.
  return [seed for seed in workdirs if distributed.from_first(seed in group)]


def _train(setup, trainer, group, requests):
  """Train seeds together, from the start or a checkpoint; return summaries."""
  first, *_ = group.values()
  settings = first.settings
  # Meanwhile the training step compiles in the background.
  states = [setup.create_state(run.settings.seed) for run in group.values()]
  tracking.import_trackers(settings.trackers)
  # Before any folder changes, because it may raise `DoesNotFit`.
  trainer.compile()
  display = logs.Progress(
    settings.epochs * setup.dataset.steps_per_epoch,
    settings.batch_size * len(group),
    quiet=not distributed.is_first(),
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(display)
    runs = [
      loop.Seed(
        experiment,
        workdir,
        setup.dataset.with_seed(experiment.settings.seed),
        stack.enter_context(
          checkpoint.Checkpoints(workdir / run_folder.CHECKPOINTS)
        ),
        loop.RunState(setup.inputs),
        f"seed {experiment.settings.seed}: " if len(group) > 1 else "",
      )
      for workdir, experiment in group.items()
    ]
    step, states = _restore(runs, states, display)
    if settings.init_from and not step:
      states = [
        _start_from(
          settings.init_from, state, setup, run.experiment.settings.seed
        )
        for run, state in zip(runs, states, strict=True)
      ]
    # Not earlier, so that a run that cannot start leaves no trace.
    for workdir, experiment in group.items():
      if distributed.is_first():  # That of fewer epochs is out of date.
        (workdir / run_folder.SUMMARY).unlink(missing_ok=True)
      run_folder.write_json(workdir / run_folder.CONFIG, experiment.description)
      contents = run_folder.read_json(workdir / run_folder.CONTENTS) or {}
      # Keep the digests of files that no longer exist, and that of the run
      # from which this one started: it may have been trained further.
      kept = contents.keys() & {"init_from"} if step else set()
      contents |= {
        name: digest
        for name, digest in experiment.contents.items()
        if digest and name not in kept
      }
      run_folder.write_json(workdir / run_folder.CONTENTS, contents)
    _open_logs(runs, step, stack)
    display.say(_headline(setup, first))
    if step:
      display.say(f"resuming after iteration {step}")
    display.begin(step)
    trainer.start(states, _scale_sources(setup, runs, display))
    del states  # Otherwise these arrays would stay in device memory.
    loop.Loop(setup, trainer, runs, display, requests).train(step)
  return _summarise(setup, trainer, runs)


def steps_to_start_from(workdir: str) -> set[int]:
  """Return the iterations of the checkpoints of config.init_from.

  Raises:
    errors.InputError: there are none.
  """
  folder = pathlib.Path(workdir) / run_folder.CHECKPOINTS
  if not (steps := checkpoint.steps_in(folder)):
    raise errors.InputError(
      f"config.init_from is {workdir!r}, but there is no checkpoint in"
      f" {folder}; name the --workdir of a run"
    )
  return steps


def _start_from(workdir, state, setup, seed):
  """Initialise a state with what another run has learned."""
  step = max(steps_to_start_from(workdir))
  folder = pathlib.Path(workdir) / run_folder.CHECKPOINTS
  with checkpoint.Checkpoints(folder) as checkpoints:
    try:
      # The other run may have used other optimizers: restore their states in
      # the shapes of the checkpoint, and discard them.
      theirs = checkpoints.shapes(step, state.step.sharding)
      learned, _ = checkpoints.restore(
        step,
        state._replace(
          inner=state.inner._replace(opt_state=theirs["inner"]["opt_state"]),
          meta_opt_state=theirs["meta_opt_state"],
          average=theirs["average"],
        ),
        advice="it cannot start this run, which needs the same method,"
        " networks and classes",
      )
    except checkpoint.DamagedError as error:
      raise errors.StorageError(
        f"the checkpoint {folder / str(step)} is damaged: {error}"
      ) from error
  state = state._replace(
    inner=state.inner._replace(
      params=learned.inner.params,
      # Else, all seeds that start from one run would have its PRNG keys.
      model_state=setup.fold_in(learned.inner.model_state, seed),
    ),
    meta_params=learned.meta_params,
  )
  return training.start_average(state, setup.recipe)


def _scale_sources(setup, runs, display):
  """Return the sources with feature scales, which a run measures only once."""
  settings = runs[0].experiment.settings
  if settings.transfer.feature_scale != "std" or not setup.source_taps:
    return setup.sources
  scales = runs[0].progress.feature_scales
  if scales is None:
    scales = feature_scales.measure(setup)
    shown = ", ".join(f"{tap} {scale:.3g}" for tap, scale in scales.items())
    display.say(f"source features are divided by: {shown}")
  for run in runs:
    run.progress.feature_scales = scales
  return feature_scales.set_scales(setup.sources, scales)


def _open_logs(runs, step, stack):
  """Open the logs of each seed at a step, in the process that writes them."""
  if distributed.is_first():
    for run in runs:
      log = logs.MetricsLog(
        run.workdir,
        from_step=step,
        trackers=run.experiment.settings.trackers,
        config=run.experiment.description,
      )
      run.log = stack.enter_context(log)


def _restore(runs, states, display):
  """Restore the newest undamaged checkpoint that all seeds share.

  Returns:
    (iterations done, states).

  Raises:
    errors.StorageError: the only checkpoint is damaged, or the seeds have no
      checkpoint in common.
  """
  while True:
    shared = set.intersection(*(set(run.checkpoints.steps()) for run in runs))
    step = distributed.from_first(max(shared, default=0))
    if not step:
      if any(run.checkpoints.steps() for run in runs):
        raise errors.StorageError(
          "the seeds have no checkpoint in common any more; the same command"
          " trains them one by one"
        )
      return step, states
    try:
      restored = []
      for run, state in zip(runs, states, strict=True):
        restored.append(run.restore(step, state))
    except checkpoint.DamagedError as error:
      _set_aside(run, step, error, display)
      continue
    for run in runs:
      run.checkpoints.drop_after(step)
    return step, restored


def _set_aside(run, step, error, display):
  if len(run.checkpoints.steps()) == 1:
    raise errors.StorageError(
      f"{run.workdir}: the only checkpoint, of iteration {step}, is damaged:"
      f" {error}; bring it back from a copy, or use another --workdir"
    ) from error
  place = run.checkpoints.set_aside(step)
  display.say(
    f"the checkpoint of iteration {step} is damaged ({error}) and now is"
    f" {place}; going on from the one before"
  )


@phases.phase("pictures")
def _write_transfer_map(setup, run):
  epochs = [
    record
    for record in run_folder.read_metrics(run.workdir)
    if record["kind"] == "epoch"
  ]
  settings = run.experiment.settings
  setting = transfer_map.Setting(
    settings.method,
    list(setup.source_taps.items()),
    list(setup.problem.target_taps.items()),
    sources=list(setup.sources) if len(setup.sources) > 1 else (),
    frozen=run.experiment.frozen is not None,
    maximum=run.experiment.largest_pair_weight(len(setup.problem.pairs)),
    scales=run.progress.feature_scales or {},
  )
  weights = {
    name: np.array(values)
    for name, values in run.progress.channel_weights.items()
  }
  map_picture.write(run.workdir, transfer_map.collect(setting, epochs, weights))


def _summarise(setup, trainer, runs):
  """Write summaries and transfer maps at the end; return seed -> summary."""
  weighs_pairs = runs[0].experiment.method.weighs_pairs
  if distributed.is_first() and weighs_pairs:
    for run in runs:
      _write_transfer_map(setup, run)
  seconds = phases.take()
  summaries = {
    run.experiment.settings.seed: _summary(
      setup, trainer, run, len(runs), seconds
    )
    for run in runs
  }
  if distributed.is_first():
    for run, summary in zip(runs, summaries.values(), strict=True):
      run_folder.write_json(run.workdir / run_folder.SUMMARY, summary)
    print(phases.line(seconds))
  return summaries


def _summary(setup, trainer, run, num_seeds, seconds):
  settings, dataset = run.experiment.settings, setup.dataset
  progress, program = run.progress, trainer.program
  best = {name: getattr(progress, name) for name in loop.BEST}
  target = run.workdir / run_folder.TARGET
  if distributed.is_first() and target.exists():
    # After a crash, iterations that are repeated can have other results than
    # before: what counts is the target that was kept.
    metadata = weight_files.read_metadata(target)
    best = {name: json.loads(metadata[name]) for name in loop.BEST}
  elif distributed.is_first():
    print(f"{target}, which is of epoch {progress.best_epoch}, is gone")
  return {
    "method": settings.method,
    "seed": settings.seed,
    **best,
    "epochs": settings.epochs,
    "iterations": settings.epochs * dataset.steps_per_epoch,
    "recipe": run_reader.recipe(run.experiment.description),
    # Training and evaluation, without compiling the training step; if several
    # seeds trained together, the share of this one.
    "seconds": round(progress.seconds, 1),
    # The same without evaluation, in the fastest whole epoch; None if an
    # interruption cut all of them.
    "iteration_seconds": progress.iteration_seconds,
    "compile_seconds": round(program.seconds, 1),
    # The main thread's time since the last summary in this process, for all
    # seeds that trained together.
    "phases": {name: round(value, 2) for name, value in seconds.items()},
    # The training step, for all seeds that trained together.
    "memory_bytes": program.memory_bytes,
    "flops": program.flops,
    "hypergradient_mode": trainer.mode,
    "seeds_together": num_seeds,
    "split_hash": dataset.split_hash,
    "num_train": dataset.num_train,
    "num_val": dataset.num_val,
    "num_test": dataset.num_test,
    "num_unlabeled": dataset.num_unlabeled,
    "trained_on_validation": run.experiment.has_outer,
    "skipped_images": list(dataset.skipped),
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "processes": jax.process_count(),
    "versions": {
      "python": platform.python_version(),
      **{module.__name__: module.__version__ for module in _VERSIONED},
    },
  }


def _headline(setup, experiment):
  """Return lines about the network and the images, and notes for the user."""
  dataset = setup.dataset
  params = setup.state_shapes.inner.params["target"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  model = loop.trained_model(experiment.method, experiment.description)
  text = (
    f"{experiment.settings.method}: {model}, {count:,} parameters, on"
    f" {dataset.num_train} training, {dataset.num_val} validation and"
    f" {dataset.num_test} test images of {dataset.num_classes} classes"
    f" (split {dataset.split_hash})"
  )
  return "\n".join((text, *setup.notes))
