"""What the benchmarks compare with computes the same."""

import json

import jax
import numpy as np
import pytest

from benchmarks import (
  cases,
  inner_loop_problem,
  inner_loops,
  prepare_stl10,
  scaling,
  soak,
  study,
)
from l2t_jax import config, errors
from l2t_jax.results import statistics, tables, transfer_map
from l2t_jax.run import from_config
from tests import test_parity
from tests.support import golden_setup, small_runs


def test_files_of_stl10_are_read(tmp_path):
  torch = pytest.importorskip("torch")
  images = np.zeros((2, 96, 96, 3), np.uint8)
  images[0, :48, :, 0] = 255  # The upper half is red,
  images[1, :, :24, 2] = 255  # the left quarter is blue.
  path = tmp_path / "train_X.bin"
  path.write_bytes(images.transpose(0, 3, 2, 1).tobytes())
  (tmp_path / "train_y.bin").write_bytes(bytes([1, 10]))
  seen = prepare_stl10.read_images(path)
  assert seen.shape == (2, 32, 32, 3)
  np.testing.assert_array_equal(seen[0, [14, 17], 3], [[255, 0, 0], [0, 0, 0]])
  np.testing.assert_array_equal(seen[1, 3, [6, 9]], [[0, 0, 255], [0, 0, 0]])
  labels = prepare_stl10.read_labels(tmp_path / "train_y.bin")
  np.testing.assert_array_equal(labels, [0, 9])
  (tmp_path / "split").mkdir()
  for part, indices in (("train", [2, 0]), ("val", [1]), ("test", [3])):
    torch.save((list(range(10)), indices), tmp_path / f"split/stl10-{part}")
  splits = prepare_stl10.read_splits(tmp_path)
  assert {name: list(x) for name, x in splits.items()} == {
    "stl10_train": [2, 0],
    "stl10_val": [1],
    "stl10_test": [3],
  }


@pytest.mark.parametrize(
  "scheme",
  ["iteration", pytest.param("authors_iteration", marks=pytest.mark.long)],
)
def test_the_peer_computes_the_authors_numbers(scheme, x64):
  torch = pytest.importorskip("torch")
  from benchmarks import peer_torch

  settings, recorded = golden_setup.read(test_parity.FILES[-1])
  setup = golden_setup.Setup(settings)
  start, sources = setup.start()
  state, meta_params, source = peer_torch.from_jax(
    start, sources[""], setup.pairs, lambda tensor: tensor
  )
  update = peer_torch.adam_l2(
    meta_params, settings["meta_lr"], settings["meta_weight_decay"]
  )
  for it in range(2):
    batch = setup.batch(it)
    state, grads, metrics = getattr(peer_torch, scheme)(
      state,
      meta_params,
      source,
      torch.from_numpy(np.array(batch.images).transpose(0, 3, 1, 2)),
      torch.from_numpy(np.array(batch.labels)),
      peer_torch.Settings(
        settings["T"],
        settings["beta"],
        settings["lr"],
        settings["momentum"],
        settings["weight_decay"],
      ),
    )
    update(grads)
    computed = metrics | {
      "meta_grad_norm": _norm(grads),
      "meta_param_norm": _norm(meta_params),
    }
    if it == 0:
      computed |= {f"meta_grad/{name}": x for name, x in grads.items()}
    for name, value in state.params.items():
      computed[f"target_param_norm/{name.removeprefix('target.')}"] = (
        value.norm()
      )
    for name, value in computed.items():
      golden_setup.assert_equal(
        value.detach().numpy(), recorded[f"it{it}/{name}"], name
      )


def _norm(tensors):
  return sum(x.square().sum() for x in tensors.values()).sqrt()


def test_what_is_timed_trains():
  setting = cases.Setting(
    source="resnet_tiny",
    target="vgg_tiny",
    pairs="one_to_one",
    image_size=8,
    batch_size=4,
    num_seeds=2,
  )
  iteration = cases.create(setting)
  state = jax.device_get(iteration.state)
  program = cases.compile_iteration(setting, iteration)
  after, metrics = program.call(
    iteration.state,
    iteration.setup.scalars,
    iteration.setup.sources,
    iteration.batch,
  )
  assert np.isfinite(metrics["meta_grad_norm"]).all()
  before, after = state.meta_params, jax.device_get(after.meta_params)
  changed = lambda x, y: [
    not np.array_equal(*seed) for seed in zip(x, y, strict=True)
  ]
  assert all(jax.tree.leaves(jax.tree.map(changed, before, after)))


