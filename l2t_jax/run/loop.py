"""The training loop: iterations, evaluations, records and checkpoints.

Several seeds may train together; a `Seed` holds what belongs to one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

from l2t_jax import data, errors, types
from l2t_jax.method import objectives, pair_sets, training
from l2t_jax.models import weight_files
from l2t_jax.results import run_reader
from l2t_jax.run import experiments
from l2t_jax.run import setup as setups
from l2t_jax.run import trainer as trainers
from l2t_jax.runtime import (
  checkpoint,
  distributed,
  logs,
  metrics,
  phases,
  run_folder,
  sharding,
  signals,
)

# The user gets a hint if waiting for images takes more than this share of an
# epoch and more than this many seconds.
_WAITING_SHARE, _WAITING_SECONDS = 0.2, 5.0
# Below any finite accuracy; that of a task may be a negated error.
_WORST = -sys.float_info.max
_MAX_SKIPS = 20  # The run ends after this many consecutive skipped iterations.
# What a run keeps of its best epoch, also in the metadata of the target.
BEST = ("best_epoch", "val_accuracy", "test_accuracy")


@dataclasses.dataclass
class RunState:
  """What a run updates as it goes on, and saves in its checkpoints."""

  inputs: dict[str, str]  # Name -> fingerprint of what training reads.
  seconds: float = 0.0  # Spent on the run, up to its last checkpoint.
  iteration_seconds: float | None = None  # In the fastest whole epoch.
  # These three describe the epoch with the best `val_accuracy`.
  best_epoch: int = 0
  val_accuracy: float = _WORST
  test_accuracy: float | None = None
  # Source tap -> what its features are divided by.
  feature_scales: dict[str, float] | None = None
  # "source->target" -> [C_m], means over the last epoch.
  channel_weights: dict[str, list[float]] | None = None


@dataclasses.dataclass
class Seed:
  """One seed's run among those that train together."""

  experiment: experiments.Experiment
  workdir: pathlib.Path
  dataset: data.Dataset
  checkpoints: checkpoint.Checkpoints
  progress: RunState
  label: str = ""  # Prefix of its messages; "" if it trains alone.
  log: logs.MetricsLog | None = None  # None if another process writes.
  # Averages over the unfinished epoch and the unfinished logging interval.
  epoch: metrics.Averages = dataclasses.field(default_factory=metrics.Averages)
  interval: metrics.Averages = dataclasses.field(
    default_factory=metrics.Averages
  )
  skips: int = 0  # Consecutive skipped iterations, up to the last one.

  @phases.phase("records")
  def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Write a record to the logs, in the process that has them."""
    if self.log:
      self.log.write(kind, step, values)

  @phases.phase("saving")
  def save(self, step: int, state: types.TrainState) -> None:
    """Save a checkpoint."""
    unfinished = {
      "epoch": self.epoch.to_json(),
      "interval": self.interval.to_json(),
      "skips": self.skips,
    }
    progress = dataclasses.asdict(self.progress) | {"unfinished": unfinished}
    self.checkpoints.save(step, state, progress)

  def restore(self, step: int, like: types.TrainState) -> types.TrainState:
    """Restore a checkpoint and return its state.

    Raises:
      errors.InputError: the images or a source have changed.
      checkpoint.DamagedError: the checkpoint cannot be read.
    """
    inputs = self.progress.inputs
    state, content = self.checkpoints.restore(step, like)
    unfinished = content.pop("unfinished")
    self.progress = RunState(**content)
    before = self.progress.inputs
    if changed := [name for name in inputs if before.get(name) != inputs[name]]:
      raise errors.InputError(
        f"{self.workdir} holds a run that is not done, but"
        f" {' and '.join(changed)} changed since iteration {step}; bring them"
        " back, or use another --workdir"
      )
    for averages in (unfinished["epoch"], unfinished["interval"]):
      # Iterations with another value of bad_numbers do not say so.
      done = averages["counts"].get("loss", 0)
      if done and self.experiment.settings.bad_numbers == "skip":
        averages["sums"].setdefault("skipped", 0.0)
        averages["counts"].setdefault("skipped", done)
    self.epoch = metrics.Averages.from_json(unfinished["epoch"])
    self.interval = metrics.Averages.from_json(unfinished["interval"])
    self.skips = unfinished["skips"]
    return state

  def average(
    self,
    iterations: Sequence[Mapping[str, types.PyTree]],
    step: int,
    pairs: Sequence[pair_sets.Pair],
    display: logs.Progress,
  ) -> None:
    """Add the metrics of iterations up to `step` to the averages.

    Skipped iterations are left out.

    Raises:
      errors.BadNumbersError: a metric is not finite and its iteration was not
        skipped, or too many consecutive iterations were.
    """
    first = step - len(iterations) + 1
    names = [pair.name for pair in pairs]
    kept = []
    for number, values in enumerate(iterations, start=first):
      # Without bad_numbers=skip the metrics have no entry "skipped".
      self.skips = self.skips + 1 if values.get("skipped") else 0
      if "skipped" not in values:
        self.check_finite(values, number, pairs)
      elif bad := metrics.bad_numbers(values, names):
        what = "iteration" if values["skipped"] else "meta update of iteration"
        values = metrics.without_bad_numbers(values)
        if left := metrics.bad_numbers(values, names):
          raise errors.BadNumbersError(
            f"{self.label}iteration {number}: not finite: {', '.join(left)},"
            " although loss and gradient are; mend the accuracy of the task"
          )
        display.say(
          f"{self.label}{what} {number} is skipped: not finite:"
          f" {', '.join(bad)}"
        )
      if self.skips == _MAX_SKIPS:
        raise errors.BadNumbersError(
          f"{self.label}the {_MAX_SKIPS} iterations up to {number} were all"
          f" skipped; {self._advice()}"
        )
      kept.append(values)
    self.epoch.add(kept)
    self.interval.add(kept)

  def end_interval(self, step: int, epoch: int) -> None:
    """Write the averages of a logging interval, and begin the next one."""
    means = metrics.scalars(self.interval.means())
    self.record("train", step, {"epoch": epoch, **means})
    self.interval = metrics.Averages()

  def end_epoch(self, epoch: int) -> dict[str, types.PyTree]:
    """Return the averages of an epoch, and begin the next one.

    Raises:
      errors.BadNumbersError: all of its iterations were skipped.
    """
    means, self.epoch = self.epoch.means(), metrics.Averages()
    if "loss" not in means:
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
    *,
    can_skip: bool = True,
  ) -> None:
    """Raise an `errors.BadNumbersError` that names what is not finite.

    Args:
      values: metrics of an iteration or an evaluation.
      step: iterations done.
      pairs: to name them.
      can_skip: whether to advise to skip the iteration.
    """
    bad = metrics.bad_numbers(values, [pair.name for pair in pairs])
    if bad:
      raise errors.BadNumbersError(
        f"{self.label}iteration {step}: not finite: {', '.join(bad)};"
        f" {self._advice(can_skip)}"
      )

  def _advice(self, can_skip=False):
    kept = self.checkpoints.steps()
    last = f"is of iteration {kept[-1]}" if kept else "does not exist yet"
    start = "In"
    if can_skip and self.experiment.settings.bad_numbers != "skip":
      start = (
        "The same command with --config.bad_numbers=skip resumes without such"
        " iterations; in"
      )
    method = self.experiment.method
    lower, clip = ["optimizer.learning_rate"], ["optimizer.clip_norm"]
    if "matching" in method.losses:
      lower.append("transfer.beta")
    if any(self.experiment.learns):
      lower.append("meta.learning_rate")
      clip.append("meta.clip_norm")
    either = lambda names: " or ".join(f"config.{name}" for name in names)
    return (
      f"the last good checkpoint {last}. {start} another --workdir, lower"
      f" {either(lower)}, or set {either(clip)}"
    )


class Loop:
  """Trains seeds, evaluates after each epoch, records and saves."""

  def __init__(
    self,
    setup: setups.Setup,
    trainer: trainers.Trainer,
    seeds: Sequence[Seed],
    display: logs.Progress,
    requests: signals.StopRequests,
  ):
    """Prepare the loop.

    Args:
      setup: what is trained.
      trainer: owner of the state.
      seeds: the seeds that train together, in the trainer's order.
      display: progress shown to the user.
      requests: signals that ask the run to stop.
    """
    self._setup, self._trainer, self._seeds = setup, trainer, seeds
    self._display, self._requests = display, requests
    # The settings of all seeds are the same, except for the seed.
    self._settings = seeds[0].experiment.settings
    self._steps_per_epoch = setup.dataset.steps_per_epoch
    self._since = time.time()

  def train(self, step: int) -> None:
    """Train the iterations that are left.

    Args:
      step: iterations done.

    Raises:
      errors.Interrupted: a signal asked the run to stop; it has saved.
      errors.BadNumbersError: a loss, a gradient or a parameter is not finite.
      errors.StorageError: a checkpoint cannot be written.
    """
    while step < self._settings.epochs * self._steps_per_epoch:
      step = self._train_epoch(step)
      self._end_epoch(step)

  @phases.phase("iterations")
  def _train_epoch(self, step):
    """Train the rest of an epoch; return the iterations done."""
    settings, seeds = self._settings, self._seeds
    epoch, start = divmod(step, self._steps_per_epoch)
    last_step = step - start + self._steps_per_epoch
    # Metrics that are still on the device: fetching those of each iteration
    # would make the host wait for it.
    pending = []
    streams = [seed.dataset.train_batches(epoch, start) for seed in seeds]
    begin = since = time.time()
    waited = 0.0
    for batches in zip(*streams, strict=True):
      waited += time.time() - since
      pending.append(self._trainer.step(step, batches))
      step += 1
      is_last = step == last_step
      # At the end of an epoch, `_end_epoch` evaluates before it saves.
      leaves = not is_last and self._requests.should_stop_after(step)
      every = settings.checkpoint_steps
      saves = leaves or (every and step % every == 0 and not is_last)
      ends_interval = is_last or step % settings.log_every == 0
      # Checkpoints contain the averages of the iterations so far.
      if ends_interval or saves:
        self._average(pending, step)
        pending = []
      if ends_interval:
        for seed in seeds:
          seed.end_interval(step, epoch + 1)
      if saves:
        self._save(step)
      if leaves:
        self._interrupt(step)
      since = time.time()
    spent = time.time() - begin
    self._advise(waited, spent)
    if not start:
      for seed in seeds:
        known = seed.progress.iteration_seconds
        mine = spent / self._steps_per_epoch / len(seeds)
        seed.progress.iteration_seconds = min(mine, known or mine)
    return step

  def _average(self, pending, step):
    """Fetch the metrics of iterations up to `step` and average them."""
    fetched = self._trainer.fetch(pending)
    for seed, mine in zip(self._seeds, fetched, strict=True):
      seed.average(mine, step, self._setup.problem.pairs, self._display)
    epoch = 1 + (step - 1) // self._steps_per_epoch
    means = self._seeds[0].interval.means()
    self._display.update(epoch, len(pending), means)

  def _advise(self, waited, trained):
    """Tell the user if training waited for images.

    This is only measured for streamed images. Batches of images in memory are
    computed on the device, after the iterations that are queued there: waiting
    for such a batch is waiting for those iterations.
    """
    if not self._seeds[0].experiment.reading.is_streamed:
      return
    if waited > max(_WAITING_SHARE * trained, _WAITING_SECONDS):
      workers = self._seeds[0].experiment.reading.num_workers
      cores = os.cpu_count() or 1
      more = f"raise config.data.num_workers ({workers}) up to the {cores} CPU"
      self._display.say(
        f"training waited {waited:.0f} of {trained:.0f} s for images;"
        f" {f'{more} cores, or ' if workers < cores else ''}keep smaller images"
      )

  def _end_epoch(self, step):
    """Evaluate, record, save."""
    settings = self._settings
    epoch = step // self._steps_per_epoch
    validation = self._trainer.evaluate("val")
    is_best = []
    for seed, result in zip(self._seeds, validation, strict=True):
      named = {f"val_{name}": value for name, value in result.items()}
      seed.check_finite(named, step, can_skip=False)
      is_best.append(result["accuracy"] > seed.progress.val_accuracy)
    test: Sequence[Mapping[str, float]] = [{}] * len(self._seeds)
    # One program evaluates all seeds: run it if any of them is at its best.
    if any(is_best) and settings.evaluate_test:
      test = self._trainer.evaluate("test")
    for index, seed in enumerate(self._seeds):
      means, progress = seed.end_epoch(epoch), seed.progress
      record = _epoch_record(self._setup, epoch, means, validation[index])
      progress.channel_weights = record.pop("channel_weights", None)
      if is_best[index]:
        progress.best_epoch = epoch
        progress.val_accuracy = validation[index]["accuracy"]
        progress.test_accuracy = test[index].get("accuracy")
        if settings.evaluate_test:
          record["test_accuracy"] = test[index]["accuracy"]
        state = self._trainer.state_of(index)
        _save_target(self._setup, seed, training.evaluated(state))
      seed.record("epoch", step, record)
      line = _epoch_line(record, seed.experiment, is_best[index])
      self._display.say(seed.label + line)
    leaves = self._requests.should_stop_after(step)
    is_end = epoch == settings.epochs
    if leaves or is_end or epoch % settings.checkpoint_every == 0:
      self._save(step)
    if leaves and not is_end:
      self._interrupt(step)

  def _save(self, step):
    """Save a checkpoint of each seed, with the seconds spent on it so far."""
    now = time.time()
    # Seeds that train together share the time equally.
    for index, seed in enumerate(self._seeds):
      seed.progress.seconds += (now - self._since) / len(self._seeds)
      seed.save(step, self._trainer.state_of(index))
    self._since = now

  def _interrupt(self, step):
    total = self._settings.epochs * self._steps_per_epoch
    raise errors.Interrupted(
      f"asked to stop; saved after iteration {step} of {total}, and the same"
      " command resumes from there"
    )


def _epoch_record(setup, epoch, means, validation):
  """Return the record of an epoch, with its channel weights."""
  record: dict[str, Any] = {
    "epoch": epoch,
    "learning_rate": float(
      setup.recipe.learning_rate_fn((epoch - 1) * setup.dataset.steps_per_epoch)
    ),
  }
  record |= {f"train_{name}": v for name, v in metrics.scalars(means).items()}
  record |= _transfer_record(setup.problem.pairs, means)
  return record | {f"val_{name}": v for name, v in validation.items()}


def _transfer_record(pairs, means):
  """Return the fields of an epoch's record that have a value per pair."""
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


