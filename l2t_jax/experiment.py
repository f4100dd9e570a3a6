"""Train what a config says: the loop, its records and its checkpoints.

Seeds of one experiment can train together, vectorised; each keeps a folder of
its own, which looks as if it had trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import sys
import tempfile
import time
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import jaxlib
import ml_collections
import numpy as np
import optax

from l2t_jax import (
  build,
  checkpoint,
  compilation,
  data,
  logs,
  pretrained,
  sharding,
  transfer_map,
  types,
)

CHECKPOINTS = "checkpoints"
_VERSIONED = (jax, jaxlib, flax, optax, np)
# Accuracies may be errors with a minus: any finite one is better.
_WORST = -sys.float_info.max
# Share of an epoch's time that training may wait for images, and the time in
# seconds from which on it matters.
_WAITING_SHARE, _WAITING_SECONDS = 0.2, 5.0
# Fields that may differ between a run and its resumption.
FREE_FIELDS = ("log_every", "checkpoint_every", "trackers", "data.num_workers")


class DoesNotFit(Exception):
  """Seeds that should train together need more memory than there is."""


class _Programs(NamedTuple):
  """What was compiled for a run."""

  train_step: compilation.Program
  # None where every iteration has a meta update.
  train_step_without_meta: compilation.Program | None
  eval_step: Any  # Jitted; compiled where it is first used.
  mode: str  # How the hypergradient is computed.


@dataclasses.dataclass
class _Seed:
  """One seed's run among those that train together."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  dataset: data.Dataset
  checkpoints: checkpoint.Checkpoints
  log: logs.MetricsLog
  progress: dict[str, Any]  # What its last epoch remembers.


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
    types.InputError: as `train_and_evaluate`.
    DoesNotFit: the seeds need more memory than the accelerator has; their
      folders are as they were.
  """
  check(config, workdirs, given)
  summaries: dict[int, dict[str, Any]] = {}
  # Newest checkpoint -> runs that go on from there.
  left: dict[int, dict[pathlib.Path, ml_collections.ConfigDict]] = {}
  for seed, workdir in workdirs.items():
    workdir = pathlib.Path(workdir)
    summary_file = workdir / "summary.json"
    if summary_file.exists():
      print(f"{workdir} holds a complete run; nothing to do")
      summaries[seed] = json.loads(summary_file.read_text())
    else:
      make_folder(workdir)
      step = checkpoint.newest_step(workdir / CHECKPOINTS)
      left.setdefault(step, {})[workdir] = _with_seed(config, seed)
  for step, configs in left.items():
    with jax.default_matmul_precision(build.PRECISIONS[config.precision][1]):
      summaries |= _train(configs, step, given)
  return [summaries[seed] for seed in workdirs]


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
    build.check(_with_seed(config, seed), given)
    _check_same_config(pathlib.Path(workdir), _with_seed(config, seed))
  build.check_source_files(config, given)


def _evaluate(run, eval_step, inner, split, num_seeds):
  """Return {"loss", "accuracy"} of each seed."""
  totals = [
    eval_step(inner, sharding.shard(batch, run.mesh))
    for batch in run.dataset.eval_batches(split)
  ]
  totals = jax.device_get(totals)
  results = []
  for index in range(num_seeds):
    mine = [_take(sums, index, num_seeds) for sums in totals]
    sums = jax.tree.map(lambda *parts: float(np.sum(parts)), *mine)
    results.append(
      {
        "loss": sums["loss"] / sums["count"],
        "accuracy": sums["accuracy"] / sums["count"],
      }
    )
  return results


def _train(configs, step, given):
  """Train some seeds from a step on; return seed -> summary."""
  first = next(iter(configs.values()))
  run = build.build(first, given)
  states = [run.create_state(config.seed) for config in configs.values()]
  # Before anything in the folders changes: it may not fit.
  programs = _compile(run, _stack(states), first, len(states))
  for workdir, config in configs.items():
    _write_json(workdir / "config.json", json.loads(config.to_json()))
  with contextlib.ExitStack() as stack:
    seeds = []
    for index, (workdir, config) in enumerate(configs.items()):
      checkpoints = stack.enter_context(
        checkpoint.Checkpoints(workdir / CHECKPOINTS)
      )
      progress = {"epoch": 0, "seconds": 0.0, "val_accuracy": _WORST}
      if step:
        states[index], progress = checkpoints.restore(states[index])
      log = stack.enter_context(
        logs.MetricsLog(
          workdir,
          from_step=step,
          trackers=config.trackers,
          config=json.loads(config.to_json()),
        )
      )
      dataset = run.dataset.with_seed(config.seed)
      seeds.append(_Seed(config, workdir, dataset, checkpoints, log, progress))
    display = stack.enter_context(
      logs.Progress(
        first.epochs * run.dataset.steps_per_epoch,
        step,
        first.batch_size * len(seeds),
      )
    )
    display.say(_headline(run, states[0], first))
    if step:
      display.say(f"resuming after epoch {seeds[0].progress['epoch']}")
    state = _stack(states)
    del states  # The copies would stay in the accelerator's memory.
    _run_epochs(run, programs, state, seeds, display)
  summaries = {}
  for seed in seeds:
    if run.weights_fn:
      _write_transfer_map(run, seed)
    summary = _summary(run, programs, seed, len(seeds))
    _write_json(seed.workdir / "summary.json", summary)
    summaries[seed.config.seed] = summary
  return summaries


def _compile(run, state, config, num_seeds):
  """Compile training ahead, to know its time and memory.

  Takes the first of the run's modes that fits into memory.
  """
  eval_step = run.eval_step
  if num_seeds > 1:
    eval_step = jax.vmap(eval_step, in_axes=(0, None))
  batch = _stack([run.blank_batch] * num_seeds)
  batch = sharding.shard(batch, run.mesh, axis=int(num_seeds > 1))

  compile_step = functools.partial(
    build.compile_step, run, state, batch, num_seeds=num_seeds
  )
  for mode in run.modes:
    program = compile_step(mode=mode)
    if compilation.fits(program):
      break
  else:
    if num_seeds > 1:
      raise DoesNotFit(
        f"{num_seeds} seeds together need {program.memory_bytes} bytes"
      )
  sparse = run.learns and config.meta.update_every > 1
  return _Programs(
    program,
    compile_step(mode=mode, update_meta=False) if sparse else None,
    jax.jit(eval_step, compiler_options=compilation.options()),
    mode,
  )


def _run_epochs(run, programs, state, seeds, display):
  """Train the epochs that are left, evaluate, record, save."""
  config, steps = seeds[0].config, run.dataset.steps_per_epoch
  for epoch in range(seeds[0].progress["epoch"] + 1, config.epochs + 1):
    start = time.time()
    state, records, waited = _train_epoch(
      run, programs, state, epoch, seeds, display
    )
    trained = time.time() - start
    if waited > max(_WAITING_SHARE * trained, _WAITING_SECONDS):
      display.say(
        f"training waited {waited:.0f} of {trained:.0f} s for images; raise"
        f" config.data.num_workers ({config.data.num_workers}) up to the number"
        " of CPU cores, or keep smaller images"
      )
    evaluate_on = lambda split, state=state: _evaluate(
      run, programs.eval_step, state.inner, split, len(seeds)
    )
    validation = evaluate_on("val")
    for result in validation:
      _check_finite({"val_accuracy": result["accuracy"]}, epoch * steps)
    is_best = [
      result["accuracy"] > seed.progress["val_accuracy"]
      for result, seed in zip(validation, seeds, strict=True)
    ]
    test = evaluate_on("test") if any(is_best) else validation
    seconds = (time.time() - start) / len(seeds)
    for index, seed in enumerate(seeds):
      record, accuracy = records[index], validation[index]["accuracy"]
      record |= {f"val_{name}": v for name, v in validation[index].items()}
      seed.progress |= {
        "epoch": epoch,
        "seconds": seed.progress["seconds"] + seconds,
        "channel_weights": record.pop("channel_weights", None),
      }
      if is_best[index]:
        record["test_accuracy"] = test[index]["accuracy"]
        seed.progress |= {
          "best_epoch": epoch,
          "val_accuracy": accuracy,
          "test_accuracy": record["test_accuracy"],
        }
        _save_target(run, seed, _take(state.inner, index, len(seeds)))
      seed.log.write("epoch", epoch * steps, record)
      name = f"seed {seed.config.seed}  " if len(seeds) > 1 else ""
      display.say(name + _epoch_line(record, config.epochs))
      if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
        mine = _take(state, index, len(seeds))
        seed.checkpoints.save(epoch * steps, mine, seed.progress)


def _train_epoch(run, programs, state, epoch, seeds, display):
  """Train one epoch.

  Returns:
    (state, record of its means for each seed, seconds spent on waiting for
    images).
  """
  config = seeds[0].config
  last_step = epoch * run.dataset.steps_per_epoch
  step = last_step - run.dataset.steps_per_epoch
  learning_rate = float(run.learning_rate_fn(step))
  pending, fetched = [], []
  streams = [seed.dataset.train_batches(epoch - 1) for seed in seeds]
  waited, since = 0.0, time.time()
  for batches in zip(*streams, strict=True):
    waited += time.time() - since
    batch = _stack(batches)
    batch = sharding.shard(batch, run.mesh, axis=int(len(seeds) > 1))
    skips = programs.train_step_without_meta and step % config.meta.update_every
    program = programs.train_step_without_meta if skips else programs.train_step
    state, metrics = program.call(state, run.sources, batch)
    pending.append(metrics)
    step += 1
    if step % config.log_every == 0 or step == last_step:
      pending = jax.device_get(pending)
      by_seed = []
      for index, seed in enumerate(seeds):
        mine = [_take(metrics, index, len(seeds)) for metrics in pending]
        scalars = _scalars(_mean(mine))
        _check_finite(scalars, step)
        seed.log.write("train", step, {"epoch": epoch, **scalars})
        by_seed.append(scalars)
      display.update(epoch, len(pending), _mean(by_seed))
      fetched += pending
      pending = []
    since = time.time()
  records = []
  for index in range(len(seeds)):
    means = _mean([_take(metrics, index, len(seeds)) for metrics in fetched])
    record: dict[str, Any] = {"epoch": epoch, "learning_rate": learning_rate}
    record |= {f"train_{name}": v for name, v in _scalars(means).items()}
    records.append(record | _transfer_record(run.pairs, means))
  return state, records, waited


def _transfer_record(pairs, means):
  """What an epoch's record says of each pair."""
  if "transfer" not in means:
    return {}
  names = [pair.name for pair in pairs]
  by_pair = lambda values: dict(zip(names, values.tolist(), strict=True))
  return {
    "pair_weights": by_pair(means["transfer"]["pair_weights"]),
    "matching_distances": by_pair(means["transfer"]["distances"]),
    "channel_weights": {
      name: weights.tolist()
      for name, weights in means["transfer"]["channel_weights"].items()
    },
  }


