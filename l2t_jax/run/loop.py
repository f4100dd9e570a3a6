"""The loop of a run: iterations, evaluations, records, checkpoints.

Seeds may train together; what is theirs alone stands in `Seed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from l2t_jax import data, errors, types
from l2t_jax.method import pair_sets
from l2t_jax.models import weight_files
from l2t_jax.results import run_reader
from l2t_jax.run import setup, trainer
from l2t_jax.runtime import (
  checkpoint,
  distributed,
  logs,
  metrics,
  sharding,
  signals,
)

# Share of an epoch's time that training may wait for images, and the time in
# seconds from which on it matters.
_WAITING_SHARE, _WAITING_SECONDS = 0.2, 5.0
_MAX_SKIPS = 20  # In a row: a run that only skips has come to an end.


@dataclasses.dataclass
class Seed:
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
  skips: int = 0  # In a row, up to the last iteration.

  def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Write a record, in the process that does."""
    if self.log:
      self.log.write(kind, step, values)

  def save(self, step: int, state: types.TrainState) -> None:
    """Save all that the run needs to go on."""
    unfinished = {
      "epoch": self.epoch.to_json(),
      "interval": self.interval.to_json(),
      "skips": self.skips,
    }
    progress = self.progress | {"unfinished": unfinished}
    self.checkpoints.save(step, state, progress)

  def restore(self, step: int, like: types.TrainState) -> types.TrainState:
    """Take up what `save` saved; return its state.

    Raises:
      errors.InputError: what the run reads is not what it was.
      checkpoint.DamagedError: it cannot be read.
    """
    inputs = self.progress["inputs"]
    state, self.progress = self.checkpoints.restore(step, like)
    # Earlier checkpoints do not say.
    before = self.progress.setdefault("inputs", inputs)
    if changed := [name for name in inputs if before.get(name) != inputs[name]]:
      raise errors.InputError(
        f"{self.workdir} holds a run that is not done, but"
        f" {' and '.join(changed)} changed since iteration {step}; bring them"
        " back, or use another --workdir"
      )
    unfinished = self.progress.pop("unfinished")
    self.epoch = metrics.Averages.from_json(unfinished["epoch"])
    self.interval = metrics.Averages.from_json(unfinished["interval"])
    self.skips = unfinished.get("skips", 0)  # Earlier checkpoints do not say.
    return state

  def average(
    self,
    iterations: Sequence[Mapping[str, types.PyTree]],
    step: int,
    pairs: Sequence[pair_sets.Pair],
    display: logs.Progress,
  ) -> None:
    """Add iterations up to `step` to the averages, but for what was skipped.

    Raises:
      errors.BadNumbersError: one is not finite, and was not skipped; or too
        many were, in a row.
    """
    first = step - len(iterations) + 1
    kept = []
    for number, values in enumerate(iterations, start=first):
      self.skips = self.skips + 1 if values.get("skipped") else 0
      if "skipped" not in values:
        self.check_finite(values, number, pairs)
      elif bad := metrics.bad_numbers(values, pairs):
        what = "iteration" if values["skipped"] else "meta update of iteration"
        display.say(
          f"{self.label}{what} {number} is skipped: not finite:"
          f" {', '.join(bad)}"
        )
        values = metrics.without_bad_numbers(values)
      if self.skips == _MAX_SKIPS:
        raise errors.BadNumbersError(
          f"{self.label}the {_MAX_SKIPS} iterations up to {number} were all"
          f" skipped; {self._advice()}"
        )
      kept.append(values)
    self.epoch.add(kept)
    self.interval.add(kept)

  def end_interval(self, step: int, epoch: int) -> None:
    """Record a logging interval."""
    means = metrics.scalars(self.interval.means())
    self.record("train", step, {"epoch": epoch, **means})
    self.interval = metrics.Averages()

  def end_epoch(self, epoch: int) -> dict[str, types.PyTree]:
    """Return an epoch's averages, and begin the next one's.

    Raises:
      errors.BadNumbersError: all of it was skipped.
    """
    means, self.epoch = self.epoch.means(), metrics.Averages()
    if means.get("skipped") == 1:
      raise errors.BadNumbersError(
        f"{self.label}all iterations of epoch {epoch} were skipped;"
        f" {self._advice()}"
      )
    return means

  def check_finite(
    self,
    values: Mapping[str, types.PyTree],
    step: int,
    pairs: Sequence[pair_sets.Pair] = (),
  ) -> None:
    """Raise a `errors.BadNumbersError` that names what is not finite."""
    bad = metrics.bad_numbers(values, pairs)
    if bad:
      raise errors.BadNumbersError(
        f"{self.label}iteration {step}: not finite: {', '.join(bad)};"
        f" {self._advice()}"
      )

  def _advice(self):
    kept = self.checkpoints.steps()
    last = f"is of iteration {kept[-1]}" if kept else "does not exist yet"
    same_command = (
      "The same command with --config.bad_numbers=skip goes on without such"
      " iterations; in"
    )
    start = "In" if self.config.bad_numbers == "skip" else same_command
    return (
      f"the last good checkpoint {last}. {start} another --workdir, lower"
      " config.optimizer.learning_rate, config.transfer.beta or"
      " config.meta.learning_rate, or set config.optimizer.clip_norm or"
      " config.meta.clip_norm"
    )


