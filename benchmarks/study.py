r"""Which transfer pays with few labels? The study of benchmarks/RESULTS.md.

    python -m benchmarks.study FILE.jsonl --workdir=local/study --hours=2

trains the runs that are not in the file yet and appends a line for each. The
file alone records what is done, so that any machine can continue, from the
commit that the last line names. SIGTERM and Ctrl-C stop the study; an
interrupted run resumes if its folder still exists.

The screening uses a target with a quarter of VGG-9's width. It tunes every
method on validation images, and then trains five seeds. In its first round, 40
epochs were better than 20 for all ten methods, and most loss weights were best
at the upper end of their grid; the second round has 40 epochs and larger
weights. The finalists use the full width, the values that the second round
chose, and 20 seeds. They are named after the screening and before they train,
with

    --finalists=scratch,fm_one_to_one,lwf,l2t_ww,aft

(no transfer, the best fixed pairs, distillation, the paper's method and the
best cheap learned one); the file records them, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
import json
import pathlib
import re
import shutil
import subprocess
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import measuring
from l2t_jax import cli, errors
import l2t_jax.config
from l2t_jax.results import table_picture, tables, transfer_map
from l2t_jax.run import cells as table_cells
from l2t_jax.run import predictor, tuning
from l2t_jax.runtime import run_folder, signals

_CONFIG = "benchmarks/few_labels.py"
_REFERENCE = "scratch"
# Earlier commits whose training is this one's: on one machine, scratch, afd,
# fm_one_to_one and l2t_ww gave targets that are equal to the bit after three
# epochs. Whoever changes training empties this list.
_EQUAL_COMMITS = (
  "7ddef76f1458983c11915f540f4a2a3b0d1ec78d",
  "17fa5e9d96f232e9be706c1b1b0d1f82e2e8922c",
)


class Stage(NamedTuple):
  """A table of the study."""

  name: str
  width: str  # Argument of the config.
  methods: tuple[str, ...]
  num_seeds: int
  tune: tuple[str, ...] = ()  # As --tune of `l2t_jax.table`.
  tuned_in: str = ""  # The stage whose values are used; "" for its own.


_FIRST_ROUND = (
  *("scratch", "linear_probe", "finetune_source"),
  *("lwf", "at", "aft", "afd"),
  *("fm_single", "fm_one_to_one", "fm_all_to_all"),
)
STAGES = (
  Stage(
    "screening",
    "quarter",
    _FIRST_ROUND,
    num_seeds=5,
    tune=(
      "optimizer.learning_rate=0.01,0.03",
      "epochs=20,40",
      "transfer.beta=0.5,2",
      "lwf.weight=0.3,1,3",
      "at.beta=100,1000",
      "aft.weight=1,10",
      "afd.weight=20,200",
    ),
  ),
  Stage(
    "screening_2",
    "quarter",
    (
      *_FIRST_ROUND,
      *("fm_search", "l2t_ww_joint", "l2t_w_one_to_one", "l2t_ww"),
    ),
    num_seeds=5,
    tune=(
      "optimizer.learning_rate=0.03,0.1",
      "epochs=40",
      "transfer.beta=2,8",
      "meta.learning_rate=1e-4,1e-3,1e-2",
      "lwf.weight=1,3",
      "at.beta=1000,10000",
      "aft.weight=10,100",
      "afd.weight=200,2000",
    ),
  ),
  # The combinations would have too many trials with the same values.
  Stage(
    "combinations",
    "quarter",
    ("lwf+fm_one_to_one", "lwf+l2t_ww"),
    num_seeds=5,
    tune=(
      "epochs=40",
      "optimizer.learning_rate=0.03,0.1",
      "transfer.beta=2,8",
      "meta.learning_rate=1e-3",
      "lwf.weight=1,3",
    ),
  ),
  # Its methods are the finalists that the file names.
  Stage("finalists", "full", (), num_seeds=20, tuned_in="screening_2"),
)


def make_cells(
  stage: Stage, workdir: pathlib.Path, overrides: Sequence[str]
) -> list[table_cells.Cell]:
  """Return the cells of a stage, with the values that another stage chose."""
  config = cli.load_config(f"{_CONFIG}:{stage.width}", overrides)
  cells = table_cells.make_cells(
    {stage.name: config}, stage.methods, stage.num_seeds, workdir
  )
  if not stage.tuned_in:
    return cells
  tuned = []
  for cell in cells:
    record = run_folder.read_json(
      workdir / stage.tuned_in / cell.method / table_cells.TUNING
    )
    if record is None or record["chosen"] is None:
      raise errors.InputError(
        f"{cell.method} is not tuned yet: {stage.tuned_in} comes first"
      )
    config = cli.with_fields(cell.config, record["chosen"])
    tuned.append(cell._replace(config=config))
  return tuned


def jobs(
  stage: Stage, cells: Sequence[table_cells.Cell]
) -> Iterator[table_cells.Cell]:
  """Yield the runs of a stage one by one; see `tuning.jobs`."""
  if stage.tune:
    tried = tuning.parse(stage.tune, num_seeds=1)
    tuning.check(tried, cells)
    yield from tuning.jobs(cells, tried, together=1)
  else:
    yield from table_cells.make_jobs(cells, together=1)


class Record:
  """The file: a line per finished run, and one that names the finalists."""

  def __init__(self, path: pathlib.Path, workdir: pathlib.Path):
    """Read the file, and restore the results of its runs in `workdir`.

    Raises:
      errors.InputError: a line was written by a commit that may train
        differently.
    """
    self._path, self._workdir = path, workdir
    self._keys = {
      "commit": _commit(),
      "cpu": f"{measuring.device()} of {_cpu()}",
    }
    lines = path.read_text().splitlines() if path.exists() else []
    read = [json.loads(line) for line in lines]
    self.finalists: tuple[str, ...] = ()
    for line in read:
      self.finalists = tuple(line.get("finalists", self.finalists))
    self.lines = [line for line in read if "run" in line]
    for line in read:
      if line["commit"] not in (self._keys["commit"], *_EQUAL_COMMITS):
        raise errors.InputError(
          f"{path} holds runs of commit {line['commit']}, but this is"
          f" {self._keys['commit']}: git worktree add local/pinned"
          f" {line['commit']}, and run the study there"
        )
      if "run" in line:
        self._restore(line)
    # A run that finished just before the study was killed has no line yet.
    # Train it again.
    for summary in list(workdir.rglob("summary.json")):
      if not self.has(summary.parent):
        shutil.rmtree(summary.parent)

  def _restore(self, line):
    folder = self._workdir / line["run"]
    folder.mkdir(parents=True, exist_ok=True)
    if line["error"]:
      (folder / "error.txt").write_text(line["error"])
      return
    run_folder.write_json(folder / "summary.json", line["summary"])
    if line["pairs"]:
      content = {"pairs": [dict(pair) for pair in line["pairs"]]}
      if not (folder / transfer_map.FILE).exists():
        run_folder.write_json(folder / transfer_map.FILE, content)

  def name_finalists(self, methods: Sequence[str]) -> None:
    """Record the finalists.

    Raises:
      errors.InputError: the file names others, or a method is not tuned in
        the screening.
    """
    last = STAGES[-1]
    (tuned,) = (one for one in STAGES if one.name == last.tuned_in)
    if unknown := [name for name in methods if name not in tuned.methods]:
      raise errors.InputError(
        f"--finalists has {', '.join(unknown)}; there are"
        f" {', '.join(tuned.methods)}"
      )
    if self.finalists and self.finalists != tuple(methods):
      raise errors.InputError(
        f"{self._path} names other finalists: {', '.join(self.finalists)}"
      )
    if not self.finalists:
      self.finalists = tuple(methods)
      self._append({"finalists": list(methods), **self._keys})

  def has(self, folder: pathlib.Path) -> bool:
    """Return True if a run is done, or known to fail."""
    return self._name(folder) in {line["run"] for line in self.lines}

  def add(
    self, folder: pathlib.Path, method: str, fields: Mapping[str, Any]
  ) -> None:
    """Append the line of a run, and delete the large files in its folder."""
    error, summary = folder / "error.txt", folder / "summary.json"
    content = run_folder.read_json(folder / transfer_map.FILE)
    line = {
      "run": self._name(folder),
      "method": method,
      "fields": fields,
      "error": error.read_text().splitlines()[0] if error.exists() else "",
      "summary": _short(run_folder.read_json(summary) or {}),
      "pairs": _moved(content) if content else [],
      **self._keys,
    }
    self._append(line)
    self.lines.append(line)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / run_folder.TARGET).unlink(missing_ok=True)

  def _append(self, line):
    with self._path.open("a") as file:
      file.write(json.dumps(line) + "\n")

  def _name(self, folder):
    return str(folder.relative_to(self._workdir))


def _commit():
  git = lambda *words: subprocess.check_output(("git", *words), text=True)
  if git("status", "--porcelain", "--untracked-files=no"):
    raise errors.InputError(
      "there are changes that are not committed; the study runs from a commit"
    )
  return git("rev-parse", "HEAD").strip()


def _cpu():
  names = re.findall(
    r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text()
  )
  return names[0] if names else "unknown"


def _short(summary):
  """Drop the fields of a summary that no table reads."""
  left_out = ("recipe", "phases", "skipped_images")
  return {k: value for k, value in summary.items() if k not in left_out}


def _moved(content):
  """Return how far λ and w of each pair moved, from a transfer map.

  The pair weights are means over the first and the last epoch. The number of
  effective channels equals the number of channels if w is uniform.
  """
  return [
    {
      "source": pair["source"],
      "target": pair["target"],
      "pair_weight": [pair["history"][0], pair["history"][-1]],
      "effective_channels": pair["channel_concentration"],
      "channels": pair["num_channels"],
    }
    for pair in content["pairs"]
  ]


def evaluate_test(folder: pathlib.Path, images: str) -> None:
  """Evaluate a run's best epoch on the test images, for its summary."""
  path = folder / "summary.json"
  summary = run_folder.read_json(path)
  with np.load(images) as arrays:
    logits = predictor.load(folder).outputs(arrays["x_test"], 250)
    right = np.argmax(logits, axis=-1) == arrays["y_test"]
  run_folder.write_json(path, summary | {"test_accuracy": float(right.mean())})


