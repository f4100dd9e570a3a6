"""Checkpoints: damage, refusal, and which ones are kept."""

import errno
import os
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import errors, types
from l2t_jax.runtime import checkpoint, compilation

_STATE = types.TrainState(
  jnp.zeros((), jnp.int32), jax.random.normal(jax.random.key(0), 30_000), {}, {}
)


def _largest_file(folder):
  return max(folder.rglob("*"), key=lambda path: path.stat().st_size)


def _exchange(folder):
  """Replace the numbers by valid ones; only the checksum reveals it."""
  shutil.rmtree(folder / "state")
  shutil.copytree(folder.with_name("2") / "state", folder / "state")


def _change_progress(folder):
  path = folder / "progress" / "metadata"
  content = path.read_text()
  path.write_text(content.replace('"epoch": 1', '"epoch": 3'))
  assert path.read_text() != content


def _truncate(folder):
  os.truncate(_largest_file(folder), 5000)


def _remove(folder):
  _largest_file(folder).unlink()


@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (_exchange, "checksum"),
    (_change_progress, "checksum"),
    (_truncate, "not valid"),
    (_remove, "Truncated"),
  ],
)
def test_a_damaged_checkpoint_is_noticed(tmp_path, harm, message):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _STATE, {"epoch": 1})
    other = _STATE._replace(inner=_STATE.inner.at[7].multiply(1.001))
    checkpoints.save(2, other, {"epoch": 1})
  harm(tmp_path / "1")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(checkpoint.DamagedError, match=message):
      checkpoints.restore(1, _STATE)
    checkpoints.restore(2, _STATE)


def test_damaged_checkpoints_are_all_kept(tmp_path):
  """Also several of the same iteration."""
  for name in ("damaged_checkpoint_1", "damaged_checkpoint_1_2"):
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
      checkpoints.save(1, _STATE, {})
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
      assert checkpoints.set_aside(1) == tmp_path / name
      assert checkpoints.steps() == []


@pytest.mark.parametrize(
  ("error", "kind", "message"),
  [
    (
      OSError(errno.EIO, "Input/output error"),
      errors.StorageError,
      "cannot read .* Input/output",
    ),
    (MemoryError("no room"), errors.Stop, "not enough memory .*no room"),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB"),
      errors.Stop,
      "not enough memory to read .*3 GiB",
    ),
  ],
)
def test_what_is_no_damage(tmp_path, monkeypatch, error, kind, message):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _STATE, {})

    def fail(*args, **kwargs):
      raise error

    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(kind, match=message) as caught:
      checkpoints.restore(1, _STATE)
    assert type(caught.value) is kind


def test_any_kind_of_number_can_be_saved(tmp_path):
  """A network's own state may be of any type."""
  state = _STATE._replace(
    inner={
      "flag": jnp.array(True),
      "wave": jnp.array([1j, 2.0]),
      "half": jnp.ones(3, jnp.bfloat16),
      "count": jnp.array(7, jnp.int8),
    }
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(1, state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _STATE, {})
    checkpoints.restore(1, _STATE)
    message = r"inner is \[30000\] in it, \[7\] in this run"
    with pytest.raises(errors.InputError, match=message):
      checkpoints.restore(1, _STATE._replace(inner=jnp.ones(7)))
    with pytest.raises(errors.InputError, match="meta_params/f is missing in"):
      checkpoints.restore(1, _STATE._replace(meta_params={"f": jnp.ones(3)}))


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _STATE, {})
    bad = _STATE._replace(inner=_STATE.inner.at[5].set(jnp.inf))
    with pytest.raises(errors.BadNumbersError, match="inner is not finite"):
      checkpoints.save(2, bad, {})
    assert checkpoints.steps() == [1]


def test_what_will_be_computed_again_is_dropped(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step in (3, 6):
      checkpoints.save(step, _STATE, {})
    checkpoints.drop_after(3)
    assert checkpoints.steps() == [3]
    checkpoints.save(6, _STATE, {"epoch": 2})
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(6, _STATE)[1] == {"epoch": 2}


def test_a_saved_state_is_freed_without_the_garbage_collector(tmp_path):
  with compilation.garbage_collection_paused():
    state = _STATE._replace(inner=jnp.zeros(12_345))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, state, {})
    array = weakref.ref(state.inner)
    del state
    assert array() is None