class Loop:
  """Trains some seeds, evaluates after each epoch, records and saves."""

  def __init__(
    self,
    run: setup.Run,
    programs: trainer.Programs,
    seeds: Sequence[Seed],
    display: logs.Progress,
    requests: signals.StopRequests,
  ):
    """Put together what the loop needs.

    Args:
      run: from `setup.build`.
      programs: compiled for it.
      seeds: that train together.
      display: for the user.
      requests: to leave.
    """
    self._run, self._programs, self._seeds = run, programs, seeds
    self._display, self._requests = display, requests
    self._config = seeds[0].config  # The seeds' differ in the seed alone.
    self._since = time.time()

  def train(self, state: types.TrainState, step: int) -> None:
    """Train the iterations that are left.

    Args:
      state: after `step` iterations; of several seeds, along a leading axis.
        It is donated.
      step: iterations done.

    Raises:
      errors.Interrupted: it was asked to leave, and saved.
      errors.BadNumbersError: a loss, a gradient or a parameter is not finite.
      errors.StorageError: a checkpoint cannot be written.
    """
    steps = self._run.dataset.steps_per_epoch
    while step < self._config.epochs * steps:
      state, step = self._train_epoch(state, step)
      self._end_epoch(state, step)

  def _train_epoch(self, state, step):
    """Train the rest of an epoch; return (state, iterations done)."""
    run, config, seeds = self._run, self._config, self._seeds
    epoch, start = divmod(step, run.dataset.steps_per_epoch)
    last_step = step - start + run.dataset.steps_per_epoch
    pending = []
    streams = [seed.dataset.train_batches(epoch, start) for seed in seeds]
    begin = since = time.time()
    waited = 0.0
    for batches in zip(*streams, strict=True):
      waited += time.time() - since
      batch = sharding.shard(
        trainer.stack(batches), run.mesh, axis=int(len(seeds) > 1)
      )
      state, values = self._program(step).call(state, run.sources, batch)
      pending.append(metrics.pack(values))
      step += 1
      is_last = step == last_step
      # At the end of an epoch, evaluation comes first.
      leaves = not is_last and self._requests.after(step)
      every = config.checkpoint_steps
      saves = leaves or (every and step % every == 0 and not is_last)
      ends_interval = is_last or step % config.log_every == 0
      if ends_interval or saves:
        self._average(pending, step)
        pending = []
      if ends_interval:
        for seed in seeds:
          seed.end_interval(step, epoch + 1)
      if saves:
        self._save(state, step)
      if leaves:
        self._interrupt(step)
      since = time.time()
    self._advise(waited, time.time() - begin)
    return state, step

  def _program(self, step):
    """Choose the program of the iteration after `step`."""
    without = self._programs.train_step_without_meta
    if without and step % self._config.meta.update_every:
      return without
    return self._programs.train_step

  def _average(self, pending, step):
    """Fetch the metrics of iterations up to `step`, and add them."""
    fetched = metrics.fetch(pending)
    for index, seed in enumerate(self._seeds):
      mine = [self._take(values, index) for values in fetched]
      seed.average(mine, step, self._run.pairs, self._display)
    epoch = 1 + (step - 1) // self._run.dataset.steps_per_epoch
    means = self._seeds[0].interval.means()
    self._display.update(epoch, len(fetched), means)

  def _advise(self, waited, trained):
    """Say so where training waited for images."""
    if waited > max(_WAITING_SHARE * trained, _WAITING_SECONDS):
      workers, cores = self._config.data.num_workers, os.cpu_count() or 1
      more = f"raise config.data.num_workers ({workers}) up to the {cores} CPU"
      self._display.say(
        f"training waited {waited:.0f} of {trained:.0f} s for images;"
        f" {f'{more} cores, or ' if workers < cores else ''}keep smaller images"
      )

  def _end_epoch(self, state, step):
    """Evaluate, record, save."""
    config = self._config
    epoch = step // self._run.dataset.steps_per_epoch
    validation = self._evaluate(state.inner, "val")
    is_best = []
    for seed, result in zip(self._seeds, validation, strict=True):
      named = {f"val_{name}": value for name, value in result.items()}
      seed.check_finite(named, step)
      is_best.append(result["accuracy"] > seed.progress["val_accuracy"])
    test = validation
    if any(is_best):
      test = self._evaluate(state.inner, "test")
    for index, seed in enumerate(self._seeds):
      record = _epoch_record(self._run, seed, epoch, validation[index])
      if is_best[index]:
        record["test_accuracy"] = test[index]["accuracy"]
        seed.progress |= {
          "best_epoch": epoch,
          "val_accuracy": validation[index]["accuracy"],
          "test_accuracy": record["test_accuracy"],
        }
        _save_target(self._run, seed, self._take(state.inner, index), epoch)
      seed.record("epoch", step, record)
      self._display.say(seed.label + _epoch_line(record, config))
    leaves = self._requests.after(step)
    is_end = epoch == config.epochs
    if leaves or is_end or epoch % config.checkpoint_every == 0:
      self._save(state, step)
    if leaves and not is_end:
      self._interrupt(step)

  def _evaluate(self, inner, split):
    """Return {"loss", "accuracy"} of each seed."""
    totals = [
      self._programs.eval_step(inner, sharding.shard(batch, self._run.mesh))
      for batch in self._run.dataset.eval_batches(split)
    ]
    totals = jax.device_get(totals)
    results = []
    for index in range(len(self._seeds)):
      mine = [self._take(sums, index) for sums in totals]
      sums = jax.tree.map(lambda *parts: float(np.sum(parts)), *mine)
      results.append(
        {
          "loss": sums["loss"] / sums["count"],
          "accuracy": sums["accuracy"] / sums["count"],
        }
      )
    return results

  def _save(self, state, step):
    """Save all seeds, with the time that was spent on them so far."""
    now = time.time()
    for index, seed in enumerate(self._seeds):
      seed.progress["seconds"] += (now - self._since) / len(self._seeds)
      seed.save(step, self._take(state, index))
    self._since = now

  def _interrupt(self, step):
    total = self._config.epochs * self._run.dataset.steps_per_epoch
    raise errors.Interrupted(
      f"asked to stop; saved after iteration {step} of {total}, and the same"
      " command goes on from there"
    )

  def _take(self, tree, index):
    """Undo `stack` for one of the seeds."""
    if len(self._seeds) == 1:
      return tree
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _epoch_record(run, seed, epoch, validation):
  """Return an epoch's record, and begin the next one's averages."""
  means = seed.end_epoch(epoch)
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


def _save_target(run, seed, inner, epoch):
  config, image_format = seed.config, run.image_format
  variables = sharding.gather(
    {"params": inner.params["target"], **inner.model_state}
  )
  if not distributed.is_first():
    return
  weight_files.save(
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


def _epoch_line(record, config):
  show = lambda name: run_reader.accuracy_text(
    record[f"{name}_accuracy"], config.target.task, digits=2
  )
  line = (
    f"epoch {record['epoch']}/{config.epochs}  loss {record['train_loss']:.4f}"
    f"  val {show('val')}"
  )
  if "test_accuracy" in record:
    line += f"  (best so far; test {show('test')})"
  return line
