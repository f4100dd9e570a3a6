"""Tuning of a table's cells: what is tried, chosen, left alone and resumed."""

import json
import re

import numpy as np
import pytest

from l2t_jax import cli, errors, table
import l2t_jax.config
from l2t_jax.method import objectives
from l2t_jax.results import tables
from l2t_jax.run import cells as table_cells
from l2t_jax.run import tuning
from tests.commands import test_table
from tests.support import small_runs

pytestmark = pytest.mark.xdist_group("methods")
VERSIONS = {"python": "3.11.7"}


def run_table(workdir, *arguments):
  """Run the command in this process."""
  line = ["--config=configs/digits.py", f"--workdir={workdir}", *arguments]
  overrides = [a for a in line if a.startswith("--config.")]
  args = table.make_parser().parse_args([a for a in line if a not in overrides])
  return table.main(args, overrides)


@pytest.fixture
def pretend(monkeypatch, source):
  """Let runs end at once, with a validation accuracy computed from the config.

  Returns a function that sets how, and returns the list of the jobs that ran.
  """

  def pretend_with(accuracy, num_pairs=4):
    ran = []

    def run(self, job):
      ran.append(job)
      for seed, folder in job.workdirs.items():
        folder.mkdir(parents=True, exist_ok=True)
        value = accuracy(job.config)
        if value is None:
          (folder / "error.txt").write_text("iteration 3: not finite: loss")
          continue
        is_tested = job.config.evaluate_test
        summary = {
          "seed": seed,
          "val_accuracy": value,
          "test_accuracy": value + 0.01 * seed if is_tested else None,
          "epochs": job.config.epochs,
          "iterations": 10,
          "iteration_seconds": 0.5 if job.method == "scratch" else 1.5,
          "seconds": 20.0,
          "device": "1 x cpu",
          "versions": VERSIONS,
        }
        pairs = [{"source": f"s{i}", "target": "t"} for i in range(num_pairs)]
        for name, content in (
          ("summary.json", summary),
          ("transfer_map.json", {"pairs": pairs}),
        ):
          (folder / name).write_text(json.dumps(content))

    monkeypatch.setattr(table_cells.Runner, "run", run)
    monkeypatch.setattr(tuning.from_config, "check", lambda *_: None)
    return ran

  return pretend_with


def test_each_cell_is_tuned_by_itself(pretend, tmp_path):
  """Over the fields that its method reads, with seeds of its own."""

  def accuracy(config):
    best = {"scratch": 0.1, "fm_single": 0.01}[config.method]
    rate, beta = config.optimizer.learning_rate, config.transfer.beta
    return 0.9 - abs(rate - best) - 0.01 * beta

  ran = pretend(accuracy)
  arguments = (
    "--methods=scratch,fm_single",
    "--tune=transfer.beta=2,0.5",
    "--tune=optimizer.learning_rate=0.01,0.1,0.2",
    "--seeds=2",
    "--tune-seeds=3",
  )
  assert run_table(tmp_path, *arguments) == 0
  trials = [job for job in ran if job.trial]
  count = lambda method: sum(job.method == method for job in trials)
  assert (count("scratch"), count("fm_single")) == (3 * 3, 6 * 3)
  assert not any(job.config.evaluate_test for job in trials)
  finals = [job for job in ran if not job.trial]
  assert all(job.config.evaluate_test for job in finals)
  seeds = lambda jobs: {seed for job in jobs for seed in job.workdirs}
  assert seeds(finals) == {0, 1}
  assert not seeds(trials) & seeds(finals)
  chosen = {
    job.method: (job.config.optimizer.learning_rate, job.config.transfer.beta)
    for job in finals
  }
  assert chosen["scratch"][0] == 0.1
  assert chosen["fm_single"] == (0.01, 0.5)
  # The table says what was chosen, and what that cost.
  scratch, single = test_table.rows(tmp_path)
  assert scratch["tuned"] == "optimizer.learning_rate=0.1"
  assert single["tuned"] == "transfer.beta=0.5 optimizer.learning_rate=0.01"
  assert (scratch["tuning_runs"], single["tuning_runs"]) == ("9", "18")
  assert float(single["tuning_seconds"]) == 18 * 20
  # Those of scratch are counted; evaluations are no steps.
  assert float(scratch["tuning_plain_steps"]) == 9 * 10
  assert float(single["tuning_plain_steps"]) == 18 * 10 * 3
  text = (tmp_path / "table.md").read_text()
  edge = "optimizer.learning_rate=0.01 is at the edge of the values tried"
  assert f"fm_single: {edge}" in text
  assert "scratch: optimizer" not in text
  # The same command again has nothing to do.
  ran.clear()
  assert run_table(tmp_path, *arguments) == 0
  assert not any(job.workdirs for job in ran)


