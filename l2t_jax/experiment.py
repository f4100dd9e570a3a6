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
import os
import pathlib
import platform
import sys
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
  metrics,
  pretrained,
  processes,
  run_folder,
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


class DoesNotFit(Exception):
  """Seeds that should train together need more memory than there is."""


class _Regroup(Exception):
  """A checkpoint was set aside: what can go on together may have changed."""

  meets_all_processes = True


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
  progress: dict[str, Any]  # What the epochs that are done remember.
  label: str = ""  # Before what is said of it; "" where it trains alone.
  log: logs.MetricsLog | None = None  # None where another process writes.
  # Of the unfinished epoch, and of its unfinished logging interval.
  epoch: metrics.Averages = dataclasses.field(default_factory=metrics.Averages)
  interval: metrics.Averages = dataclasses.field(
    default_factory=metrics.Averages
  )

  def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Write a record, in the process that does."""
    if self.log:
      self.log.write(kind, step, values)

  def save(self, step: int, state: types.TrainState) -> None:
    """Save all that the run needs to go on."""
    unfinished = {
      "epoch": self.epoch.to_json(),
      "interval": self.interval.to_json(),
    }
    progress = self.progress | {"unfinished": unfinished}
    self.checkpoints.save(step, state, progress)

  def restore(self, step: int, like: types.TrainState) -> types.TrainState:
    """Take up what `save` saved; return its state."""
    state, self.progress = self.checkpoints.restore(step, like)
    unfinished = self.progress.pop("unfinished")
    self.epoch = metrics.Averages.from_json(unfinished["epoch"])
    self.interval = metrics.Averages.from_json(unfinished["interval"])
    return state


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
    build.check(_with_seed(config, seed), given)
    run_folder.check_same_config(
      pathlib.Path(workdir), _with_seed(config, seed)
    )
  build.check_source_files(config, given)
  logs.check_trackers(config.trackers)


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


def _train(configs, given, requests):
  """Train some seeds from where they are; return seed -> summary."""
  first = next(iter(configs.values()))
  run = build.build(first, given)
  states = [run.create_state(config.seed) for config in configs.values()]
  # Before anything in the folders changes: it may not fit.
  programs = _compile(run, _stack(states), first, len(states))
  for workdir, config in configs.items():
    run_folder.write_json(workdir / "config.json", json.loads(config.to_json()))
  with contextlib.ExitStack() as stack:
    display = stack.enter_context(
      logs.Progress(
        first.epochs * run.dataset.steps_per_epoch,
        first.batch_size * len(configs),
        quiet=not processes.is_first(),
      )
    )
    seeds = [
      _Seed(
        config,
        workdir,
        run.dataset.with_seed(config.seed),
        stack.enter_context(checkpoint.Checkpoints(workdir / CHECKPOINTS)),
        {"seconds": 0.0, "val_accuracy": _WORST},
        f"seed {config.seed}: " if len(configs) > 1 else "",
      )
      for workdir, config in configs.items()
    ]
    step, states = _restore(seeds, states, display)
    if processes.is_first():
      for seed in seeds:
        seed.log = stack.enter_context(
          logs.MetricsLog(
            seed.workdir,
            from_step=step,
            trackers=seed.config.trackers,
            config=json.loads(seed.config.to_json()),
          )
        )
    display.say(_headline(run, states[0], first))
    if step:
      display.say(f"resuming after iteration {step}")
    display.begin(step)
    state = _stack(states)
    del states  # The copies would stay in the accelerator's memory.
    _run_epochs(run, programs, state, step, seeds, display, requests)
  summaries = {}
  for seed in seeds:
    summary = _summary(run, programs, seed, len(seeds))
    if processes.is_first():
      if run.weights_fn:
        _write_transfer_map(run, seed)
      run_folder.write_json(seed.workdir / "summary.json", summary)
    summaries[seed.config.seed] = summary
  return summaries


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


def _compile(run, state, config, num_seeds):
  """Compile training ahead, to know its time and memory.

  Takes the first of the run's modes that fits into memory.
  """
  eval_step = run.eval_step
  if num_seeds > 1:
    eval_step = jax.vmap(eval_step, in_axes=(0, None))
  eval_step = jax.jit(
    eval_step,
    out_shardings=sharding.replicated(run.mesh),
    compiler_options=compilation.options(),
  )
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
    eval_step,
    mode,
  )


def _run_epochs(run, programs, state, step, seeds, display, requests):
  """Train the epochs that are left, evaluate, record, save."""
  config, steps = seeds[0].config, run.dataset.steps_per_epoch
  stopwatch = _Stopwatch(seeds)
  for epoch in range(step // steps + 1, config.epochs + 1):
    start = time.time()
    state, waited = _train_epoch(
      run, programs, state, step, seeds, display, requests, stopwatch
    )
    step = epoch * steps
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
    for result, seed in zip(validation, seeds, strict=True):
      named = {f"val_{name}": value for name, value in result.items()}
      _check_finite(named, step, seed)
    is_best = [
      result["accuracy"] > seed.progress["val_accuracy"]
      for result, seed in zip(validation, seeds, strict=True)
    ]
    test = evaluate_on("test") if any(is_best) else validation
    stopwatch.lap()
    is_time = epoch % config.checkpoint_every == 0 or epoch == config.epochs
    leaves = requests.after(step)
    for index, seed in enumerate(seeds):
      record = _epoch_record(run, seed, epoch, validation[index])
      if is_best[index]:
        record["test_accuracy"] = test[index]["accuracy"]
        seed.progress |= {
          "best_epoch": epoch,
          "val_accuracy": validation[index]["accuracy"],
          "test_accuracy": record["test_accuracy"],
        }
        _save_target(run, seed, _take(state.inner, index, len(seeds)), epoch)
      seed.record("epoch", step, record)
      display.say(seed.label + _epoch_line(record, config.epochs))
      if is_time or leaves:
        seed.save(step, _take(state, index, len(seeds)))
    if leaves and epoch < config.epochs:
      _interrupt(step, run, config)


class _Stopwatch:
  """Adds time that passes to what the seeds remember, an equal share to each.

  Resumed runs thus count what was spent before.
  """

  def __init__(self, seeds: Sequence[_Seed]):
    self._seeds = seeds
    self._since = time.time()

  def lap(self) -> float:
    """Add the time since the last call, and return it in seconds."""
    now = time.time()
    lap, self._since = now - self._since, now
    for seed in self._seeds:
      seed.progress["seconds"] += lap / len(self._seeds)
    return lap


def _train_epoch(
  run, programs, state, step, seeds, display, requests, stopwatch
):
  """Train the rest of an epoch.

  Returns:
    (state, seconds spent on waiting for images).
  """
  config, steps = seeds[0].config, run.dataset.steps_per_epoch
  epoch, start = divmod(step, steps)
  last_step = (epoch + 1) * steps
  pending = []
  streams = [seed.dataset.train_batches(epoch, start) for seed in seeds]
  waited, since = 0.0, time.time()
  for batches in zip(*streams, strict=True):
    waited += time.time() - since
    batch = _stack(batches)
    batch = sharding.shard(batch, run.mesh, axis=int(len(seeds) > 1))
    skips = programs.train_step_without_meta and step % config.meta.update_every
    program = programs.train_step_without_meta if skips else programs.train_step
    state, values = program.call(state, run.sources, batch)
    pending.append(values)
    step += 1
    ends_interval = step % config.log_every == 0 or step == last_step
    # At the end of an epoch, evaluation comes first.
    leaves = step < last_step and requests.after(step)
    saves = step < last_step and (
      leaves
      or (config.checkpoint_steps and step % config.checkpoint_steps == 0)
    )
    if ends_interval or saves:
      pending = jax.device_get(pending)
      for index, seed in enumerate(seeds):
        mine = [_take(values, index, len(seeds)) for values in pending]
        _average(seed, mine, step, run.pairs, display)
      display.update(epoch + 1, len(pending), seeds[0].interval.means())
      pending = []
    if ends_interval:
      for seed in seeds:
        _end_interval(seed, step, epoch + 1)
    if saves:
      stopwatch.lap()
      for index, seed in enumerate(seeds):
        seed.save(step, _take(state, index, len(seeds)))
    if leaves:
      _interrupt(step, run, config)
    since = time.time()
  return state, waited


def _average(seed, iterations, step, pairs, display):
  """Add iterations up to `step` to the averages, but for what was skipped."""
  first = step - len(iterations) + 1
  for number, values in enumerate(iterations, start=first):
    if "skipped" not in values:
      _check_finite(values, number, seed, pairs)
    elif bad := metrics.bad_numbers(values, pairs):
      what = "iteration" if values["skipped"] else "meta update of iteration"
      display.say(
        f"{seed.label}{what} {number} is skipped: not finite: {', '.join(bad)}"
      )
      values = metrics.without_bad_numbers(values)
    seed.epoch.add(values)
    seed.interval.add(values)


def _end_interval(seed, step, epoch):
  means = metrics.scalars(seed.interval.means())
  if means.get("skipped") == 1:
    raise types.BadNumbersError(
      f"{seed.label}all iterations of the logging interval up to {step} were"
      " skipped;"
      f" {_advice(seed)}"
    )
  seed.record("train", step, {"epoch": epoch, **means})
  seed.interval = metrics.Averages()


def _interrupt(step, run, config):
  total = config.epochs * run.dataset.steps_per_epoch
  raise types.Interrupted(
    f"asked to stop; saved after iteration {step} of {total}, and the same"
    " command goes on from there"
  )


def _epoch_record(run, seed, epoch, validation):
  """Return an epoch's record, and begin the next one's averages."""
  means = seed.epoch.means()
  seed.epoch = metrics.Averages()
  record: dict[str, Any] = {
    "epoch": epoch,
    "learning_rate": float(
      run.learning_rate_fn((epoch - 1) * run.dataset.steps_per_epoch)
    ),
  }
  record |= {f"train_{name}": v for name, v in metrics.scalars(means).items()}
  transferred = _transfer_record(run.pairs, means)
  seed.progress["channel_weights"] = transferred.pop("channel_weights", None)
  record |= transferred
  return record | {f"val_{name}": v for name, v in validation.items()}


def _transfer_record(pairs, means):
  """What an epoch's record says of each pair."""
  names = [pair.name for pair in pairs]
  by_pair = lambda values: dict(zip(names, values.tolist(), strict=True))
  record = {}
  if "transfer" in means:
    record = {
      "pair_weights": by_pair(means["transfer"]["pair_weights"]),
      "matching_distances": by_pair(means["transfer"]["distances"]),
      "channel_weights": {
        name: weights.tolist()
        for name, weights in means["transfer"]["channel_weights"].items()
      },
    }
  if "meta_grad_norms" in means:
    record["meta_grad_norms"] = by_pair(means["meta_grad_norms"])
  return record


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


