"""Warnings about runs, such as negative transfer and dead pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from l2t_jax.method import objectives
from l2t_jax.results import run_reader, statistics, tables, transfer_map

_SATURATED = 5.9  # A pair weight above this is at relu6's ceiling.


def find_warnings(runs: Sequence[run_reader.Run]) -> list[str]:
  """List the warnings about runs, for readers of their results.

  Args:
    runs: from `run_reader.find_runs`.

  Returns:
    One sentence per warning; runs with the same warning share a sentence.
  """
  names_of: dict[str, list[str]] = {}
  for run in runs:
    for text in _warnings_of(run):
      names_of.setdefault(text, []).append(run.name)
  return _negative_transfer(runs) + [
    f"{_join(names)}: {text}" for text, names in names_of.items()
  ]


def _join(names: Sequence[str]) -> str:
  if len(names) > 3:
    return f"{', '.join(names[:2])} and {len(names) - 2} other runs"
  return ", ".join(names)


def _warnings_of(run: run_reader.Run) -> Iterator[str]:
  if run.summary is None:
    done = run.epochs[-1]["epoch"] if run.epochs else 0
    yield f"not finished, {done} of {run.config['epochs']} epochs"
  if _trained_on_validation(run):
    yield (
      "validation images took part in training, through the outer loss: the"
      " validation accuracy is optimistic"
    )
  if run.map and run.learned_pairs:
    weights = [pair["pair_weight"] for pair in run.map["pairs"]]
    dead = sum(
      transfer_map.is_ignored(run.map, pair) for pair in run.map["pairs"]
    )
    if dead == len(weights):
      yield "all pair weights went to 0; nothing is transferred any more"
    elif dead:
      yield f"{dead} of {len(weights)} pairs are dead (weight near 0)"
    # Without a look-ahead, pair weights are a softmax and have another maximum.
    saturated = sum(weight > _SATURATED for weight in weights)
    is_relu6 = run.config["transfer"]["pair_activation"] == "relu6"
    method = objectives.get_method(run.config["method"])
    if saturated and is_relu6 and method.looks_ahead:
      yield (
        f"{saturated} of {len(weights)} pair weights are at relu6's ceiling of"
        " 6; a larger transfer.beta, or pair_activation=softplus, gives room"
      )


def _negative_transfer(runs: Sequence[run_reader.Run]) -> list[str]:
  """Compare each experiment with scratch on the same labelled images.

  With several seeds, only a difference that the seeds agree on is reported. The
  accuracy is that on the validation images, unless these took part in training.
  """
  groups = run_reader.by_experiment([run for run in runs if run.summary])
  baselines = [
    group for group in groups if group[0].config["method"] == "scratch"
  ]
  found = []
  for group in groups:
    scratch = next(
      (
        other for other in baselines if run_reader.same_task(group[0], other[0])
      ),
      [],
    )
    is_seen = _trained_on_validation(group[0])
    split = "test" if is_seen else "val"
    compared = statistics.paired_difference(
      _accuracies(group, split), _accuracies(scratch, split)
    )
    if compared is None:
      continue
    if (compared.mean if compared.high is None else compared.high) < 0:
      is_single = compared.high is None
      over = "one seed" if is_single else "with its 95 % interval over seeds"
      found.append(
        f"negative transfer: {run_reader.common_name(group)} minus"
        f" {run_reader.common_name(scratch)} is"
        f" {tables.difference_text(compared, group[0].in_percent)} in"
        f" {'test' if is_seen else 'validation'} accuracy ({over})"
      )
  return found


def _trained_on_validation(run):
  return (run.summary or {}).get("trained_on_validation", False)


def _accuracies(group, split):
  """Return seed -> accuracy of finished runs that know it."""
  return {
    run.config["seed"]: accuracy * (100 if run.in_percent else 1)
    for run in group
    if (accuracy := run.summary[f"{split}_accuracy"]) is not None
  }