def test_trials_have_seeds_of_their_own(pretend, tmp_path):
  ran = pretend(lambda _: 0.5)
  arguments = ("--methods=lwf", "--seeds=2", "--tune=lwf.weight=1,2")
  assert run_table(tmp_path, *arguments, "--config.seed=9999") == 0
  seeds = {(bool(job.trial), seed) for job in ran for seed in job.workdirs}
  assert seeds == {(True, 19_999), (False, 9_999), (False, 10_000)}


def test_a_killed_tuning_goes_on(pretend, tmp_path, monkeypatch):
  ran = pretend(lambda config: 0.5 + config.optimizer.learning_rate)
  pretended = table_cells.Runner.run

  def run_or_stop(self, job):
    if len(ran) == 2:
      raise errors.Interrupted("asked to stop")
    pretended(self, job)

  arguments = (
    "--methods=scratch",
    "--tune=optimizer.learning_rate=0.01,0.1,0.2",
    "--seeds=1",
  )
  with monkeypatch.context() as patch:
    patch.setattr(table_cells.Runner, "run", run_or_stop)
    assert run_table(tmp_path, *arguments) == errors.Interrupted.exit_code
  before = [job.trial for job in ran]
  assert len(before) == 2
  ran.clear()
  assert run_table(tmp_path, *arguments) == 0
  trial, final = ran
  assert trial.trial == "optimizer.learning_rate=0.2"
  assert final.config.optimizer.learning_rate == 0.2


def test_trials_that_fail_are_not_chosen(pretend, tmp_path):
  def accuracy(config):
    diverges = config.optimizer.learning_rate > 0.05
    return None if diverges or config.method == "lwf" else 0.5

  ran = pretend(accuracy)
  tune = "--tune=optimizer.learning_rate=0.1,0.01"
  code = run_table(tmp_path, "--methods=scratch,lwf", tune, "--seeds=1")
  assert code == 1
  (final,) = (job for job in ran if not job.trial)
  assert final.method == "scratch"
  assert final.config.optimizer.learning_rate == 0.01
  text = (tmp_path / "table.md").read_text()
  assert "scratch: 1 of 2 trials failed." in text
  scratch, _ = test_table.rows(tmp_path)
  assert float(scratch["tuning_plain_steps"]) == 10  # Of the other trial.
  assert "| `lwf` | nothing: all trials failed |" in text
  assert "lwf, tuning: all trials failed, such as seed 10000: iteration 3" in (
    text
  )


@pytest.mark.parametrize(
  ("num_pairs", "useful", "num_sets"),
  [
    (4, {1, 3}, 4 + 3 + 2),  # A third pair does not help.
    (3, {0, 1, 2}, 3 + 2),  # All of them have been tried already.
    (28, {0, 1, 2}, 30),  # The second round is cut short.
    (8, {0, 1, 2, 3}, 8 + 7 + 6 + 5 + 4),  # 30 sets, but not cut short.
  ],
)
def test_fixed_pairs_are_searched(
  pretend, tmp_path, monkeypatch, num_pairs, useful, num_sets
):
  printed = []
  monkeypatch.setattr(table_cells.CONSOLE, "print", printed.append)

  def accuracy(config):
    pairs = config.transfer.pairs
    if pairs == "all_to_all":
      return 0.65
    chosen = {int(name) for name in re.findall(r"s(\d+)->t", pairs)}
    return 0.6 + 0.1 * len(chosen & useful) - 0.01 * len(chosen - useful)

  ran = pretend(accuracy, num_pairs)
  arguments = ("--methods=fm_search", "--seeds=1")
  assert run_table(tmp_path, *arguments, "--tune=transfer.beta=1,2") == 0
  sets = [job for job in ran if job.trial and "->" in job.config.transfer.pairs]
  assert len(sets) == num_sets <= tuning.MAX_PAIR_SETS
  assert {job.config.transfer.beta for job in sets} == {1}
  final = ran[-1]
  found = set(map(int, re.findall(r"s(\d+)->t", final.config.transfer.pairs)))
  assert final.config.method == "fm_search"
  expected = {4: {1, 3}, 3: {0, 1}, 28: {0, 1}, 8: {0, 1, 2, 3}}
  assert found == expected[num_pairs]
  ended_early = any("ended at its limit of 30" in line for line in printed)
  assert ended_early == (num_pairs == 28)
  # The folder of a trial says all that was chosen for it.
  assert all(
    "transfer.beta=1 " in str(next(iter(j.workdirs.values()))) for j in sets
  )


