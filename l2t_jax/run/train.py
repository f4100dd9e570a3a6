"""Train what a config says: the loop, its records and its checkpoints.

Seeds of one experiment can train together, vectorised; each keeps a folder of
its own, which looks as if it had trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import copy
import json
import os
import pathlib
import platform
import sys
from typing import Any

import flax
import jax
import jaxlib
import ml_collections
import numpy as np
import optax

from l2t_jax import errors
import l2t_jax.config
from l2t_jax.method import transfer
from l2t_jax.results import map_picture, transfer_map
from l2t_jax.run import loop, setup, trainer
from l2t_jax.runtime import (
  checkpoint,
  distributed,
  logs,
  run_folder,
  sharding,
  signals,
  tracking,
)

CHECKPOINTS = "checkpoints"
_VERSIONED = (jax, jaxlib, flax, optax, np)
# Accuracies may be errors with a minus: any finite one is better.
_WORST = -sys.float_info.max


class _Regroup(Exception):
  """A checkpoint was set aside: what can go on together may have changed."""

  meets_all_processes = True


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  given: setup.Given = setup.NOTHING,
) -> dict[str, Any]:
  """Train one experiment, resuming where an earlier call was cut off.

  Args:
    config: the fields of l2t_jax/config.py.
    workdir: folder of the run. Gets config.json, metrics.jsonl, tensorboard/,
      checkpoints/, target.safetensors (the target at its best validation
      epoch), summary.json, and where features were matched transfer_map.json
      and transfer_map.png.
    given: what is there already, and not to be loaded as the config says.

  Returns:
    The content of summary.json.

  Raises:
    errors.InputError: for a config, data or weights that cannot work, and where
      workdir holds a run of another config.
    errors.BadNumbersError: a loss, a gradient or a parameter is not finite; the
      last checkpoint is of before.
    errors.StorageError: the folder cannot be written any more.
    errors.Interrupted: on SIGTERM, after saving; the same call goes on.
  """
  (summary,) = train_together(config, {config.seed: workdir}, given)
  return summary


def train_together(
  config: ml_collections.ConfigDict,
  workdirs: Mapping[int, str | os.PathLike[str]],
  given: setup.Given = setup.NOTHING,
) -> list[dict[str, Any]]:
  """Train several seeds of one experiment side by side, under `jax.vmap`.

  Each seed computes what it computes alone, up to rounding. Runs that were cut
  off resume, those that had come equally far together.

  Args:
    config: the fields of l2t_jax/config.py, but for `seed`.
    workdirs: seed -> folder of its run; see `train_and_evaluate`.
    given: likewise.

  Returns:
    The contents of the summary.json files, in the order given.

  Raises:
    errors.Stop: as `train_and_evaluate`.
    DoesNotFit: the seeds need more memory than the accelerator has; their
      folders are as they were.
  """
  check(config, workdirs, given)
  summaries: dict[int, dict[str, Any]] = {}
  left: dict[pathlib.Path, ml_collections.ConfigDict] = {}
  for seed, workdir in workdirs.items():
    workdir = pathlib.Path(workdir)
    summary_file = workdir / "summary.json"
    if distributed.agree(summary_file.exists()):
      if distributed.is_first():
        print(f"{workdir} holds a complete run; nothing to do")
      summaries[seed] = run_folder.read_json(summary_file)
    else:
      run_folder.make(workdir)
      left[workdir] = _with_seed(config, seed)
  with (
    contextlib.ExitStack() as stack,
    signals.StopRequests() as requests,
    jax.default_matmul_precision(
      l2t_jax.config.PRECISIONS[config.precision][1]
    ),
    run_folder.storage_errors(list(left)),
  ):
    for workdir in left:
      stack.enter_context(run_folder.lock(workdir))
    while left:
      group = _first_group(left)
      with contextlib.suppress(_Regroup):
        summaries |= _train({w: left[w] for w in group}, given, requests)
        left = {w: c for w, c in left.items() if w not in group}
  return [summaries[seed] for seed in workdirs]


def _first_group(workdirs):
  """Choose the runs that go on from the same iteration, with the first."""
  steps = {w: checkpoint.steps_in(w / CHECKPOINTS) for w in workdirs}
  if set.intersection(*steps.values()):
    return list(steps)  # Some had come a little further: they go back.
  newest = [max(one, default=0) for one in steps.values()]
  return [w for w, step in zip(steps, newest, strict=True) if step == newest[0]]


def check(
  config: ml_collections.ConfigDict,
  workdirs: Mapping[int, str | os.PathLike[str]],
  given: setup.Given = setup.NOTHING,
) -> None:
  """Refuse what cannot run, before anything is loaded or written.

  Args:
    config: the fields of l2t_jax/config.py, but for `seed`.
    workdirs: seed -> folder of its run.
    given: what is there already.

  Raises:
    errors.InputError: for a wrong value, source weights that are missing, and a
      folder that holds a run of another config.
  """
  for seed, workdir in workdirs.items():
    workdir = pathlib.Path(workdir)
    l2t_jax.config.check(
      _with_seed(config, seed),
      names_target=given.target is None,
      names_task=given.task is None,
    )
    check_same_config(workdir, _with_seed(config, seed))
    _check_whole(workdir)
  setup.check_source_files(config, given)
  tracking.check_trackers(config.trackers)


def _check_whole(workdir):
  if (workdir / "config.json").exists():
    return
  if steps := checkpoint.steps_in(workdir / CHECKPOINTS):
    raise errors.InputError(
      f"{workdir} holds a checkpoint of iteration {max(steps)}, but no"
      " config.json that says of what run; bring it back, or use another"
      " --workdir"
    )


def _train(configs, given, requests):
  """Train some seeds from where they are; return seed -> summary."""
  first = next(iter(configs.values()))
  run = setup.build(first, given)
  shapes = run.state_shapes
  if len(configs) > 1:
    shapes = sharding.stacked(shapes, len(configs))
  compile_step = trainer.step_compiler(run, shapes, len(configs))
  compiling = compile_step(mode=run.modes[0])
  # Meanwhile:
  states = [run.create_state(config.seed) for config in configs.values()]
  tracking.import_trackers(first.trackers)
  # Before anything in the folders changes: it may not fit.
  programs = trainer.compile(run, compile_step, compiling, first, len(configs))
  for workdir, config in configs.items():
    run_folder.write_json(workdir / "config.json", json.loads(config.to_json()))
  display = logs.Progress(
    first.epochs * run.dataset.steps_per_epoch,
    first.batch_size * len(configs),
    quiet=not distributed.is_first(),
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(display)
    seeds = [
      loop.Seed(
        config,
        workdir,
        run.dataset.with_seed(config.seed),
        stack.enter_context(checkpoint.Checkpoints(workdir / CHECKPOINTS)),
        {"seconds": 0.0, "val_accuracy": _WORST, "inputs": run.inputs},
        f"seed {config.seed}: " if len(configs) > 1 else "",
      )
      for workdir, config in configs.items()
    ]
    step, states = _restore(seeds, states, display)
    _open_logs(seeds, step, stack)
    display.say(_headline(run, states[0], first))
    if step:
      display.say(f"resuming after iteration {step}")
    display.begin(step)
    state = trainer.stack(states, like=shapes)
    del states  # The copies would stay in the accelerator's memory.
    loop.Loop(run, programs, seeds, display, requests).train(state, step)
  return {
    seed.config.seed: _summarise(run, programs, seed, len(seeds))
    for seed in seeds
  }


def _open_logs(seeds, step, stack):
  """Let the process that writes record what comes after an iteration."""
  if distributed.is_first():
    for seed in seeds:
      log = logs.MetricsLog(
        seed.workdir,
        from_step=step,
        trackers=seed.config.trackers,
        config=json.loads(seed.config.to_json()),
      )
      seed.log = stack.enter_context(log)


def _restore(seeds, states, display):
  """Take up the newest checkpoint that all seeds have.

  Returns:
    (iterations done, states).

  Raises:
    errors.StorageError: it was damaged, and there is none before.
    _Regroup: it was damaged, and now is out of the way.
  """
  shared = set.intersection(*(set(seed.checkpoints.steps()) for seed in seeds))
  step = distributed.agree(max(shared, default=0))
  if not step:
    return step, states
  restored = []
  for seed, state in zip(seeds, states, strict=True):
    try:
      restored.append(seed.restore(step, state))
    except checkpoint.DamagedError as error:
      _set_aside(seed, step, error, display)
  for seed in seeds:
    seed.checkpoints.drop_after(step)
  return step, restored


def _set_aside(seed, step, error, display):
  if len(seed.checkpoints.steps()) == 1:
    raise errors.StorageError(
      f"{seed.workdir}: the only checkpoint, of iteration {step}, is damaged:"
      f" {error}; bring it back from a copy, or use another --workdir"
    ) from error
  place = seed.checkpoints.set_aside(step)
  display.say(
    f"the checkpoint of iteration {step} is damaged ({error}) and now is"
    f" {place}; going on from the one before"
  )
  raise _Regroup from error


def _write_transfer_map(run, seed):
  epochs = [
    record
    for record in run_folder.read_metrics(seed.workdir)
    if record["kind"] == "epoch"
  ]
  weights = seed.progress["channel_weights"]
  fields = seed.config.transfer
  start, maximum = transfer.start_and_maximum(fields.pair_activation)
  setting = transfer_map.Setting(
    seed.config.method,
    list(run.source_taps.items()),
    list(run.target_taps.items()),
    sources=list(run.sources) if len(run.sources) > 1 else (),
    frozen=bool(fields.map),
    start=start,
    maximum=maximum,
  )
  arrays = {name: np.array(values) for name, values in weights.items()}
  map_picture.write(seed.workdir, transfer_map.collect(setting, epochs, arrays))


def _summarise(run, programs, seed, num_seeds):
  """Write what a run that is complete leaves at its end."""
  summary = _summary(run, programs, seed, num_seeds)
  if distributed.is_first():
    if run.weights_fn:
      _write_transfer_map(run, seed)
    run_folder.write_json(seed.workdir / "summary.json", summary)
  return summary


def _summary(run, programs, seed, num_seeds):
  config, dataset, progress = seed.config, run.dataset, seed.progress
  return {
    "method": config.method,
    "seed": config.seed,
    "val_accuracy": progress["val_accuracy"],
    "test_accuracy": progress["test_accuracy"],
    "best_epoch": progress["best_epoch"],
    "epochs": config.epochs,
    # Of training and evaluation, without compiling the training step; where
    # several seeds trained together, this one's share.
    "seconds": round(progress["seconds"], 1),
    "compile_seconds": round(programs.train_step.seconds, 1),
    # Of the training step, of all seeds that trained together.
    "memory_bytes": programs.train_step.memory_bytes,
    "flops": programs.train_step.flops,
    "hypergradient_mode": programs.mode if run.learns else None,
    "seeds_together": num_seeds,
    "split_hash": dataset.split_hash,
    "num_train": dataset.num_train,
    "num_val": dataset.num_val,
    "num_test": dataset.num_test,
    "num_unlabeled": dataset.num_unlabeled,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "processes": jax.process_count(),
    "versions": {
      "python": platform.python_version(),
      **{module.__name__: module.__version__ for module in _VERSIONED},
    },
  }


def _headline(run, state, config):
  """Say what is about to be trained on what."""
  dataset = run.dataset
  count = sum(
    leaf.size for leaf in jax.tree.leaves(state.inner.params["target"])
  )
  text = (
    f"{config.method}: {config.target.model}, {count:,} parameters, on"
    f" {dataset.num_train} training, {dataset.num_val} validation and"
    f" {dataset.num_test} test images of {dataset.num_classes} classes"
    f" (split {dataset.split_hash})"
  )
  return "\n".join((text, *run.notes))


def _with_seed(config, seed):
  config = copy.deepcopy(config)
  config.seed = seed
  return config


def check_same_config(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
  """Make sure that a folder, if there is one, holds a run of this config.

  Raises:
    errors.InputError: naming the fields that differ.
  """
  path = workdir / "config.json"
  if not path.exists():
    return
  old = l2t_jax.config.comparable(run_folder.read_json(path))
  new = l2t_jax.config.comparable(json.loads(config.to_json()))
  differences = [
    f"{field} was {old.get(field)!r}, is {new.get(field)!r}"
    for field in new | old
    if old.get(field) != new.get(field)
    and field not in l2t_jax.config.FREE_FIELDS
  ]
  if differences:
    raise errors.InputError(
      f"{workdir} holds a run of another config: {'; '.join(differences)};"
      " use another --workdir"
    )
