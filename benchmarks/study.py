r"""Which transfer pays with few labels? The study of benchmarks/RESULTS.md.

    python -m benchmarks.study FILE.jsonl --workdir=local/study --hours=2

trains the runs that are not in the file yet and appends a line for each. The
file alone records what is done, so that any machine can continue, from the
commit that the last line names. SIGTERM and Ctrl-C stop the study; an
interrupted run resumes if its folder still exists. Processes that run at the
same time need methods and folders of their own: --only=METHOD,... trains these
methods alone.

The screening uses a target with a quarter of VGG-9's width. It tunes every
method on validation images, and then trains five seeds. In its first round, 40
epochs were better than 20 for all ten methods, and most loss weights were best
at the upper end of their grid; the second round has 40 epochs and larger
weights. These turned out to be too large: ten of the twelve trials of
`l2t_ww_joint` diverged. The methods that learn the weights of a matching loss
are therefore tuned on the values of the first round, in a third one. The
finalists are named after it, one of each kind, and within a kind by their
accuracy on the validation images, with

    --finalists=scratch,fm_all_to_all,lwf,l2t_ww,l2t_ww_joint

(no transfer, the best fixed pairs that need no search, distillation, the
paper's method and the best cheap learned one); the file records them, too. They
are tuned once more, with three seeds per trial, since one turned out to be too
few: with or without ghost batch normalisation, which helps much on the demo,
and with or without scaled source features, with which the weights of L2T-ww
start closer to 1. The learning rate is fixed, since 0.03 was best for almost
all. With the values that are chosen then, cheaper settings of L2T-ww are tried
(one of them uses a learned map again, frozen), the finalists train at full
width with 20 seeds, and so do the pairs that the search of the screening found.
At both widths, L2T-ww also trains with the random values at which its weights
start. Three times the epochs are tried last.

Apart from this plan, and after the screening had shown that the weights of
L2T-ww gain nothing over fixed ones, L2T-ww is also tuned with validation images
in its outer loss.

At its end, the command prints the tables of all stages.
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
from scipy import special

from benchmarks import measuring
from l2t_jax import cli, errors
import l2t_jax.config
from l2t_jax.results import (
  run_reader,
  statistics,
  table_picture,
  tables,
  transfer_map,
)
from l2t_jax.run import cells as table_cells
from l2t_jax.run import predictor, tuning
from l2t_jax.runtime import run_folder, signals

_CONFIG = "benchmarks/few_labels.py"
# Rows of the tables with which the others are compared.
_REFERENCES = ("scratch", "fm_one_to_one", "fm_all_to_all", "l2t_ww")
_POWER = 0.8
# The stages that the finalists are chosen from.
_SCREENED = ("screening_2", "screening_3")
# The run whose map is used again, frozen. Its line holds the whole map.
_MAP = "refined/l2t_ww/seed0"
# What `fm_search` chose in the screening.
_SEARCHED = "stage1_block5->conv1, stage3_block5->conv4, stage3_block5->conv6"
# Of L2T-ww: one meta update, with a negligible step.
_NOT_LEARNED = ("meta.learning_rate=1e-12", "meta.update_every=1000")
# Earlier commits whose training is this one's, up to rounding, which the number
# of cores changes, too. Whoever changes training empties this list.
_EQUAL_COMMITS = (
  "7ddef76f1458983c11915f540f4a2a3b0d1ec78d",
  "17fa5e9d96f232e9be706c1b1b0d1f82e2e8922c",
  "f82148406c42292727e2c1be3d18a9a01917ac6d",
  "5e0175281006b5dec62c5a5b2ae45f63f989b0b4",
  "0aae89152fc6cfa4f89bcc7a3a15837b59c5db49",
  "e0fb2259ba24c91ed843364d2701b695c227b522",
  "8d3441147f33b22f3a8192e93d41f467066cb1ed",
  "9083d30c209efe378b7f6ba5ea99346fd6be7aaa",
  "cd9638c6fc3b6c6b4df64aa57d46b18270e73585",
  "f366ecbdd541c29fc39123d14a99a3900ea2007a",
  "d606529ee85271f0b403491affabe2dc443487be",
)


class Stage(NamedTuple):
  """A table of the study."""

  name: str
  width: str  # Argument of the config.
  methods: tuple[str, ...]  # () for the finalists, which the file names.
  num_seeds: int
  tune: tuple[str, ...] = ()  # As --tune of `l2t_jax.table`.
  seeds_per_trial: int = 1
  tuned_in: str = ""  # The stage whose values are used; "" for its own.
  fields: tuple[str, ...] = ()  # Set in addition to these values.


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
    (*_FIRST_ROUND, "fm_search", "l2t_ww_joint"),
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
  Stage(
    "screening_3",
    "quarter",
    ("l2t_ww", "l2t_w_one_to_one", "l2t_ww_joint"),
    num_seeds=5,
    tune=(
      "optimizer.learning_rate=0.01,0.03",
      "epochs=40",
      "transfer.beta=0.5,2",
      "meta.learning_rate=1e-4,1e-3,1e-2",
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
      "optimizer.learning_rate=0.03",
      "transfer.beta=0.5,2",
      "meta.learning_rate=1e-4,1e-3",
      "lwf.weight=1,3",
    ),
  ),
  Stage(
    "validation_images",
    "quarter",
    ("l2t_ww",),
    num_seeds=5,
    tune=(
      "epochs=40",
      "optimizer.learning_rate=0.03",
      "transfer.beta=0.5,2",
      "meta.learning_rate=1e-4,1e-3,1e-2",
    ),
    fields=("bilevel.outer_images=validation",),
  ),
  Stage(
    "refined",
    "quarter",
    (),
    num_seeds=5,
    tune=(
      "optimizer.learning_rate=0.03",
      "epochs=40",
      "target.batch_norm_groups=1,8",
      "transfer.feature_scale=none,std",
      "transfer.beta=0.5,2",
      "meta.learning_rate=1e-4,1e-3",
      "lwf.weight=1,3",
      "afd.weight=200",
    ),
    seeds_per_trial=3,
  ),
  *(
    Stage(
      name,
      "quarter",
      ("l2t_ww",),
      num_seeds=5,
      tuned_in="refined",
      fields=fields,
    )
    for name, fields in (
      ("meta_update_every_4th", ("meta.update_every=4",)),
      ("one_inner_step", ("bilevel.num_inner_steps=1",)),
      ("frozen_map", (f"transfer.map={_MAP}/{transfer_map.FILE}",)),
      ("not_learned", _NOT_LEARNED),
    )
  ),
  Stage("finalists", "full", (), num_seeds=20, tuned_in="refined"),
  Stage(
    "finalists_not_learned",
    "full",
    ("l2t_ww",),
    num_seeds=20,
    tuned_in="refined",
    fields=_NOT_LEARNED,
  ),
  Stage(
    "finalists_searched_pairs",
    "full",
    ("fm_all_to_all",),
    num_seeds=20,
    tuned_in="refined",
    fields=(f"transfer.pairs={_SEARCHED}",),
  ),
  Stage(
    "longer",
    "quarter",
    (),
    num_seeds=5,
    tuned_in="refined",
    fields=("epochs=120",),
  ),
)


def make_cells(
  stage: Stage, workdir: pathlib.Path, overrides: Sequence[str]
) -> list[table_cells.Cell]:
  """Return the cells of a stage, with the values that another stage chose."""
  config = cli.load_config(f"{_CONFIG}:{stage.width}", overrides)
  made = []
  for cell in table_cells.make_cells(
    {stage.name: config}, stage.methods, stage.num_seeds, workdir
  ):
    fields = dict(text.split("=") for text in stage.fields)
    if stage.tuned_in:
      fields = _chosen(workdir / stage.tuned_in / cell.method) | fields
    config = cli.with_fields(cell.config, fields)
    if config.transfer.map:
      config.transfer.map = str(workdir / config.transfer.map)
    made.append(cell._replace(config=config))
  return made


def _chosen(folder):
  record = run_folder.read_json(folder / run_reader.TUNING)
  if record is None or record["chosen"] is None:
    raise errors.InputError(
      f"{folder.name} is not tuned yet: {folder.parent.name} comes first"
    )
  return record["chosen"]


def jobs(
  stage: Stage, cells: Sequence[table_cells.Cell]
) -> Iterator[table_cells.Cell]:
  """Yield the runs of a stage one by one; see `tuning.jobs`."""
  if stage.tune:
    tried = tuning.parse(tuned(stage, cells), stage.seeds_per_trial)
    tuning.check(tried, cells)
    yield from tuning.jobs(cells, tried, together=1)
  else:
    yield from table_cells.make_jobs(cells, together=1)


def tuned(stage: Stage, cells: Sequence[table_cells.Cell]) -> list[str]:
  """Return what is tuned for some of a stage's methods: what these read."""
  return [
    text
    for text in stage.tune
    if any(
      l2t_jax.config.reads(cell.config, text.partition("=")[0])
      for cell in cells
    )
  ]


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
    for stage in STAGES:
      for summary in list((workdir / stage.name).rglob(run_folder.SUMMARY)):
        if not self.has(summary.parent):
          shutil.rmtree(summary.parent)

  def _restore(self, line):
    folder = self._workdir / line["run"]
    folder.mkdir(parents=True, exist_ok=True)
    if line["error"]:
      (folder / run_folder.ERROR).write_text(line["error"])
      return
    run_folder.write_json(folder / run_folder.SUMMARY, line["summary"])
    content = line.get("map") or {"pairs": line["pairs"]}
    if content["pairs"] and not (folder / transfer_map.FILE).exists():
      run_folder.write_json(folder / transfer_map.FILE, content)

  def name_finalists(self, methods: Sequence[str]) -> None:
    """Record the finalists.

    Raises:
      errors.InputError: the file names others, or a method was not screened.
    """
    screened = [stage for stage in STAGES if stage.name in _SCREENED]
    _check_methods("finalists", methods, screened)
    if self.finalists and self.finalists != tuple(methods):
      raise errors.InputError(
        f"{self._path} names other finalists: {', '.join(self.finalists)}"
      )
    if not self.finalists:
      self.finalists = tuple(methods)
      self._append({"finalists": list(methods), **self._keys})

  def has(
    self, folder: pathlib.Path, fields: Mapping[str, Any] | None = None
  ) -> bool:
    """Return True if a run is done, or known to fail.

    Raises:
      errors.InputError: it was trained with other values of `fields`.
    """
    name = self._name(folder)
    lines = [line for line in self.lines if line["run"] == name]
    for line in lines:
      for field, value in json.loads(json.dumps(fields or {})).items():
        if (before := line["fields"].get(field, value)) != value:
          raise errors.InputError(
            f"{self._path}: {name} has {field}={before}, but the study now"
            f" needs {value}; remove the line to train this run again"
          )
    return bool(lines)

  def add(
    self, folder: pathlib.Path, method: str, fields: Mapping[str, Any]
  ) -> None:
    """Append the line of a run, and delete the large files in its folder."""
    error, summary = folder / run_folder.ERROR, folder / run_folder.SUMMARY
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
    if self._name(folder) == _MAP:
      line["map"] = content
    self._append(line)
    self.lines.append(line)
    shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)
    (folder / run_folder.TARGET).unlink(missing_ok=True)

  def _append(self, line):
    with self._path.open("a") as file:
      file.write(json.dumps(line) + "\n")

  def _name(self, folder):
    return str(folder.relative_to(self._workdir))


