"""The demo: learn MNIST from 50 labelled images and another set of digits.

    python -m examples.digits

It trains a source on scikit-learn's digits (configs/digits_source.py), then a
small target on five images per class of MNIST (configs/digits.py) by each
method and seed, and prints a table. What is done is kept in --workdir: the same
command again goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import time
from typing import Any

# XLA warns in long lines that code from its own cache may not fit this CPU.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import logging
import jax
import ml_collections
import numpy as np
from rich import console, table

from configs import digits, digits_source
from l2t_jax import experiment, types

_OUT = console.Console(file=sys.stdout, highlight=False)
_METHODS = "scratch,fm_one_to_one,l2t_ww"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--methods", default=_METHODS)
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/demo")
  args = parser.parse_args()
  start = time.time()
  logging.set_verbosity(logging.WARNING)
  use_compilation_cache(args.workdir / "cache")
  source_dir = args.workdir / "source"
  train("source", digits_source.get_config(), source_dir)
  summaries = {}
  for method in args.methods.split(","):
    summaries[method] = []
    for seed in range(args.seeds):
      config = digits.get_config()
      config.method, config.seed = method, seed
      config.source.weights = str(source_dir / "target.safetensors")
      name = f"{method}_seed{seed}"
      summaries[method].append(train(name, config, args.workdir / name))
  _OUT.print(make_table(summaries))
  _OUT.print(f"{time.time() - start:.0f} s in all")
  for path in sorted(args.workdir.glob("l2t_ww_*/transfer_map.png"))[:1]:
    _OUT.print(f"what went where: {path}", soft_wrap=True)


def use_compilation_cache(folder: pathlib.Path) -> None:
  """Compile each method once for all of its seeds."""
  jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def train(
  name: str, config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any]:
  """Train one network, or read its summary where it is done.

  Its lines of every epoch go to train.log in `workdir`.
  """
  start = time.time()
  workdir.mkdir(parents=True, exist_ok=True)
  with (
    _OUT.status(f"training {name}"),
    (workdir / "train.log").open("a") as log,
    contextlib.redirect_stdout(log),
  ):
    summary = experiment.train_and_evaluate(config, workdir)
  _OUT.print(
    f"{name:24} validation {summary['val_accuracy']:6.1%}"
    f"  test {summary['test_accuracy']:6.1%}  {time.time() - start:4.0f} s"
  )
  return summary


def make_table(summaries: dict[str, list[dict[str, Any]]]) -> table.Table:
  """Set out mean and standard deviation over the seeds of each method."""
  rows = table.Table("method", "validation %", "test %", "s a run")
  rows.title = "Accuracy, mean ± standard deviation over seeds"
  for method, runs in summaries.items():
    values_of = lambda key, runs=runs: np.array([run[key] for run in runs])
    rows.add_row(
      method,
      _mean_and_std(100 * values_of("val_accuracy")),
      _mean_and_std(100 * values_of("test_accuracy")),
      f"{values_of('seconds').mean():.0f}",
    )
  return rows


def _mean_and_std(values: np.ndarray) -> str:
  std = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
  return f"{values.mean():.1f}{std}"


if __name__ == "__main__":
  try:
    main()
  except types.InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