def test_slopes_of_a_soak():
  """Memory grows by 2 MiB per 1,000 iterations once the run is warm."""
  samples = [
    soak.Sample(
      iteration=100 * n,
      seconds=10.0 * n,
      processor_seconds=20.0 * n if n < 55 else 20.0 * 55 + 30.0 * (n - 55),
      allocated=300.0 + 0.1 * n + 30 * (n % 10 == 0),  # 30 for a write.
      memory=500 + 0.2 * n if n >= 10 else 100,
      workers_memory=50.0,
      files=30,
      threads=20,
    )
    for n in range(100)
  ]
  found = soak.slopes(samples)
  assert found["memory"] == pytest.approx(2)
  assert found["allocated"] == pytest.approx(1)
  assert found["allocated_last_half"] == pytest.approx(1)
  assert found["files"] == pytest.approx(0, abs=1e-9)
  assert found["seconds_first_half"] == pytest.approx(100)
  assert found["processor_seconds_first_half"] == pytest.approx(200)
  assert found["processor_seconds_last_half"] == pytest.approx(300)


def test_a_soak_reads_whole_records_only(tmp_path):
  file = tmp_path / "metrics.jsonl"
  assert soak._last_record(file) is None
  lines = ['{"kind": "train", "step": 5}', '{"kind": "epoch", "step": 6}']
  half = '{"kind": "train", "step": 10, "by_pair": {"a": 1}'
  file.write_text("\n".join([*lines, half]))
  assert soak._last_record(file) == {"kind": "train", "step": 5}


def test_a_soak_counts_what_is_allocated():
  before = soak.allocated()
  array = np.ones(2**23)  # 64 MiB.
  assert 60 < soak.allocated() - before < 70
  del array
  assert soak.allocated() - before < 5


def test_a_study_continues_from_its_file_alone(tmp_path, monkeypatch):
  """On another machine, whose folder is empty."""
  monkeypatch.setattr(study, "_commit", lambda: "1234abc")
  file, folder = tmp_path / "study.jsonl", tmp_path / "one"
  good, bad = (
    folder / f"screening/{method}/seed0" for method in ("scratch", "l2t_ww")
  )
  pair = {"source": "s", "target": "t", "num_channels": 64}
  learned = {"history": [1.0, 1.2, 1.5], "channel_concentration": 63.0}
  summary = {"seed": 0, "val_accuracy": 0.5}

  def write(run, name, text):
    run.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(text)

  write(good, "summary.json", json.dumps(summary | {"phases": {}}))
  record = study.Record(file, folder)
  assert not good.exists()  # It has no line yet, so it is trained again.
  write(good, "summary.json", json.dumps(summary | {"phases": {}}))
  write(good, "transfer_map.json", json.dumps({"pairs": [pair | learned]}))
  write(bad, "error.txt", "iteration 3: not finite: loss\n\nTraceback")
  record.add(good, "scratch", {"epochs": 20})
  record.add(bad, "l2t_ww", {"epochs": 20})
  record.name_finalists(["scratch", "l2t_ww"])

  elsewhere = tmp_path / "two"
  again = study.Record(file, elsewhere)
  assert again.finalists == ("scratch", "l2t_ww")
  for run in ("screening/scratch/seed0", "screening/l2t_ww/seed0"):
    assert again.has(elsewhere / run, {"epochs": 20, "added_later": 1})
    with pytest.raises(errors.InputError, match="seed0 has epochs=20, but the"):
      again.has(elsewhere / run, {"epochs": 40})
  assert not again.has(elsewhere / "screening/scratch/seed1")
  text = (elsewhere / "screening/scratch/seed0/summary.json").read_text()
  assert json.loads(text) == summary
  text = (elsewhere / "screening/l2t_ww/seed0/error.txt").read_text()
  assert text == "iteration 3: not finite: loss"
  (moved,) = again.lines[0]["pairs"]
  assert moved["pair_weight"] == [1.0, 1.5]
  with pytest.raises(errors.InputError, match=r"has lwf\+aft; there are"):
    again.name_finalists(["scratch", "lwf+aft"])
  with pytest.raises(errors.InputError, match="names other finalists"):
    again.name_finalists(["scratch", "aft"])
  monkeypatch.setattr(study, "_commit", lambda: "5678def")
  with pytest.raises(errors.InputError, match="holds runs of commit 1234abc"):
    study.Record(file, tmp_path / "three")
  monkeypatch.setattr(study, "_EQUAL_COMMITS", ("1234abc",))
  assert study.Record(file, tmp_path / "three").lines == again.lines