def _check_methods(option, methods, stages):
  known = dict.fromkeys(name for stage in stages for name in stage.methods)
  if unknown := [name for name in methods if name not in known]:
    raise errors.InputError(
      f"--{option} has {', '.join(unknown)}; there are {', '.join(known)}"
    )


def only(stage: Stage, methods: Sequence[str]) -> Stage:
  """Return a stage with some of its methods; with all if `methods` is empty.

  Raises:
    errors.InputError: a method is in no stage.
  """
  _check_methods("only", methods, STAGES)
  kept = tuple(m for m in stage.methods if m in methods)
  return stage._replace(methods=kept) if methods else stage


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
  path = folder / run_folder.SUMMARY
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
      fields = _changed(job)
      left = {
        seed: folder
        for seed, folder in job.workdirs.items()
        if not record.has(folder, fields)
      }
      if not left:
        continue
      if requests.received() or time.time() > until:
        return False
      runner.run(job._replace(workdirs=left))
      for folder in left.values():
        if not job.trial and not (folder / run_folder.ERROR).exists():
          evaluate_test(folder, job.config.data.path)
        record.add(folder, job.method, fields)
  return True


def _changed(job):
  """Return the fields of a job that the study varies, except paths."""
  varied = (text for stage in STAGES for text in (*stage.tune, *stage.fields))
  names = {text.partition("=")[0] for text in varied} | {"transfer.pairs"}
  names -= {"transfer.map"}
  flat = l2t_jax.config.flatten(job.config.to_dict())
  return {name: flat[name] for name in sorted(names)}


