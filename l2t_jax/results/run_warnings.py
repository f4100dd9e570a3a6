from __future__ import annotations

from collections.abc import Sequence
import json
import statistics

from l2t_jax.results import run_reader, transfer_map

_SATURATED = 5.9  # A pair weight above this is at relu6's ceiling.


def find_warnings(runs: Sequence[run_reader.Run]) -> list[str]:
  """Say what a reader should not overlook.

  Args:
    runs: from `find_runs`.

  Returns:
    A sentence each; runs of which the same is to be said share one.
  """
  about: dict[str, list[str]] = {}
  for run in runs:
    for text in _about(run):
      about.setdefault(text, []).append(run.name)
  return _negative_transfer(runs) + [
    f"{_listed(names)}: {text}" for text, names in about.items()
  ]


def _listed(names):
  if len(names) > 3:
    return f"{', '.join(names[:2])} and {len(names) - 2} other runs"
  return ", ".join(names)


def _about(run):
  if run.summary is None:
    done = run.epochs[-1]["epoch"] if run.epochs else 0
    yield f"not finished, {done} of {run.config['epochs']} epochs"
  if run.map and not is_current(run.map):
    yield "its transfer map is of an older version and not shown; train again"
  elif run.learned_pairs:
    weights = [pair["pair_weight"] for pair in run.map["pairs"]]
    dead = sum(weight < transfer_map.IGNORED for weight in weights)
    if dead == len(weights):
      yield "all pair weights went to 0; nothing is transferred any more"
    elif dead:
      limit = transfer_map.IGNORED
      yield f"{dead} of {len(weights)} pairs are dead (weight below {limit})"
    activation = run.config["transfer"].get("pair_activation", "relu6")
    saturated = sum(weight > _SATURATED for weight in weights)
    if saturated and activation == "relu6":
      yield (
        f"{saturated} of {len(weights)} pair weights are at relu6's ceiling of"
        " 6; a larger transfer.beta, or pair_activation=softplus, gives room"
      )


def is_current(content):
  return all("channel_weights" in pair for pair in content["pairs"])


def _negative_transfer(runs):
  """Compare each experiment with scratch on the same labelled images."""
  groups = [
    [run for run in group if run.summary]
    for group in run_reader.by_experiment(runs)
  ]
  groups = [group for group in groups if group]
  mean = lambda group: statistics.mean(r.summary["val_accuracy"] for r in group)
  baselines = {
    _task_of(group[0]): group
    for group in groups
    if group[0].config["method"] == "scratch"
  }
  found = []
  for group in groups:
    scratch = baselines.get(_task_of(group[0]))
    if scratch and mean(group) < mean(scratch):
      show = lambda group: (
        f"{run_reader.accuracy(group[0], mean(group))} on validation"
        f" (mean of {len(group)})"
      )
      found.append(
        f"negative transfer: {run_reader.name_of(group)} reaches {show(group)},"
        f" {run_reader.name_of(scratch)} {show(scratch)}"
      )
  return found


def _task_of(run):
  """What a run and its baseline have in common: all that scratch reads."""
  fields = {
    name: run.config[name]
    for name in ("target", "epochs", "batch_size", "optimizer")
  }
  fields["target"] = {k: v for k, v in fields["target"].items() if k != "taps"}
  fields["data"] = {
    name: value
    for name, value in run.config["data"].items()
    if not name.startswith("unlabeled") and name != "num_workers"
  }
  return json.dumps(fields, sort_keys=True)
