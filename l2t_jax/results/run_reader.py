from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import statistics
from typing import Any, NamedTuple

from flax import traverse_util

from l2t_jax import errors
import l2t_jax.config
from l2t_jax.results import transfer_map
from l2t_jax.runtime import run_folder


def is_classification(target: Mapping[str, Any]) -> bool:
  """Whether accuracies are shares of images, and not numbers of any scale.

  Args:
    target: the fields of config.target; early runs have no `task`.
  """
  return target.get("task", "classification") == "classification"


def accuracy_text(value: float, target: Mapping[str, Any], digits: int) -> str:
  """Write an accuracy with some digits in %, or as the user's task gives it."""
  if is_classification(target):
    return f"{value:.{digits}%}"
  return f"{value:.4g}"


class Run(NamedTuple):
  """What a run left in its folder."""

  workdir: pathlib.Path
  name: str  # Tells it apart from the others.
  config: dict[str, Any]
  summary: dict[str, Any] | None  # None where it is not finished.
  epochs: list[dict[str, Any]]  # Records of metrics.jsonl.
  map: dict[str, Any] | None  # transfer_map.json, where there is one.

  @property
  def best(self) -> dict[str, Any]:
    """The record of the best epoch so far; empty before the first."""
    best = [record for record in self.epochs if "test_accuracy" in record]
    return best[-1] if best else {}

  @property
  def is_classifier(self) -> bool:
    """Whether its accuracies are shares of images."""
    return is_classification(self.config["target"])

  @property
  def learned_pairs(self) -> bool:
    """Whether its pair weights were learned, and not given."""
    frozen = self.config["transfer"].get("map")
    return self.map is not None and not self.map["fixed"] and not frozen

  @property
  def learned_channels(self) -> bool:
    frozen = self.config["transfer"].get("map")
    learned = self.map is not None and not self.map["channels_fixed"]
    return learned and not frozen


def find_runs(folders: Sequence[pathlib.Path]) -> list[Run]:
  """Read runs.

  Args:
    folders: of runs, or folders that are searched for some.

  Returns:
    The runs, sorted by path within each folder.

  Raises:
    errors.InputError: a folder does not exist or has no run, or a file of a run
      is damaged.
  """
  found: list[pathlib.Path] = []
  for folder in folders:
    configs = sorted(folder.rglob("config.json"))
    runs = [path.parent for path in configs if _is_run(path)]
    if not runs:
      raise errors.InputError(
        f"there is no run in {folder}: no config.json of one; name the"
        " --workdir of train.py or of a table"
      )
    found += runs
  found = list(dict.fromkeys(path.resolve() for path in found))
  common = os.path.commonpath(found)
  names = [os.path.relpath(path, common) for path in found]
  if names == ["."]:
    names = [found[0].name]
  return [_read(path, name) for path, name in zip(found, names, strict=True)]


def _is_run(config_file):
  """Other programs leave files of that name, too."""
  config = _read_json(config_file)
  return isinstance(config, dict) and {"method", "epochs", "data"} <= set(
    config
  )


def _read(workdir, name):
  metrics = []
  if (workdir / run_folder.METRICS).exists():
    metrics = run_folder.read_metrics(workdir)
  return Run(
    workdir,
    name,
    _read_json(workdir / "config.json"),
    _read_json(workdir / "summary.json"),
    [record for record in metrics if record.get("kind") == "epoch"],
    _read_json(workdir / transfer_map.FILE),
  )


def _read_json(path):
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise errors.InputError(f"{path} is damaged: {error}") from error


def results(runs: Sequence[Run]) -> list[dict[str, str]]:
  """List the rows of the table of runs.

  Args:
    runs: from `find_runs`.

  Returns:
    Column -> text, a row each run; and a row of means after those that differ
    in their seed alone.
  """
  rows = []
  for group in by_experiment(runs):
    rows += [_row(run) for run in group]
    finished = [run for run in group if run.summary]
    if len(finished) > 1:
      row = dict.fromkeys(rows[0], "")
      row |= {
        "run": f"{name_of(group)}: mean ± std",
        "method": group[0].config["method"],
        "seed": f"{len(finished)} seeds",
        "validation": _mean_and_std(finished, "val_accuracy"),
        "test": _mean_and_std(finished, "test_accuracy"),
      }
      rows.append(row)
  return rows


def _row(run):
  summary, best = run.summary or {}, run.best
  seconds, memory = summary.get("seconds"), summary.get("memory_bytes")
  return {
    "run": run.name,
    "method": run.config["method"],
    "seed": str(run.config["seed"]),
    "validation": accuracy(run, best.get("val_accuracy")),
    "test": accuracy(run, best.get("test_accuracy")),
    "best epoch": str(best.get("epoch", "")),
    "epochs": f"{len(run.epochs)} of {run.config['epochs']}",
    "seconds": "" if seconds is None else f"{seconds:,.0f}",
    "memory": f"{memory / 2**20:,.0f} MiB" if memory else "",
  }


def by_experiment(runs):
  """Group runs that differ in their seed alone."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    fields = traverse_util.flatten_dict(run.config, sep=".")
    for free in ("seed", *l2t_jax.config.FREE_FIELDS):
      fields.pop(free, None)
    groups.setdefault(json.dumps(fields, sort_keys=True), []).append(run)
  return list(groups.values())


def name_of(group):
  """What the names of some runs have in common."""
  if len(group) == 1:
    return group[0].name
  return os.path.commonpath([run.name for run in group]) or "all"


def accuracy(run, value):
  if value is None:
    return ""
  return f"{100 * value:.1f} %" if run.is_classifier else f"{value:.4g}"


def _mean_and_std(runs, name):
  values = [run.summary[name] for run in runs]
  mean, std = statistics.mean(values), statistics.stdev(values)
  if runs[0].is_classifier:
    return f"{100 * mean:.1f} ± {100 * std:.1f} %"
  return f"{mean:.4g} ± {std:.2g}"