def to_markdown(
  report: Sequence[tuple[Stage, Sequence[tables.Cell]]],
) -> str:
  """Return a table per stage.

  Rows are compared with the references of their stage. A stage without one of
  them, or with a single method, is compared with that of the last stage of the
  same width that sets no further fields.
  """
  lines = []
  latest: dict[tuple[str, str], tuple[str, tables.Cell]] = {}
  for stage, cells in report:
    own = {cell.method: cell for cell in cells}
    others = {}
    for name in _REFERENCES:
      if name in own and len(cells) > 1:
        others[f"minus {name}"] = own[name]
      elif (stage.width, name) in latest:
        where, other = latest[stage.width, name]
        others[f"minus {name} of {where}"] = other
    if not stage.fields:
      latest |= {
        (stage.width, name): (stage.name, cell) for name, cell in own.items()
      }
    title = " ".join((stage.name, *stage.fields))
    header = ("method", "chosen", "trials", "seeds", "validation %", "test %")
    header += tuple(others)
    lines += [f"\n{title} ({stage.width} width)\n", _row(header)]
    lines.append(_row(["---"] * len(header)))
    for cell in cells:
      if not (cell.summaries or cell.errors):
        continue
      lines.append(
        _row(
          (
            cell.method,
            cell.tuning.text if cell.tuning else "",
            str(cell.tuning.num_runs) if cell.tuning else "",
            cell.seeds,
            cell.validation.text(),
            cell.test.text(),
            *(_compare(cell, other) for other in others.values()),
          )
        )
      )
    lines += [f"\n{cell.method}: {e}" for cell in cells for e in cell.errors]
  lines.append(
    "\nA difference is followed by its 95 % interval (paired t over the seeds"
    " that both have, for the tuned values as they are) and by the true"
    f" difference that such a test detects with a probability of {_POWER:.0%}"
    " if the observed standard deviation is the true one. Nothing is corrected"
    " for the number of comparisons."
  )
  return "\n".join(lines)


