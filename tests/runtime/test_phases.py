"""Where time went: phases nest, add up and leave out what JAX compiles."""

import json
import threading
import time

import pytest

from l2t_jax.runtime import phases
from tests.support import small_runs


@pytest.fixture(autouse=True)
def from_nothing():
  phases.take()


def test_a_phase_stands_still_while_one_within_runs():
  start = time.perf_counter()
  with phases.phase("iterations"):
    time.sleep(0.02)
    with phases.phase("saving"):
      time.sleep(0.04)
  whole = time.perf_counter() - start
  seconds = phases.take()
  assert list(seconds) == ["iterations", "saving"]
  assert seconds["iterations"] >= 0.02 and seconds["saving"] >= 0.04
  assert sum(seconds.values()) <= whole
  assert phases.take() == {}


def test_what_is_taken_within_a_phase_goes_on_afterwards():
  start = time.perf_counter()
  with phases.phase("other"):
    time.sleep(0.02)
    first = phases.take()["other"]
    time.sleep(0.01)
  second = phases.take()["other"]
  assert first >= 0.02 and second >= 0.01
  assert first + second <= time.perf_counter() - start


def test_an_error_ends_a_phase():
  with pytest.raises(ValueError), phases.phase("saving"):
    raise ValueError
  phases.take()
  time.sleep(0.01)
  assert phases.take() == {}


def test_other_threads_are_not_counted():
  @phases.phase("saving")
  def save():
    time.sleep(0.01)

  thread = threading.Thread(target=save)
  thread.start()
  thread.join()
  assert phases.take() == {}
  save()
  assert list(phases.take()) == ["saving"]


_COMPILE_TWICE = """
import json
import jax
from l2t_jax.runtime import compilation, phases

compilation.use_cache()
for _ in range(2):
  with phases.phase("iterations"):
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))
    ahead = compilation.compile_ahead(jax.jit(lambda x: x * x), 1.0)
    program = compilation.wait(ahead)
  print(json.dumps([program.loaded, phases.take()]))
  jax.clear_caches()
"""


def test_what_jax_compiles_or_loads_is_no_part_of_a_phase(tmp_path):
  result = small_runs.run_python(
    "-c",
    _COMPILE_TWICE,
    environment={"JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
  )
  first, second = map(json.loads, result.stdout.splitlines())
  parts = {"iterations", "tracing"}
  assert first[0] is False and set(first[1]) == parts | {"compiling"}
  assert second[0] is True and set(second[1]) == parts | {"loading programs"}


def test_the_line_leaves_out_what_takes_no_time():
  assert phases.line({"imports": 2.0, "data": 0.04, "iterations": 7.51}) == (
    "9.6 s: imports 2.0, iterations 7.5"
  )
