"""Read the files in the folders of runs, and format their accuracies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import json
import os
import pathlib
import statistics
from typing import Any, NamedTuple

from flax import traverse_util

from l2t_jax import errors
from l2t_jax.results import transfer_map
from l2t_jax.runtime import run_folder

TRIALS = "tuning_trials"  # Folder of the runs that tune a table's cell.
TUNING = "tuning.json"  # The chosen values of a cell, and its trials.
UNKNOWN = "–"  # Printed in place of an unknown number.
# Fields of `recipe` in addition to those of the optimizer.
_RECIPE_FIELDS = (
  *("target.label_smoothing", "target.batch_norm_groups", "data.augment"),
  *("data.rand_augment", "data.rand_augment_magnitude", "data.color_jitter"),
  *("data.random_erasing", "data.mixup", "data.cutmix"),
)
_RUN_FIELDS = {"method", "epochs", "data"}  # Every config of a run has them.
# What every method reads, except for fields that begin with one of the second.
_TASK = ("target.", "epochs", "batch_size", "optimizer.", "data.")
_NOT_OF_TASK = ("target.taps", "data.unlabeled", "data.num_workers")


def is_classification(task: str) -> bool:
  """True if accuracies are shares of images, not numbers of any scale."""
  return task == "classification"


def accuracy_text(value: float | None, task: str, digits: int) -> str:
  """Format an accuracy: in % for a classifier, else as the task gives it."""
  if value is None:
    return UNKNOWN
  return f"{value:.{digits}%}" if is_classification(task) else f"{value:.4g}"


class Accuracies(NamedTuple):
  """An accuracy of several seeds, in % for a classifier."""

  values: tuple[float, ...]  # One per seed.
  in_percent: bool

  @property
  def mean(self) -> float | None:
    """Mean over the seeds; None if there are none."""
    return statistics.fmean(self.values) if self.values else None

  @property
  def std(self) -> float | None:
    """Sample standard deviation, over n - 1; None for fewer than two seeds."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None

  def text(self, *, std: bool = True, unit: bool = False) -> str:
    """Format as "mean ± std"; `unit` appends " %" to percentages."""
    if self.mean is None:
      return UNKNOWN
    # Accuracies that are not in % can have any scale.
    of_mean, of_std = (".1f", ".1f") if self.in_percent else (".4g", ".2g")
    text = f"{self.mean:{of_mean}}"
    if std and self.std is not None:
      text += f" ± {self.std:{of_std}}"
    return f"{text} %" if unit and self.in_percent else text


def accuracies(
  summaries: Sequence[Mapping[str, Any]], name: str, in_percent: bool
) -> Accuracies:
  """Collect an accuracy, such as "test_accuracy", if a summary has it."""
  factor = 100 if in_percent else 1
  return Accuracies(
    tuple(
      factor * float(summary[name])
      for summary in summaries
      if summary.get(name) is not None
    ),
    in_percent,
  )


class Run(NamedTuple):
  """The content of a run's folder."""

  workdir: pathlib.Path
  name: str  # Its path, relative to the common parent folder of all runs.
  config: dict[str, Any]
  experiment: str  # Equal for runs that differ only in their seeds.
  summary: dict[str, Any] | None  # None if the run is not finished.
  epochs: list[dict[str, Any]]  # Records of kind "epoch" in metrics.jsonl.
  map: dict[str, Any] | None  # transfer_map.json, if there is one.
  # Dotted names of fields that are paths -> digests of what is there.
  contents: Mapping[str, str] = {}
  tuned: frozenset[str] = frozenset()  # Fields that a table has chosen.

  @property
  def best(self) -> dict[str, Any]:
    """The record of the best epoch so far; empty before the first."""
    if not self.epochs:
      return {}
    return max(self.epochs, key=lambda record: record["val_accuracy"])

  @property
  def in_percent(self) -> bool:
    """True if its accuracies are shares of images, shown in %."""
    return is_classification(self.config["target"]["task"])

  @property
  def learned_pairs(self) -> bool:
    """True if there is a map whose pair weights were learned, not given."""
    return self.map is not None and transfer_map.learned(self.map)[0]

  @property
  def learned_channels(self) -> bool:
    """True if there is a map whose channel weights were learned, not given."""
    return self.map is not None and transfer_map.learned(self.map)[1]