def _stack(trees: Sequence[types.PyTree]) -> types.PyTree:
  """Give the arrays of several seeds a leading axis; one seed has none."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _take(tree: types.PyTree, index: int, num_seeds: int) -> types.PyTree:
  """Undo `_stack` for one of the seeds."""
  if num_seeds == 1:
    return tree
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _check_finite(scalars, step):
  for name, value in scalars.items():
    if not math.isfinite(value):
      raise types.InputError(
        f"{name} is {value} within the iterations up to {step}; lower"
        " config.optimizer.learning_rate, config.transfer.beta or"
        " config.meta.learning_rate"
      )


def _mean(metrics):
  """Average each metric over the iterations that have it."""
  names = dict.fromkeys(name for one in metrics for name in one)
  return {
    name: jax.tree.map(
      lambda *values: np.mean(values, axis=0),
      *(one[name] for one in metrics if name in one),
    )
    for name in names
  }


def _scalars(metrics):
  return {k: float(v) for k, v in metrics.items() if k != "transfer"}


def _save_target(run, seed, inner):
  config, image_format = seed.config, run.image_format
  pretrained.save(
    seed.workdir / "target.safetensors",
    jax.device_get({"params": inner.params["target"], **inner.model_state}),
    {
      "model": config.target.model,
      "num_classes": str(run.num_outputs),
      "class_names": json.dumps(list(run.dataset.class_names)),
      "channels": str(image_format.channels),
      "mean": json.dumps(image_format.mean),
      "std": json.dumps(image_format.std),
      "config": config.to_json(),
      "epoch": str(seed.progress["epoch"]),
      "val_accuracy": str(seed.progress["val_accuracy"]),
    },
  )


def _write_transfer_map(run, seed):
  epochs = [
    record
    for record in logs.read_metrics(seed.workdir)
    if record["kind"] == "epoch"
  ]
  weights = seed.progress["channel_weights"]
  transfer_map.write(
    seed.workdir,
    transfer_map.collect(
      epochs,
      {name: np.array(values) for name, values in weights.items()},
      list(run.source_taps.items()),
      list(run.target_taps.items()),
      seed.config.method,
      sources=list(run.sources) if len(run.sources) > 1 else (),
    ),
  )


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


def _epoch_line(record, epochs):
  line = (
    f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.4f}"
    f"  val {record['val_accuracy']:.2%}"
  )
  if "test_accuracy" in record:
    line += f"  (best so far; test {record['test_accuracy']:.2%})"
  return line


def _with_seed(config, seed):
  config = copy.deepcopy(config)
  config.seed = seed
  return config


def make_folder(workdir: pathlib.Path) -> None:
  """Make the folder of a run.

  Raises:
    types.InputError: there is a file in its place.
    types.StorageError: nothing can be written into it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    in_place = isinstance(error, FileExistsError | NotADirectoryError)
    stop = types.InputError if in_place else types.StorageError
    raise stop(
      f"cannot use --workdir={workdir}: {error.strerror}; give a folder that"
      " can be written"
    ) from error


def _check_same_config(workdir, config):
  """Make sure that the folder, if there is one, holds a run of this config."""
  config_file = workdir / "config.json"
  if config_file.exists():
    old = _flatten(json.loads(config_file.read_text()))
    new = _flatten(json.loads(config.to_json()))
    differences = [
      f"{field} was {old.get(field)!r}, is {new.get(field)!r}"
      for field in new | old
      if old.get(field) != new.get(field) and field not in FREE_FIELDS
    ]
    if differences:
      raise types.InputError(
        f"{workdir} holds a run of another config: {'; '.join(differences)};"
        " use another --workdir"
      )


def _write_json(path, content):
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(content, indent=2) + "\n")
  partial.replace(path)


def _flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(nested, sep=".")
