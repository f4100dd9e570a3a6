"""Train what a config says: the loop, its records and its checkpoints.

Seeds of one experiment can train together, vectorised; each keeps a folder of
its own, which looks as if it had trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import copy
import functools
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

from l2t_jax import (
  build,
  checkpoint,
  compilation,
  logs,
  loop,
  processes,
  run_folder,
  sharding,
  transfer,
  transfer_map,
  types,
)

CHECKPOINTS = "checkpoints"
_VERSIONED = (jax, jaxlib, flax, optax, np)
# Accuracies may be errors with a minus: any finite one is better.
_WORST = -sys.float_info.max


class DoesNotFit(Exception):
  """Seeds that should train together need more memory than there is."""


class _Regroup(Exception):
  """A checkpoint was set aside: what can go on together may have changed."""

  meets_all_processes = True


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  given: build.Given = build.NOTHING,
) -> dict[str, Any]:
  """Train one experiment, resuming where an earlier call was cut off.

  Args:
    config: the fields of l2t_jax/defaults.py.
    workdir: folder of the run. Gets config.json, metrics.jsonl, tensorboard/,
      checkpoints/, target.safetensors (the target at its best validation
      epoch), summary.json, and where features were matched transfer_map.json
      and transfer_map.png.
    given: what is there already, and not to be loaded as the config says.

  Returns:
    The content of summary.json.

  Raises:
    types.InputError: for a config, data or weights that cannot work, and where
      workdir holds a run of another config.
    types.BadNumbersError: a loss, a gradient or a parameter is not finite; the
      last checkpoint is of before.
    types.StorageError: the folder cannot be written any more.
    types.Interrupted: on SIGTERM, after saving; the same call goes on.
  """
  (summary,) = train_together(config, {config.seed: workdir}, given)
  return summary


def train_together(
  config: ml_collections.ConfigDict,
  workdirs: Mapping[int, str | os.PathLike[str]],
  given: build.Given = build.NOTHING,
) -> list[dict[str, Any]]:
  """Train several seeds of one experiment side by side, under `jax.vmap`.

  Each seed computes what it computes alone, up to rounding. Runs that were cut
  off resume, those that had come equally far together.

  Args:
    config: the fields of l2t_jax/defaults.py, but for `seed`.
    workdirs: seed -> folder of its run; see `train_and_evaluate`.
    given: likewise.

  Returns:
    The contents of the summary.json files, in the order given.

  Raises:
    types.Stop: as `train_and_evaluate`.
    DoesNotFit: the seeds need more memory than the accelerator has; their
      folders are as they were.
  """
  check(config, workdirs, given)
  summaries: dict[int, dict[str, Any]] = {}
  left: dict[pathlib.Path, ml_collections.ConfigDict] = {}
  for seed, workdir in workdirs.items():
    workdir = pathlib.Path(workdir)
    summary_file = workdir / "summary.json"
    if processes.agree(summary_file.exists()):
      if processes.is_first():
        print(f"{workdir} holds a complete run; nothing to do")
      summaries[seed] = run_folder.read_json(summary_file)
    else:
      run_folder.make(workdir)
      left[workdir] = _with_seed(config, seed)
  with (
    contextlib.ExitStack() as stack,
    processes.StopRequests() as requests,
    jax.default_matmul_precision(build.PRECISIONS[config.precision][1]),
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
  given: build.Given = build.NOTHING,
) -> None:
  """Refuse what cannot run, before anything is loaded or written.

  Args:
    config: the fields of l2t_jax/defaults.py, but for `seed`.
    workdirs: seed -> folder of its run.
    given: what is there already.

  Raises:
    types.InputError: for a wrong value, source weights that are missing, and a
      folder that holds a run of another config.
  """
  for seed, workdir in workdirs.items():
    workdir = pathlib.Path(workdir)
    build.check(
      _with_seed(config, seed),
      names_target=given.target is None,
      names_task=given.task is None,
    )
    run_folder.check_same_config(workdir, _with_seed(config, seed))
    _check_whole(workdir)
  build.check_source_files(config, given)
  logs.check_trackers(config.trackers)


def _check_whole(workdir):
  if (workdir / "config.json").exists():
    return
  if steps := checkpoint.steps_in(workdir / CHECKPOINTS):
    raise types.InputError(
      f"{workdir} holds a checkpoint of iteration {max(steps)}, but no"
      " config.json that says of what run; bring it back, or use another"
      " --workdir"
    )


def _train(configs, given, requests):
  """Train some seeds from where they are; return seed -> summary."""
  first = next(iter(configs.values()))
  run = build.build(first, given)
  shapes = run.state_shapes
  if len(configs) > 1:
    shapes = sharding.stacked(shapes, len(configs))
  compile_step = _step_compiler(run, shapes, len(configs))
  compiling = compile_step(mode=run.modes[0])
  # Meanwhile:
  states = [run.create_state(config.seed) for config in configs.values()]
  logs.import_trackers(first.trackers)
  # Before anything in the folders changes: it may not fit.
  programs = _compile(run, compile_step, compiling, first, len(configs))
  for workdir, config in configs.items():
    run_folder.write_json(workdir / "config.json", json.loads(config.to_json()))
  display = logs.Progress(
    first.epochs * run.dataset.steps_per_epoch,
    first.batch_size * len(configs),
    quiet=not processes.is_first(),
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
    state = loop.stack(states, like=shapes)
    del states  # The copies would stay in the accelerator's memory.
    loop.Loop(run, programs, seeds, display, requests).train(state, step)
  return {
    seed.config.seed: _summarise(run, programs, seed, len(seeds))
    for seed in seeds
  }


def _open_logs(seeds, step, stack):
  """Let the process that writes record what comes after an iteration."""
  if processes.is_first():
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
    types.StorageError: it was damaged, and there is none before.
    _Regroup: it was damaged, and now is out of the way.
  """
  shared = set.intersection(*(set(seed.checkpoints.steps()) for seed in seeds))
  step = processes.agree(max(shared, default=0))
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
    raise types.StorageError(
      f"{seed.workdir}: the only checkpoint, of iteration {step}, is damaged:"
      f" {error}; bring it back from a copy, or use another --workdir"
    ) from error
  place = seed.checkpoints.set_aside(step)
  display.say(
    f"the checkpoint of iteration {step} is damaged ({error}) and now is"
    f" {place}; going on from the one before"
  )
  raise _Regroup from error