def find_runs(
  folders: Sequence[pathlib.Path], free_fields: Collection[str]
) -> list[Run]:
  """Read all runs in some folders.

  Args:
    folders: folders of runs, or folders that are searched for runs. A table's
      tuning runs are skipped.
    free_fields: dotted names of the config fields, in addition to the seed, in
      which runs of one experiment may differ.

  Returns:
    The runs, sorted by path within each folder.

  Raises:
    errors.InputError: a folder does not exist or has no run, or a file of a run
      is damaged.
  """
  configs: dict[pathlib.Path, dict[str, Any]] = {}
  # Keyed by resolved paths: a run that is found twice counts once.
  for folder in folders:
    found = {}
    for path in sorted(folder.rglob(run_folder.CONFIG)):
      if TRIALS in path.relative_to(folder).parts:
        continue
      config = run_folder.read_json(path)
      # Other programs write a config.json, too.
      if isinstance(config, dict) and set(config) >= _RUN_FIELDS:
        found[path.parent.resolve()] = config
    if not found:
      raise errors.InputError(
        f"there is no run in {folder}: no config.json of a run; name the"
        " --workdir of train.py or of a table"
      )
    configs |= found
  common = os.path.commonpath(configs)
  free = {"seed", *free_fields}
  runs = []
  for workdir, config in configs.items():
    name = os.path.relpath(workdir, common)
    has_metrics = (workdir / run_folder.METRICS).exists()
    metrics = run_folder.read_metrics(workdir) if has_metrics else []
    tuning = run_folder.read_json(workdir.parent / TUNING) or {}
    run = Run(
      workdir,
      workdir.name if name == "." else name,
      config,
      "",
      read_summary(workdir),
      [record for record in metrics if record.get("kind") == "epoch"],
      run_folder.read_json(workdir / transfer_map.FILE),
      run_folder.read_json(workdir / run_folder.CONTENTS) or {},
      frozenset(tuning.get("chosen") or ()),
    )
    fields = flatten(config) | dict(run.contents)
    fixed = {k: v for k, v in fields.items() if k not in free}
    runs.append(run._replace(experiment=json.dumps(fixed, sort_keys=True)))
  return runs


def read_summary(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Read the summary.json of a run; None if the run is not finished."""
  return run_folder.read_json(workdir / run_folder.SUMMARY)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a nested config by their dotted names."""
  return traverse_util.flatten_dict(config, sep=".")


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return dotted name -> value of the fields that say how a target trains."""
  return {
    name: value
    for name, value in flatten(config).items()
    if name.startswith("optimizer.") or name in _RECIPE_FIELDS
  }


def by_experiment(runs: Sequence[Run]) -> list[list[Run]]:
  """Group runs that differ only in their seeds."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(run.experiment, []).append(run)
  return list(groups.values())


def differing_fields(one: Run, other: Run) -> set[str]:
  """Return the dotted names of the fields in which two runs differ.

  Files are compared by content if it is known of both, else by path. What a
  table has tuned for one of the runs is not a difference.
  """
  by_content = one.contents.keys() & other.contents.keys()
  fields = [
    flatten(run.config) | {name: run.contents[name] for name in by_content}
    for run in (one, other)
  ]
  names = fields[0].keys() | fields[1].keys()
  differ = {x for x in names if fields[0].get(x) != fields[1].get(x)}
  return differ - one.tuned - other.tuned


def same_task(one: Run, other: Run) -> bool:
  """Return whether two runs train the same target, alike and on equal images.

  Their methods, what only some methods read, and what a table has tuned for
  each of them, may differ.
  """
  return not any(
    name.startswith(_TASK) and not name.startswith(_NOT_OF_TASK)
    for name in differing_fields(one, other)
  )


def common_name(group: Sequence[Run]) -> str:
  """Return the folder that the names of some runs share, or "all"."""
  if len(group) == 1:
    return group[0].name
  return os.path.commonpath([run.name for run in group]) or "all"