def test_a_search_among_too_many_pairs_fails_alone(pretend, tmp_path):
  ran = pretend(lambda _: 0.5, num_pairs=31)
  methods = "--methods=fm_search,fm_single"
  tune = "--tune=transfer.beta=1,2"
  assert run_table(tmp_path, methods, tune, "--seeds=1") == 1
  trials = [job.method for job in ran if job.trial]
  assert trials == ["fm_search", "fm_single", "fm_single"]
  assert ran[-1].method == "fm_single" and not ran[-1].trial
  text = (tmp_path / "table.md").read_text()
  assert "31 pairs to choose from" in text


def test_seeds_of_another_choice_are_refused(source, tmp_path, monkeypatch):
  """They would be shown as results of what is chosen now."""
  small = [f"--config.source.weights={source}", "--config.epochs=1"]
  arguments = ["--methods=scratch", "--seeds=1", *small]
  folder = tmp_path / "digits" / "scratch" / "seed0"
  folder.mkdir(parents=True)
  config = cli.load_config("configs/digits.py", small)
  config.method, config.optimizer.learning_rate = "scratch", 0.03
  (folder / "config.json").write_text(config.to_json())
  done = {"epochs": 1, "seed": 0, "val_accuracy": 0.5, "test_accuracy": 0.5}
  done |= {"device": "1 x cpu", "versions": VERSIONS}
  (folder / "summary.json").write_text(json.dumps(done))
  # Without trials it is known at once, with trials after them.
  message = "optimizer.learning_rate was 0.03, is 0.2"
  with pytest.raises(errors.InputError, match=message):
    run_table(tmp_path, *arguments, "--tune=optimizer.learning_rate=0.2")

  def run(self, job):
    for folder in job.workdirs.values():
      folder.mkdir(parents=True, exist_ok=True)
      rate = job.config.optimizer.learning_rate
      summary = {"val_accuracy": rate, "seconds": 1.0, "iterations": 1}
      summary["epochs"] = 1
      (folder / "summary.json").write_text(json.dumps(summary))

  monkeypatch.setattr(table_cells.Runner, "run", run)
  with pytest.raises(
    errors.InputError, match=f"chosen is now optimizer.*{message}"
  ):
    run_table(tmp_path, *arguments, "--tune=optimizer.learning_rate=0.1,0.2")
  assert not (tmp_path / "digits" / "scratch" / "tuning.json").exists()


def test_if_all_trials_fail_an_earlier_choice_is_not_shown(pretend, tmp_path):
  pretend(lambda config: config.optimizer.learning_rate)
  arguments = ("--methods=scratch", "--seeds=1")
  rates = "--tune=optimizer.learning_rate="
  assert run_table(tmp_path, *arguments, f"{rates}0.1,0.2") == 0
  assert [row["seeds"] for row in test_table.rows(tmp_path)] == ["1"]
  pretend(lambda config: None)
  assert run_table(tmp_path, *arguments, f"{rates}10,100") == 1
  (row,) = test_table.rows(tmp_path)
  assert (row["seeds"], row["test_mean"], row["tuned"]) == ("0", "", "")
  text = (tmp_path / "table.md").read_text()
  assert "tuning: all trials failed" in text


def test_a_row_that_had_nothing_to_tune_is_not_tuned(pretend, tmp_path):
  pretend(lambda config: 0.5)
  methods = "--methods=scratch,kd"
  tune = "--tune=kd.weight=1,2"
  assert run_table(tmp_path, methods, tune, "--seeds=1") == 0
  assert run_table(tmp_path, "--methods=scratch", "--seeds=1") == 0


def test_a_tuned_folder_is_not_used_without_tuning(pretend, tmp_path):
  pretend(lambda config: config.optimizer.learning_rate)
  tune = "--tune=optimizer.learning_rate=0.1,0.2"
  assert run_table(tmp_path, "--methods=scratch", tune) == 0
  with pytest.raises(errors.InputError, match="was tuned: give --tune"):
    run_table(tmp_path, "--methods=scratch")


def test_a_chosen_value_at_the_edge_of_those_tried():
  """A larger one that failed is not worth extending, a smaller one is."""

  def edges(chosen, **trials):
    return tables.Tuning(
      {"lr": chosen},
      [
        {"fields": {"lr": value}, "errors": ["nan"] if fails else []}
        for value, fails in trials.items()
      ],
    ).edges

  assert edges("1", **{"1": False, "2": True, "3": True}) == ["lr=1"]
  assert edges("2", **{"1": False, "2": False, "3": True}) == []
  assert edges("3", **{"1": False, "2": False, "3": False}) == ["lr=3"]
  assert edges("1", **{"1": False, "2": False}) == []