def train(
  record: Record, todo: Iterable[table_cells.Cell], until: float
) -> bool:
  """Train jobs until a time; return True if all are done."""
  runner = table_cells.Runner()
  with signals.StopRequests() as requests:
    for job in todo:
      left = {
        seed: folder
        for seed, folder in job.workdirs.items()
        if not record.has(folder)
      }
      if not left:
        continue
      if requests.received() or time.time() > until:
        return False
      runner.run(job._replace(workdirs=left))
      fields = _changed(job)
      for folder in left.values():
        if not job.trial and not (folder / "error.txt").exists():
          evaluate_test(folder, job.config.data.path)
        record.add(folder, job.method, fields)
  return True


def _changed(job):
  """Return the tuned fields of a job."""
  names = {
    text.partition("=")[0] for stage in STAGES for text in stage.tune
  } | {"transfer.pairs"}
  flat = l2t_jax.config.flatten(job.config.to_dict())
  return {name: flat[name] for name in sorted(names)}


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument("file", type=pathlib.Path)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--hours", type=float, default=1e6)
  parser.add_argument(
    "--finalists", type=lambda text: text.split(","), default=[]
  )
  return parser


def main(args: argparse.Namespace, overrides: list[str]) -> int:
  """Continue the study; print the table of each stage."""
  record = Record(args.file, args.workdir)
  if args.finalists:
    record.name_finalists(args.finalists)
  until = time.time() + 3600 * args.hours
  for stage in STAGES:
    if stage.name == "finalists":
      stage = stage._replace(methods=record.finalists)
    if not stage.methods:
      print("name the finalists: --finalists=METHOD,...")
      break
    cells = make_cells(stage, args.workdir, overrides)
    is_done = train(record, jobs(stage, cells), until)
    results = table_cells.results(cells)
    table_picture.write(args.workdir / stage.name, results, _REFERENCE)
    tables.print_table(results, _REFERENCE)
    if not is_done:
      break
  seconds = sum(line["summary"].get("seconds", 0) for line in record.lines)
  print(f"{len(record.lines)} runs, {seconds / 3600:.1f} hours of training")
  return 0


if __name__ == "__main__":
  cli.run(make_parser(), main)