def _check_finite(values, step, seed, pairs=()):
  """Raise a `types.BadNumbersError` that names what is not finite."""
  bad = metrics.bad_numbers(values, pairs)
  if bad:
    raise types.BadNumbersError(
      f"{seed.label}iteration {step}: not finite: {', '.join(bad)};"
      f" {_advice(seed)}"
    )


def _advice(seed):
  kept = seed.checkpoints.steps()
  last = f"is of iteration {kept[-1]}" if kept else "does not exist yet"
  return (
    f"the last good checkpoint {last}. The same command with"
    " --config.bad_numbers=skip goes on without such iterations; in another"
    " --workdir, lower config.optimizer.learning_rate, config.transfer.beta or"
    " config.meta.learning_rate, or set config.optimizer.clip_norm or"
    " config.meta.clip_norm"
  )


def _save_target(run, seed, inner, epoch):
  config, image_format = seed.config, run.image_format
  variables = sharding.gather(
    {"params": inner.params["target"], **inner.model_state}
  )
  if not processes.is_first():
    return
  pretrained.save(
    seed.workdir / "target.safetensors",
    variables,
    {
      "model": config.target.model,
      "num_classes": str(run.num_outputs),
      "class_names": json.dumps(list(run.dataset.class_names)),
      "channels": str(image_format.channels),
      "mean": json.dumps(image_format.mean),
      "std": json.dumps(image_format.std),
      "config": config.to_json(),
      "epoch": str(epoch),
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