def test_all_pairs_may_be_the_best(pretend, tmp_path):
  ran = pretend(
    lambda config: 0.9 if config.transfer.pairs == "all_to_all" else 0.5
  )
  assert run_table(tmp_path, "--methods=kd+fm_search", "--seeds=1") == 0
  assert len([job for job in ran if job.trial]) == 1 + 4 + 3
  assert ran[-1].config.transfer.pairs == "all_to_all"


def test_shares_tune_whole_cells(pretend, tmp_path):
  ran = pretend(lambda config: config.optimizer.learning_rate)
  arguments = (
    "--methods=scratch,lwf,kd",
    "--tune=optimizer.learning_rate=0.01,0.1",
    "--seeds=1",
  )
  for share, methods in (("1/2", {"scratch", "kd"}), ("2/2", {"lwf"})):
    ran.clear()
    assert run_table(tmp_path, *arguments, f"--shard={share}") == 0
    assert {job.method for job in ran} == methods
  tuned = [row["tuned"] for row in test_table.rows(tmp_path)]
  assert tuned == ["optimizer.learning_rate=0.1"] * 3


def test_shares_differ_in_their_methods(tmp_path):
  columns = table_cells.load_columns(
    ["configs/digits.py"], "data.per_class=5,10,20", []
  )
  cells = table_cells.make_cells(columns, ["scratch", "kd", "lwf"], 1, tmp_path)
  for share in range(3):
    mine = table_cells.interleave(cells)[share::3]
    assert {cell.method for cell in mine} == {"scratch", "kd", "lwf"}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--tune=transfer.beta"], "must be a field and different values"),
    (["--tune=transfer.beta=1,1"], "must be a field and different values"),
    (["--tune=transfer.bet=1,2"], "did you mean config.transfer.beta?"),
    (["--tune=method=kd,lwf"], "method cannot be tuned"),
    (["--tune=data.split_seed=1,2"], "data.split_seed cannot be tuned"),
    (
      ["--tune=bilevel.outer_images=batch,validation"],
      "bilevel.outer_images cannot be tuned",
    ),
    (
      [
        "--tune=transfer.pair_weights=learned,constant",
        "--methods=l2t_ww",
        "--config.bilevel.outer_images=validation",
      ],
      "train on the validation images that all are judged by",
    ),
    (
      [
        "--tune=transfer.pairs=single,nearest",
        "--methods=fm_single,fm_one_to_one",
      ],
      "pairs=single, fm_single and fm_one_to_one are the same",
    ),
    (
      ["--tune=transfer.pairs=single,nearest", "--methods=fm_search,lwf"],
      "fm_search searches for pairs",
    ),
    (["--tune=epochs=1,2", "--tune=epochs=3"], "epochs is given twice"),
    (["--tune=lwf.weight=1,2,1.0"], "lwf.weight: 1 and 1.0 are the same value"),
    (
      ["--tune=target.batch_norm_groups=1,3"],
      "batch_size is 25; it must be a multiple of",
    ),
    (["--tune-seeds=2"], "--tune-seeds=2 is for trials; give --tune, too"),
    (["--sweep=kd.weight=1,2"], "kd.weight: no method of the table reads it"),
    (["--reference=kd", "--methods=kd"], "--reference=kd is the only row"),
    (["--tune=kd.weight=1,2"], "kd.weight: no method of the table reads it"),
    (["--tune=epochs=1,x"], "epochs=x"),
    (["--tune=epochs=1,0"], "config.epochs is 0; it must be at least 1"),
    (["--tune=epochs=1,2", "--config.epochs=3"], "both set it"),
    (["--tune=epochs=1,2", "--sweep=epochs=3,4"], "both set it"),
    (["--reference=kd"], "--reference=kd is not in --methods"),
    (
      ["--methods=fm_search", "--config.transfer.pairs=single"],
      "fm_search searches for pairs",
    ),
  ],
)
def test_what_cannot_be_tuned(tmp_path, source, arguments, message):
  more = [f"--config.source.weights={source}"]
  if not any(argument.startswith("--methods") for argument in arguments):
    more.append("--methods=scratch,lwf")
  with pytest.raises(errors.InputError, match=re.escape(message)) as error:
    run_table(tmp_path / "table", *arguments, *more)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
  ("method", "read", "not_read"),
  [
    (
      "scratch",
      "epochs optimizer.momentum data.augment target.model",
      "transfer.beta meta.learning_rate bilevel.loop kd.weight source.taps"
      " data.unlabeled target.taps",
    ),
    (
      "linear_probe",
      "source.weights target.label_smoothing",
      "target.model source.taps",
    ),
    ("kd", "source.weights sources.a.weights", "sources.a.taps target.taps"),
    (
      "at",
      "at.beta transfer.pairs data.unlabeled source.taps target.taps",
      "transfer.beta kd.weight",
    ),
    ("lwf_at", "at.beta lwf.weight", "kd.temperature"),
    ("afd", "afd.dim transfer.pairs", "transfer.beta transfer.pair_activation"),
    (
      "fm_single",
      "transfer.beta transfer.map transfer.feature_scale",
      "transfer.channel_weights meta.learning_rate bilevel.num_inner_steps",
    ),
    (
      "l2t_w_single",
      "meta.learning_rate bilevel.num_inner_steps transfer.channel_weights",
      "transfer.pair_weights transfer.pair_activation",
    ),
    (
      "l2t_ww_joint",
      "meta.learning_rate",
      "bilevel.num_inner_steps transfer.pair_activation",
    ),
    ("kd+l2t_ww", "kd.weight bilevel.loop transfer.pair_activation", "at.beta"),
  ],
)
def test_which_fields_a_method_reads(method, read, not_read):
  config = l2t_jax.config.get_config()
  config.method = method
  reads = lambda field: l2t_jax.config.reads(config, field)
  assert all(map(reads, read.split()))
  assert not any(map(reads, not_read.split()))