def trained_model(
  method: objectives.Method, description: Mapping[str, Any]
) -> str:
  """Return the name of the network that is trained."""
  if method.trains != "target":
    return weight_files.SOURCE_AND_CLASSIFIER
  return description["target"]["model"]


def _class_names(dataset, experiment):
  """Return a name per class; targets may be classes that have none."""
  num_named = len(dataset.class_names)
  is_classification = experiment.task is objectives.CLASSIFICATION
  count = dataset.num_labels if is_classification else num_named
  return [*dataset.class_names, *map(str, range(num_named, count))]


@phases.phase("saving")
def _save_target(setup, seed, target):
  description, image_format = seed.experiment.description, setup.image_format
  # All processes take part in the collective, but only process 0 writes.
  variables = sharding.gather({"params": target.params, **target.model_state})
  if not distributed.is_first():
    return
  weight_files.save(
    seed.workdir / run_folder.TARGET,
    variables,
    {
      "model": trained_model(seed.experiment.method, description),
      "num_classes": str(setup.num_outputs),
      "class_names": json.dumps(_class_names(setup.dataset, seed.experiment)),
      "image_size": str(image_format.size),
      "channels": str(image_format.channels),
      "dtype": str(setup.dataset.dtype),
      "bit_depth": str(setup.dataset.bit_depth),
      "mean": json.dumps(image_format.mean),
      "std": json.dumps(image_format.std),
      "config": json.dumps(description),
      "contents": json.dumps(dict(seed.experiment.contents)),
      **{name: json.dumps(getattr(seed.progress, name)) for name in BEST},
    },
  )


def _epoch_line(record, experiment, is_best):
  task = experiment.description["target"]["task"]
  show = lambda name: run_reader.accuracy_text(
    record[f"{name}_accuracy"], task, digits=2
  )
  line = (
    f"epoch {record['epoch']}/{experiment.settings.epochs}"
    f"  loss {record['train_loss']:.4f}"
  )
  if experiment.method.losses:
    line += f" (target {record['train_target_loss']:.4f})"
  line += f"  val {show('val')}"
  if is_best:
    test = f"; test {show('test')}" if "test_accuracy" in record else ""
    line += f"  (best so far{test})"
  return line
