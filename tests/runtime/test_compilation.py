"""Compilation: XLA's options, the cache, memory, and --plan."""

import gc
import itertools
import os
import threading

import chex
import jax
import jax.numpy as jnp
import pytest

from l2t_jax import errors
from l2t_jax.run import from_config, plan, train
from l2t_jax.runtime import compilation
from tests.support import small_runs


@pytest.mark.xdist_group("experiment")
def test_plan_names_the_cost_of_the_modes_that_training_takes(
  source, tmp_path, capsys
):
  config = small_runs.small_config(source)
  made = plan.make(from_config.resolve(config))
  assert tuple(made.programs) == ("linearized", "mixed")
  assert made.chosen == "linearized"
  assert made.steps_per_epoch == 3 and made.epochs == 3
  # VGG-tiny on one channel with 10 classes: 3x3 kernels with biases, batch
  # norms, and the classifier.
  widths = (1, 16, 32, 64)
  convs = sum(9 * i * o + 3 * o for i, o in itertools.pairwise(widths))
  assert made.num_parameters["target"] == convs + 64 * 10 + 10
  plan.show(made)
  printed = capsys.readouterr().out
  assert f"{made.num_parameters['target']:,}" in printed
  assert "chosen" in printed and "3 iterations per epoch" in printed


@pytest.mark.parametrize(
  ("entry", "file"),
  [
    ("0::/job/step", "sys/fs/cgroup/job/memory.max"),
    ("4:memory:/job", "sys/fs/cgroup/memory/memory.limit_in_bytes"),
  ],
)
def test_memory_is_what_a_container_has(tmp_path, entry, file):
  assert compilation.control_group_limits(tmp_path) == []
  for name, content in (
    ("proc/self/cgroup", f"1:cpu:/\n{entry}\n"),
    (file, "1234\n"),
    ("sys/fs/cgroup/job/step/memory.max", "max\n"),
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
  assert compilation.control_group_limits(tmp_path) == [1234]


@pytest.mark.parametrize("limits", [[], [1234]])
def test_memory_without_and_with_a_limit(monkeypatch, limits):
  monkeypatch.setattr(compilation, "control_group_limits", lambda: limits)
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  assert compilation.memory_limit() == min([physical, *limits])


@pytest.mark.xdist_group("experiment")
def test_what_does_not_fit_is_computed_with_less_memory(
  source, tmp_path, monkeypatch
):
  """By all seeds, and it is compiled only once."""
  answers = iter([False, True])
  monkeypatch.setattr(compilation, "fits", lambda program: next(answers))
  config = small_runs.small_config(source, epochs=1)
  training = train.Training(from_config.resolve(config))
  for seed in (0, 1):
    (summary,) = training.run({seed: tmp_path / str(seed)})
    assert summary["hypergradient_mode"] == "mixed"


@pytest.mark.xdist_group("experiment")
@pytest.mark.parametrize(
  ("mode", "advice"),
  [("auto", "MiB: lower"), ("linearized", "set config.bilevel.mode=mixed, or")],
)
def test_what_fits_in_no_way_is_refused(
  source, tmp_path, monkeypatch, mode, advice
):
  monkeypatch.setattr(compilation, "memory_limit", lambda: 2**20)
  config = small_runs.small_config(source, epochs=1)
  config.bilevel.mode = mode
  with pytest.raises(errors.InputError, match=advice) as error:
    small_runs.train(config, tmp_path)
  assert "and there are 1 MiB" in str(error.value)


@pytest.mark.optimized
def test_options_that_this_jaxlib_does_not_know_are_left_out(monkeypatch):
  assert compilation.options()
  monkeypatch.setattr(compilation, "_OPTIONS", {"cpu": {"no_such": "1"}})
  compilation.options.cache_clear()
  try:
    assert compilation.options() == {}
    program = compilation.compile_ahead(
      jax.jit(jnp.dot), jnp.eye(8), jnp.eye(8)
    ).result()
  finally:
    compilation.options.cache_clear()
  assert program.flops == 2 * 8**3
  assert program.memory_bytes == 3 * 8 * 8 * 4


@pytest.mark.optimized
def test_flops_of_a_loop_are_unknown():
  """XLA counts its body once, however often it runs."""
  repeat = lambda times, x: jax.lax.fori_loop(0, times, lambda _, y: y @ x, x)
  program = compilation.compile_ahead(jax.jit(repeat), 9, jnp.eye(8)).result()
  assert program.flops is None


@pytest.mark.optimized
def test_random_numbers_are_the_same_bits():
  """Also where their shapes alone are asked for."""
  draw = lambda key: (
    jax.random.normal(key, (300,)),
    jax.random.uniform(key, (7, 5)),
  )
  quick, key = compilation.jit_random(draw), jax.random.key(0)
  chex.assert_trees_all_equal(quick(key), jax.jit(draw)(key))
  chex.assert_trees_all_equal_shapes(jax.eval_shape(quick, key), draw(key))
  assert jax.jit(quick)(key)[1].shape == (7, 5)


def test_what_follows_does_not_wait_for_the_compiler(monkeypatch):
  compilation.options()  # Compiles once, where it is called.
  may_compile = threading.Event()
  compile_lowered = jax.stages.Lowered.compile

  def compile_when_told(lowered, **kwargs):
    assert may_compile.wait(timeout=20)
    return compile_lowered(lowered, **kwargs)

  monkeypatch.setattr(jax.stages.Lowered, "compile", compile_when_told)
  compiling = compilation.compile_ahead(
    jax.jit(jnp.dot), jnp.eye(8), jnp.eye(8)
  )
  assert not compiling.done()
  may_compile.set()
  assert compiling.result().call(jnp.eye(8), jnp.eye(8)).sum() == 8


def test_garbage_is_collected_again_after_tracing():
  @compilation.garbage_collection_paused()
  def outer(fails):
    with compilation.garbage_collection_paused():
      pass
    assert not gc.isenabled()  # The inner pause has not ended the outer one.
    if fails:
      raise ValueError

  assert gc.isenabled()
  outer(fails=False)
  assert gc.isenabled()
  with pytest.raises(ValueError):
    outer(fails=True)
  assert gc.isenabled()


@pytest.mark.optimized
def test_a_second_start_finds_what_the_first_compiled(tmp_path):
  arguments = (
    "train.py",
    "--config=configs/digits_source.py",
    "--config.epochs=1",
    "--config.target.model=vgg_tiny",
    "--config.data.per_class=5",
    "--config.batch_size=16",
  )
  program = (
    "import os, runpy, sys;"
    # conftest.py and the import of jax set all of these in this process.
    "[os.environ.pop(name) for name in list(os.environ)"
    " if name.startswith(('JAX_COMPILATION', 'JAX_PERSISTENT', 'TF_CPP'))];"
    "name, os.environ[name] = sys.argv[1].split('=');"
    "sys.argv = sys.argv[2:];"
    "runpy.run_path('train.py', run_name='__main__')"
  )
  home, own_folder = tmp_path / "home", tmp_path / "own"
  found = []
  for number, (variable, value, folder) in enumerate(
    [
      ("XDG_CACHE_HOME", home, home / "l2t_jax"),
      ("XDG_CACHE_HOME", home, home / "l2t_jax"),
      ("JAX_COMPILATION_CACHE_DIR", own_folder, own_folder),
    ]
  ):
    result = small_runs.run_python(
      "-c",
      program,
      f"{variable}={value}",
      *arguments,
      f"--workdir={tmp_path / str(number)}",
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr
    found.append(sorted(file.name for file in folder.glob("*-cache")))
  assert found[0] == found[1] and found[0]
  # The hash between the last hyphens depends on the folder, too.
  names = [[file.rsplit("-", 2)[0] for file in files] for files in found]
  assert names[0] == names[2]