def test_a_study_uses_a_learned_map_again(tmp_path, monkeypatch):
  """On another machine, whose folder has only what the file contains."""
  monkeypatch.setattr(study, "_commit", lambda: "1234abc")
  file = tmp_path / "study.jsonl"
  (stage,) = (one for one in study.STAGES if one.name == "frozen_map")
  run = tmp_path / "one" / study._MAP
  run.mkdir(parents=True)
  pair = {
    "source": "stage1_block5",
    "target": "conv1",
    "pair_weight": 2.5,
    "history": [1.0, 2.5],
    "channel_concentration": 15.0,
    "num_channels": 16,
    "channel_weights": [1 / 16] * 16,
  }
  (run / "transfer_map.json").write_text(json.dumps({"pairs": [pair]}))
  record = study.Record(file, tmp_path / "one")
  (run / "summary.json").write_text("{}")
  record.add(run, "l2t_ww", {})

  folder = tmp_path / "two"
  study.Record(file, folder)
  (folder / "refined/l2t_ww/tuning.json").write_text(
    json.dumps({"chosen": {"transfer.beta": 2.0}})
  )
  for cell in study.make_cells(stage, folder, []):
    channel, weights = transfer_map.read_weights(cell.config.transfer.map)
    assert weights == {"stage1_block5->conv1": 2.5}
    np.testing.assert_array_equal(channel["stage1_block5->conv1"], 1 / 16)
    assert from_config.load_map(cell.config)


def test_processes_share_a_study_by_method(tmp_path):
  """Each stage is trained by them once; a stage may be left to one of them."""
  first = ["lwf", "lwf+l2t_ww"]
  names = {name for stage in study.STAGES for name in stage.methods}
  second = sorted(names - set(first))
  for stage in study.STAGES:
    shares = [study.only(stage, methods).methods for methods in (first, second)]
    assert sorted(sum(shares, ())) == sorted(stage.methods)
    assert study.only(stage, []) == stage
    # A method may not read all the fields that the stage tunes.
    if stage.tune and stage.methods:
      cells = study.make_cells(stage, tmp_path, [])
      assert study.tuned(stage, cells) == list(stage.tune)
      for cell in cells:
        for text in study.tuned(stage, [cell]):
          assert config.reads(cell.config, text.partition("=")[0])
  with pytest.raises(errors.InputError, match="--only has lfw; there are scra"):
    study.only(study.STAGES[0], ["lfw"])


def test_the_table_of_a_study():
  first, second = (
    study.Stage(name, "quarter", ("scratch", "aft"), num_seeds=3)
    for name in ("screening", "longer")
  )

  def cell(method, *accuracies):
    summaries = tuple(
      {"seed": seed, "test_accuracy": accuracy, "val_accuracy": 0.5}
      for seed, accuracy in enumerate(accuracies)
    )
    return tables.Cell(method, "", summaries, num_seeds=3)

  variant = first._replace(methods=("scratch",), fields=("epochs=9",))
  scratch = cell("scratch", 0.4, 0.41, 0.42)
  failed = tables.Cell("lwf", "", (), num_seeds=3, errors=("seed 0: no",))
  text = study.to_markdown(
    [
      (first, [scratch, cell("aft", 0.42, 0.42, 0.42)]),
      (second, [cell("aft", 0.5, 0.51, 0.52)]),
      (second, [cell("scratch"), cell("aft", 0.5, 0.51, 0.52), failed]),
      (first, [scratch, failed]),
      (variant, [cell("scratch", 0.5, 0.51, 0.52)]),
      (variant, [cell("scratch", 0.6, 0.61, 0.62)]),
    ]
  )
  lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
  heads = [line for line in lines if line[0] == "method"]
  rows = [line for line in lines if line[0] == "aft"]
  # The first differences are 2, 1 and 0: t(2) is 4.303 for 95 and 1.061 for
  # 80 %, and 4.303 / √3 is 2.48.
  assert heads[0][6:] == ["minus scratch"]
  assert rows[0][4:] == ["50.0 ± 0.0", "42.0 ± 0.0", "+1.0 [-1.5, 3.5]; 3.1"]
  # A stage without scratch is compared with that of the last one ...
  assert heads[1][6:] == ["minus scratch of screening"]
  assert rows[1][6:] == ["+10.0 [10.0, 10.0]; 0.0"]
  # ... but not one whose own has not finished.
  assert heads[2][6:] == ["minus scratch"]
  assert rows[2][5:] == ["51.0 ± 1.0"]
  # A variant of a method is compared with the method, not with a variant.
  variants = [line for line in lines if line[0] == "scratch"][-2:]
  assert heads[4][6:] == ["minus scratch of screening"]
  assert [line[6:] for line in variants] == [
    ["+10.0 [10.0, 10.0]; 0.0"],
    ["+20.0 [20.0, 20.0]; 0.0"],
  ]
  assert "lwf: seed 0: no" in text