def test_fixed_weights_leave_the_meta_update_unread():
  config = l2t_jax.config.get_config()
  config.transfer.channel_weights = "uniform"
  assert l2t_jax.config.reads(config, "meta.learning_rate")
  config.transfer.pair_weights = "constant"
  assert not l2t_jax.config.reads(config, "meta.learning_rate")
  config = l2t_jax.config.get_config()
  config.transfer.map = "map.json"
  assert not l2t_jax.config.reads(config, "meta.learning_rate")
  assert not l2t_jax.config.reads(config, "transfer.pairs")


def test_listed_pairs_leave_the_choice_of_taps_unread():
  config = l2t_jax.config.get_config()
  assert l2t_jax.config.reads(config, "target.taps")
  config.transfer.pairs = "a->b"
  assert not l2t_jax.config.reads(config, "target.taps")


def test_all_fields_are_read_by_some_method():
  config = l2t_jax.config.get_config()
  unread = set(l2t_jax.config.FIELDS)
  for method in objectives.METHODS:
    config.method = method
    unread = {f for f in unread if not l2t_jax.config.reads(config, f)}
  assert not unread


def test_tuning_does_not_see_test_images(source, tmp_path):
  """Whatever their labels are, the same is tried and chosen."""
  rng = np.random.default_rng(0)
  labels = np.arange(40) % 4
  noise = lambda: rng.integers(0, 40, (40, 8, 8))
  images, val = (
    np.uint8(60 * labels[:, None, None] + noise()) for _ in range(2)
  )
  records, tests = [], []
  for turn in range(2):
    file = tmp_path / f"{turn}.npz"
    arrays = {"x_train": images, "y_train": labels}
    arrays |= {"x_val": val, "y_val": labels}
    other = np.uint8(rng.integers(0, 256, (40, 8, 8)))
    arrays |= {"x_test": other, "y_test": np.roll(labels, turn)}
    np.savez(file, **arrays)
    folder = tmp_path / f"table{turn}"
    command = test_table.arguments(
      folder,
      source,
      "--methods=scratch",
      "--seeds=1",
      "--tune=optimizer.learning_rate=0.01,0.1",
      "--config.data.source=npz",
      f"--config.data.path={file}",
    )
    result = small_runs.run_python(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(
      (folder / "digits" / "scratch" / "tuning.json").read_text()
    )
    for trial in record["trials"]:
      del trial["seconds"], trial["iteration_seconds"]
    records.append(record)
    cell = folder / "digits" / "scratch"
    trials = list((cell / "tuning_trials").glob("*/*/summary.json"))
    assert len(trials) == 2
    for path in trials:
      assert json.loads(path.read_text())["test_accuracy"] is None
      assert "test" not in (path.parent / "metrics.jsonl").read_text()
    summary = json.loads((cell / "seed0" / "summary.json").read_text())
    tests.append(summary["test_accuracy"])
  assert records[0] == records[1]
  assert all(0 <= test <= 1 for test in tests)