def _row(entries):
  return f"| {' | '.join(entries)} |"


def _compare(cell, other):
  if other is None or other is cell:
    return ""
  difference = tables.difference(cell, other)
  if difference is None or difference.half_width is None:
    return ""
  text = tables.difference_text(difference, in_percent=True)
  return f"{text}; {detectable(difference):.1f}"


def detectable(difference: statistics.Difference) -> float:
  """Return the true difference that a paired t-test detects with `_POWER`.

  The test has the level of the interval; this is the usual approximation by
  quantiles of Student's t in place of its noncentral distribution.
  """
  degrees = len(difference.values) - 1
  level = special.stdtrit(degrees, (1 + statistics.CONFIDENCE) / 2)
  power = special.stdtrit(degrees, _POWER)
  return (difference.half_width or 0.0) * (1 + power / level)


def moved_weights(lines: Sequence[Mapping[str, Any]]) -> str:
  """Say how far λ and w moved over pairs and seeds, by stage and method.

  Trials are left out. The pair weights λ (for AFD, its attention) are compared
  between the first and the last epoch; w is uniform if all channels are
  effective.
  """
  moved: dict[tuple[str, str], list[tuple[float, float]]] = {}
  for line in lines:
    stage, _, rest = line["run"].partition("/")
    if run_reader.TRIALS in rest:
      continue
    moved.setdefault((stage, line["method"]), []).extend(
      (abs(last - first), pair["effective_channels"] / pair["channels"])
      for pair in line["pairs"]
      for first, last in (pair["pair_weight"],)
    )
  texts = []
  for (stage, method), pairs in moved.items():
    changes, channels = np.array(pairs).reshape(-1, 2).T
    if np.allclose(changes, 0) and np.allclose(channels, 1):
      continue  # Nothing is learned; there may be no pairs.
    texts.append(
      f"{stage} {method}: pair weights changed by up to {changes.max():.2f}"
      f" (median {np.median(changes):.2f}), and {channels.min():.1%} to"
      f" {channels.max():.1%} of a pair's channels are effective"
    )
  return "\n".join(texts)


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument("file", type=pathlib.Path)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--hours", type=float, default=1e6)
  for option in ("--finalists", "--only"):
    parser.add_argument(option, type=lambda text: text.split(","), default=[])
  return parser


def main(args: argparse.Namespace, overrides: list[str]) -> int:
  """Continue the study; print its tables."""
  record = Record(args.file, args.workdir)
  if args.finalists:
    record.name_finalists(args.finalists)
  until = time.time() + 3600 * args.hours
  report = []
  for stage in STAGES:
    stage = stage._replace(methods=stage.methods or record.finalists)
    if not stage.methods:
      print("name the finalists: --finalists=METHOD,...")
      break
    stage = only(stage, args.only)
    if not stage.methods:
      continue
    cells = make_cells(stage, args.workdir, overrides)
    is_done = train(record, jobs(stage, cells), until)
    results = table_cells.results(cells)
    table_picture.write(args.workdir / stage.name, results, "scratch")
    report.append((stage, results))
    if not is_done:
      break
  print(to_markdown(report))
  print(moved_weights(record.lines))
  seconds = sum(
    line["summary"].get("seconds", 0) * int(line["cpu"].split()[0])
    for line in record.lines
  )
  print(f"{len(record.lines)} runs, {seconds / 3600:.1f} hours of a core")
  return 0


if __name__ == "__main__":
  cli.run(make_parser(), main)