def test_a_difference_is_detected_as_often_as_the_study_says():
  rng = np.random.default_rng(0)
  count = 20
  values = rng.standard_normal((4000, count))
  found = study.detectable(
    statistics.Difference(0.0, 2.093 / np.sqrt(count), (0.0,) * count)
  )
  t = (values + found).mean(1) / (values.std(1, ddof=1) / np.sqrt(count))
  assert 0.77 < np.mean(t > 2.093) < 0.83


def test_how_far_weights_moved():
  def line(run, *pairs):
    method = run.split("/")[1]
    moved = [
      {"pair_weight": [1.0, last], "effective_channels": count, "channels": 64}
      for last, count in pairs
    ]
    return {"run": run, "method": method, "pairs": moved}

  assert study.moved_weights(
    [
      line("screening/scratch/seed0"),
      line("screening/fm_single/seed0", (1.0, 63.99999999999999)),
      line("screening/l2t_ww/tuning_trials/a/seed10000", (9.0, 64.0)),
      line("screening/l2t_ww/seed0", (1.5, 56.0), (0.5, 32.0)),
      line("screening/l2t_ww/seed1", (2.0, 48.0)),
    ]
  ) == (
    "screening l2t_ww: pair weights changed by up to 1.00 (median 0.50), and"
    " 50.0% to 87.5% of a pair's channels are effective"
  )


def test_predicted_efficiency():
  """With a ring, each of 4 devices sends 3/4 of the data, twice."""
  args = scaling.make_parser().parse_args(
    ["--teraflops=1", "--node_gigabytes=1", "--microseconds=1000"]
  )
  measured = {"flops": 4e12, "collective_bytes": 4e9, "collectives": 1000}
  predicted = scaling.predict(measured, 4, args)
  assert predicted == {
    "devices": 4,
    "compute_ms": pytest.approx(4000.0),
    "transfer_ms": pytest.approx(6000.0),
    "latency_ms": pytest.approx(2000.0),
    "efficiency": pytest.approx(1 / 3),
  }


@pytest.mark.long
def test_inner_loops_have_equal_gradients(tmp_path):
  """Ours and a plain loop agree with float64; every cell is measured."""
  result = small_runs.run_python(
    *("-m", "benchmarks.inner_loops", "--steps=2", "--networks=mlp"),
    *("--ways=linearized,nested,by_hand", "--rounds=1", "--bias_steps=0"),
    f"--folder={tmp_path}",
  )
  cells = json.loads(result.stdout.splitlines()[-1])["cells"]
  ways = [cell["way"] for cell in cells]
  assert ways == ["linearized", "nested", "by_hand"]
  for cell in cells:
    assert "failure" not in cell, cell["failure"]
    assert cell["error"] < 1e-5
    assert cell["seconds"] > 0
    assert cell["temp_bytes"] > 0
  assert (tmp_path / "inner_loops.png").exists()


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_inner_loops_in_torch_solve_the_same_problem(network, tmp_path, x64):
  pytest.importorskip("torch")
  from benchmarks import inner_loops_torch

  path, gradient = tmp_path / "problem.npz", tmp_path / "gradient.npy"
  inner_loop_problem.write_problem(network, path)
  cell = inner_loops.Cell(network, 2, "torch", 1, str(path), str(gradient))
  inner_loops_torch.measure(cell)
  exact = inner_loop_problem.gradient_in_double(
    inner_loop_problem.read_problem(path), 2
  )
  assert inner_loop_problem.relative_error(np.load(gradient), exact) < 1e-5
