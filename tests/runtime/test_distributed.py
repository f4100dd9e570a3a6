"""Several devices or processes compute the same as one."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest
import yaml

from l2t_jax import errors
from l2t_jax.runtime import distributed, sharding
from tests.support import small_runs

pytestmark = pytest.mark.xdist_group("processes")
# Seconds. A process notices the loss of another within 30 seconds; the rest is
# for a busy machine.
_BOUND = 60

_ON_DEVICES = """
import sys, jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)
from l2t_jax.runtime import sharding
from tests.support import processes
for count in (1, 4):
  mesh = sharding.make_mesh(jax.devices()[:count])
  processes.save(f"{sys.argv[1]}/{count}.npz", processes.run(mesh))
  groups = processes.run(mesh, batch_norm_groups=4)
  processes.save(f"{sys.argv[1]}/groups_{count}.npz", groups)
mesh = sharding.make_mesh(jax.devices()[:2])
processes.save(f"{sys.argv[1]}/split.npz", processes.run(mesh, split=True))
"""


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
  """Numbers after some steps on 1 and 4 devices, and split over 2."""
  folder = tmp_path_factory.mktemp("on_devices")
  result = small_runs.run_python("-c", _ON_DEVICES, folder)
  assert result.returncode == 0, result.stderr
  return folder


def test_devices_compute_what_one_does(on_devices):
  for name in ("4", "split"):
    _assert_close(on_devices / f"{name}.npz", on_devices / "1.npz")


def test_groups_of_batch_norm_do_not_depend_on_the_devices(on_devices):
  _assert_close(on_devices / "groups_4.npz", on_devices / "groups_1.npz")
  grouped = np.load(on_devices / "groups_1.npz")
  whole = np.load(on_devices / "1.npz")
  name = "[1]['target_loss']"
  assert grouped[name] != whole[name]


_ALL_REDUCES = """
from benchmarks import cases, growth
from l2t_jax.runtime import sharding
for groups in (1, 2):
  setting = cases.Setting(
    source="resnet_tiny",
    target="vgg_tiny",
    image_size=8,
    batch_size=16,
    batch_norm_groups=groups,
  )
  program = cases.compile_for(
    setting, cases.create(setting), sharding.make_mesh()
  )
  print(growth.count_collectives(program.as_text()))
"""


def test_groups_of_batch_norm_on_one_device_need_no_communication():
  """What is left are the sums of gradients, of metrics and of statistics."""
  result = small_runs.run_python(
    "-c", _ALL_REDUCES, environment={"JAX_NUM_CPU_DEVICES": "2"}
  )
  whole, grouped = map(int, result.stdout.split())
  assert grouped < 12 < 30 < whole, result.stderr


_SPLIT = """
import sys, jax
from l2t_jax import cli
from l2t_jax.run import from_config, setup
config = cli.load_config(sys.argv[1], ["--config.shard_params=true"])
run = setup.build(from_config.resolve(config))
state = run.create_state(config.seed)
for arrays in (state.inner.params, state.inner.opt_state, run.sources):
  leaves = jax.tree.leaves(arrays)
  part = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
  print(part / sum(leaf.size for leaf in leaves))