def _step_compiler(run, shapes, num_seeds):
  """Return `build.compile_step`, for a state of these shapes."""
  batch = loop.stack([run.blank_batch] * num_seeds)
  batch = sharding.shard(batch, run.mesh, axis=int(num_seeds > 1))
  return functools.partial(
    build.compile_step, run, shapes, batch, num_seeds=num_seeds
  )


def _compile(run, compile_step, compiling, config, num_seeds):
  """Compile training ahead, to know its time and memory.

  Takes the first of the run's modes that fits into memory; `compiling` is the
  program of the very first.

  Raises:
    DoesNotFit: seeds together need more memory than is good.
    types.InputError: a single one needs more than there is.
  """
  eval_step = run.eval_step
  if num_seeds > 1:
    eval_step = jax.vmap(eval_step, in_axes=(0, None))
  eval_step = jax.jit(
    eval_step,
    out_shardings=sharding.replicated(run.mesh),
    compiler_options=compilation.options(),
  )
  for mode in run.modes:
    if mode != run.modes[0]:
      compiling = compile_step(mode=mode)
    program = compiling.result()
    if compilation.fits(program):
      break
  else:
    if num_seeds > 1:
      raise DoesNotFit(
        f"{num_seeds} seeds together need {program.memory_bytes} bytes"
      )
    if program.memory_bytes > compilation.memory_limit():
      mib = lambda size: f"{size / 2**20:,.0f} MiB"
      slim = "set config.bilevel.mode=mixed, or " if mode != "mixed" else ""
      raise types.InputError(
        f"an iteration needs {mib(program.memory_bytes)}, and there are"
        f" {mib(compilation.memory_limit())}: {slim if run.learns else ''}lower"
        " config.batch_size or config.data.image_size"
      )
  sparse = run.learns and config.meta.update_every > 1
  return loop.Programs(
    program,
    compile_step(mode=mode, update_meta=False).result() if sparse else None,
    eval_step,
    mode,
  )


def _write_transfer_map(run, seed):
  epochs = [
    record
    for record in logs.read_metrics(seed.workdir)
    if record["kind"] == "epoch"
  ]
  weights = seed.progress["channel_weights"]
  fields = seed.config.transfer
  start, maximum = transfer.start_and_maximum(fields.pair_activation)
  transfer_map.write(
    seed.workdir,
    transfer_map.collect(
      epochs,
      {name: np.array(values) for name, values in weights.items()},
      list(run.source_taps.items()),
      list(run.target_taps.items()),
      seed.config.method,
      sources=list(run.sources) if len(run.sources) > 1 else (),
      frozen=bool(fields.map),
      start=start,
      maximum=maximum,
    ),
  )


def _summarise(run, programs, seed, num_seeds):
  """Write what a run that is complete leaves at its end."""
  summary = _summary(run, programs, seed, num_seeds)
  if processes.is_first():
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
