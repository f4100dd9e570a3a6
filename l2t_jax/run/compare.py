"""Compare methods in a notebook: the same networks and images, several seeds.

comparison = l2t.compare(
  lambda rngs: MyTarget(rngs=rngs),
  {"x_train": images, "y_train": labels},
  source=l2t.Source(my_source),
  methods=("scratch", "finetune_source", "fm_one_to_one", "l2t_ww"),
  seeds=5,
)
comparison             # the table, in a notebook
comparison.figure()    # by how much the methods differ, with intervals
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import operator
import os
import pathlib
import tempfile
from typing import NamedTuple

from matplotlib import figure
import ml_collections
import numpy as np

from l2t_jax import errors, models, types
from l2t_jax.method import objectives
from l2t_jax.results import statistics, table_picture, tables
from l2t_jax.run import cells as table_cells
from l2t_jax.run import fit, train
from l2t_jax.runtime import phases

_COLUMN = "comparison"


class Comparison(NamedTuple):
  """The results of several methods with the same seeds."""

  cells: tuple[tables.Cell, ...]  # One per method, with its summaries.
  reference: str  # The method that the others are compared with.
  # Runs are in METHOD/seedN; `load(run, network)` reads their targets.
  workdir: pathlib.Path

  @property
  def differences(self) -> dict[str, statistics.Difference]:
    """Method -> its test accuracy minus the reference's, paired by seed.

    In % for classifiers; the interval is that of
    `results.statistics.paired_difference`.
    """
    grid = tables.make_grid(self.cells, self.reference)
    found = {cell.method: grid.difference(cell) for cell in self.cells}
    return {method: found for method, found in found.items() if found}

  def table(self) -> str:
    """Return the table as Markdown."""
    return tables.to_markdown(tables.make_grid(self.cells, self.reference))

  def _repr_markdown_(self) -> str:
    return self.table()

  def figure(self) -> figure.Figure:
    """Draw the differences, with confidence intervals."""
    return table_picture.draw(self.cells, self.reference)


def compare(
  target: models.Network,
  arrays: Mapping[str, np.ndarray],
  *,
  methods: Sequence[str],
  source: fit.SourceLike | Mapping[str, fit.SourceLike] | None = None,
  seeds: int | Sequence[int] = 3,
  reference: str = "",
  config: ml_collections.ConfigDict | None = None,
  task: types.Task | None = None,
  workdir: str | os.PathLike[str] | None = None,
) -> Comparison:
  """Train a target with several methods and seeds, and compare them.

  Hyper-parameters are those of the config for all methods; to choose them for
  each method, use `python -m l2t_jax.table --tune`. A run that diverges is
  missing in the comparison, with a note in its table; the others go on.

  Args:
    target: see `fit`. A Linen module or a function that makes an NNX module
      starts from other values with each seed; an NNX module that exists always
      starts from its own.
    arrays: see `fit`.
    methods: at least two names for `config.method`.
    source: see `fit`.
    seeds: how many, from config.seed on; or the seeds, all different.
    reference: one of the methods, with which the others are compared; "" for
      the first.
    config: see `fit`; its method is not read.
    task: see `fit`.
    workdir: folder with a run per method and seed, where the same call skips
      what is done and resumes what was cut off; None for a new one among the
      system's temporary files.

  Returns:
    The accuracies, the differences, and where the runs are.

  Raises:
    errors.InputError: as `fit`, before anything is trained.
    errors.Stop: as `train`, except `errors.BadNumbersError`; finished runs are
      kept.
  """
  config = ml_collections.ConfigDict((config or fit.default_config()).to_dict())
  methods = (methods,) if isinstance(methods, str) else tuple(methods)
  reference = reference or next(iter(methods), "")
  if len(set(methods)) < max(2, len(methods)) or reference not in methods:
    raise errors.InputError(
      f"methods are {methods} and the reference is {reference!r}; give at least"
      " two different methods, one of them the reference"
    )
  for method in methods:
    objectives.get_method(method)
  if np.iterable(seeds):  # Also an array, or an integer of NumPy.
    seeds = [operator.index(seed) for seed in seeds]
  else:
    seeds = list(range(config.seed, config.seed + operator.index(seeds)))
  if not seeds or len(set(seeds)) < len(seeds):
    raise errors.InputError(f"seeds are {seeds}; give at least one, each once")
  table_cells.check_rows_differ(methods, config.transfer)
  folder = pathlib.Path(workdir or tempfile.mkdtemp(prefix="l2t_jax_"))
  folder = folder.expanduser()

  def make_training(method):
    config.method = method
    return train.Training(
      fit.make_experiment(
        target, arrays, source=source, config=config, task=task
      )
    )

  for method in methods:  # Before anything is trained.
    make_training(method).build()
  print(f"runs are in {folder}")
  cells = []
  for method in methods:
    training = make_training(method)
    summaries, failures = [], []
    # One by one: on a CPU, convolutions of several seeds at once are slow.
    for seed in seeds:
      try:
        summaries += training.run({seed: folder / method / f"seed{seed}"})
      except errors.BadNumbersError as error:
        phases.take()  # Do not count its time for the next run.
        failures.append(f"seed {seed}: {error}")
        print(f"{method}, {failures[-1]}")
    cells.append(
      tables.Cell(
        method,
        _COLUMN,
        tuple(summaries),
        len(seeds),
        tuple(failures),
        in_percent=task in (None, objectives.CLASSIFICATION),
      )
    )
  return Comparison(tuple(cells), reference, folder)