"""


def test_a_network_that_does_not_fit_is_split(source, tmp_path):
  path = small_runs.write_config(
    tmp_path, source, epochs=1, log_every=1, checkpoint_steps=5
  )
  result = small_runs.run_python(
    "-c", _SPLIT, path, environment={"JAX_NUM_CPU_DEVICES": "4"}
  )
  parts = [float(part) for part in result.stdout.split()]
  assert len(parts) == 3, result.stderr
  assert max(parts) < 0.5, parts


def test_splitting_needs_the_cpu(monkeypatch):
  """As where JAX_PLATFORMS=cuda leaves it out."""
  with monkeypatch.context() as patch:
    patch.setattr(jax, "local_devices", lambda backend: jax.devices("nope"))
    with pytest.raises(errors.InputError, match="add cpu to JAX_PLATFORMS"):
      sharding.on_host()


def test_what_is_true_for_all_is_true_for_each(monkeypatch):
  for other in (False, True):
    monkeypatch.setattr(
      multihost_utils,
      "process_allgather",
      lambda mine, other=other: np.array([mine, other]),
    )
    assert distributed.is_true_for_all(True) == other
    assert not distributed.is_true_for_all(False)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_processes_compute_what_one_does(on_devices, tmp_path, count):
  path = tmp_path / "numbers.npz"
  place = f"localhost:{_free_port()}"
  group = [
    small_runs.start_python(
      "-m", "tests.support.processes", path, place, count, i
    )
    for i in range(count)
  ]
  for process in group:
    _, stderr = process.communicate(timeout=small_runs.PATIENCE)
    assert process.returncode == 0, stderr
  _assert_close(path, on_devices / "1.npz")


def _assert_close(ours, theirs):
  ours, theirs = np.load(ours), np.load(theirs)
  assert set(ours) == set(theirs)
  for name in ours:
    np.testing.assert_allclose(
      ours[name], theirs[name], rtol=1e-9, atol=1e-12, err_msg=name
    )


@pytest.fixture
def train(source, tmp_path):
  """Start train.py in several processes with some devices each.

  Where there are several of either, parameters are split over them.
  """
  path = small_runs.write_config(
    tmp_path, source, epochs=4, log_every=1, checkpoint_steps=5
  )

  def start(workdir, num_processes, num_devices=1):
    command = ["train.py", f"--config={path}", f"--workdir={workdir}"]
    flags = lambda process_id: (
      f"--coordinator=localhost:{port}",
      f"--num_processes={num_processes}",
      f"--process_id={process_id}",
    )
    if num_processes * num_devices > 1:
      command.append("--config.shard_params=true")
    port = _free_port()
    return [
      small_runs.start_python(
        *command,
        *(flags(process_id) if num_processes > 1 else ()),
        environment={"JAX_NUM_CPU_DEVICES": str(num_devices)},
      )
      for process_id in range(num_processes)
    ]

  return start


@pytest.mark.long
def test_a_run_of_several_processes_survives(train, tmp_path):
  """It loses processes, is interrupted, and ends in other processes."""
  lost, workdir = errors.LostProcessError.exit_code, tmp_path / "several"
  losses = ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP))
  losses += ((1, signal.SIGINT),)  # Ctrl-C for one alone: it does not save.
  for victim, loss in losses:
    group = train(workdir, 2)
    _wait_for_records(workdir, group, 6)
    group[victim].send_signal(loss)
    other = group[1 - victim]
    _, stderr = other.communicate(timeout=_BOUND)
    assert other.returncode == lost, stderr
    assert re.search("^error: another process of the run ended", stderr, re.M)
    group[victim].kill()
    group[victim].wait(small_runs.PATIENCE)
  group = train(workdir, 2)
  _wait_for_records(workdir, group, 6)
  group[1].send_signal(signal.SIGTERM)
  steps = set()
  for process in group:
    _, stderr = process.communicate(timeout=_BOUND)
    assert process.returncode == errors.Interrupted.exit_code, stderr
    steps.add(re.search(r"saved after iteration (\d+) of", stderr)[1])
  (step,) = map(int, steps)
  same, alone = tmp_path / "same", tmp_path / "alone"
  shutil.copytree(workdir, same)
  for group in (train(workdir, 1, num_devices=4), train(same, 2)):
    stdout = ""
    for process in group:
      output, stderr = process.communicate(timeout=small_runs.PATIENCE)
      assert process.returncode == 0, stderr
      stdout += output
    assert f"resuming after iteration {step}" in stdout
  (process,) = train(alone, 1)
  process.communicate(timeout=small_runs.PATIENCE)
  runs = [small_runs.records(w, "train") for w in (workdir, same, alone)]
  steps = [[record["step"] for record in run] for run in runs]
  assert steps == [steps[0]] * 3
  other, same, one = (
    np.array([record["loss"] for record in run]) for run in runs
  )
  # In float32, rounding errors grow from iteration to iteration.
  np.testing.assert_array_equal(other[:step], same[:step])
  np.testing.assert_allclose(other[step:][:5], same[step:][:5], rtol=1e-4)
  np.testing.assert_allclose(other[:5], one[:5], rtol=1e-4)
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["device"].startswith("4 x")


def _wait_for_records(workdir, group, count):
  """Wait until a run has recorded `count` more iterations."""
  path = workdir / "metrics.jsonl"
  num = lambda: path.read_bytes().count(b"\n") if path.exists() else 0
  wanted = num() + count
  while num() < wanted:
    assert all(process.poll() is None for process in group)
    time.sleep(0.02)


def _free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--coordinator=here"], "--coordinator=here must be HOST:PORT"),
    (["--distributed"], "give --coordinator=HOST:PORT, --num_processes and"),
    (
      ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
      "process_id=2, num_processes=2",
    ),
  ],
)
def test_a_start_that_cannot_work(flags, message):
  result = subprocess.run(
    [sys.executable, "train.py", "--config=none", "--plan", *flags],
    capture_output=True,
    text=True,
    timeout=small_runs.PATIENCE,
    cwd=small_runs.ROOT,
  )
  assert result.returncode == errors.InputError.exit_code
  assert message in result.stderr
  assert result.stderr.count("\n") == 1


def test_the_manifest_for_kubernetes():
  """It is valid, and says the same in all its places."""
  import kubernetes_validate

  text = (small_runs.ROOT / "launch" / "kubernetes.yaml").read_text()
  service, job = yaml.safe_load_all(text)
  for resource in (service, job):
    kubernetes_validate.validate(resource, "1.31", strict=True)
  name, spec = job["metadata"]["name"], job["spec"]
  assert service["spec"]["selector"] == {"job-name": name}
  pod = spec["template"]["spec"]
  assert pod["subdomain"] == service["metadata"]["name"]
  (command,) = pod["containers"][0]["args"]
  count = spec["completions"]
  assert f"--coordinator={name}-0.{pod['subdomain']}:" in command
  assert f"--num_processes={count} " in command
  assert spec["parallelism"] == count
  fail, ignore, _ = spec["podFailurePolicy"]["rules"]
  codes = lambda *classes: [error.exit_code for error in classes]
  assert fail["onExitCodes"]["values"] == codes(
    errors.InputError, errors.BadNumbersError, errors.StorageError
  )
  assert set(ignore["onExitCodes"]["values"]) == {
    *codes(errors.LostProcessError, errors.Interrupted),
    128 + signal.SIGTERM,
  }
