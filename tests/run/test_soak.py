"""A long run holds no more at its end than when it had warmed up."""

import json
import statistics
import sys

import pytest

from tests.support import small_runs, soak

pytestmark = [
  pytest.mark.soak,
  pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc and asks glibc for its memory"
  ),
]

# Epochs that are compared, 1,000 iterations apart.
WARM, END = range(12, 26), range(37, 51)
# What those 1,000 iterations may add to the memory: 8 KB each. They were seen
# to add up to 3.3 MB in all, in steps, most of it fragmentation.
MEMORY = 8 * 2**20
# Pools start their threads one by one, when they are first short of one; a
# thread a checkpoint would be 5.
THREADS = 2


@pytest.mark.parametrize("what", ["training", "streaming"])
def test_2000_iterations_hold_no_more_and_compile_nothing(what, tmp_path):
  result = small_runs.run_python("-m", "tests.support.soak", what, tmp_path)
  assert result.returncode == 0, result.stderr
  held = json.loads((tmp_path / "held.json").read_text())
  assert soak.EPOCHS * soak.STEPS_PER_EPOCH == 2000
  # The first checkpoints compile a little, too.
  first = next(one for one in held if one["epoch"] in WARM)
  last = held[-1]
  assert last["compiled"] > 0
  assert last["compiled"] == first["compiled"]
  assert last["traced"] == first["traced"]
  # Medians, so that a background write during one sample does not matter.
  medians = [
    {
      name: statistics.median(one[name] for one in held if one["epoch"] in part)
      for name in ("memory", "arrays", "files", "threads")
    }
    for part in (WARM, END)
  ]
  grown = {name: medians[1][name] - medians[0][name] for name in medians[0]}
  assert grown["arrays"] <= 0
  assert grown["files"] <= 0
  assert grown["threads"] <= THREADS
  assert grown["memory"] <= MEMORY, f"{grown['memory'] / 2**20:.1f} MB"
