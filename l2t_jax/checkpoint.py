"""Save and restore the whole state of a run, with Orbax."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from l2t_jax import types


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for writes."""

  def __init__(self, folder: pathlib.Path):
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=2),
      item_names=("state", "progress"),
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def save(
    self, step: int, state: types.TrainState, progress: dict[str, Any]
  ) -> None:
    """Save in the background.

    Args:
      step: iterations done.
      state: what the iterations work on.
      progress: what the loop around them has to remember, JSON-able.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        # A copy: it is written in the background.
        progress=ocp.args.JsonSave(copy.deepcopy(progress)),
      ),
    )

  def restore(
    self, like: types.TrainState
  ) -> tuple[types.TrainState, dict[str, Any]]:
    """Restore the newest checkpoint; there must be one.

    Args:
      like: a state of the same shapes and shardings.

    Returns:
      (state, progress).
    """
    step = self._manager.latest_step()
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(like),
        progress=ocp.args.JsonRestore(),
      ),
    )
    return restored["state"], restored["progress"]


def newest_step(folder: pathlib.Path) -> int:
  """Find the iterations that the newest checkpoint has done; 0 for none."""
  with ocp.CheckpointManager(folder.absolute()) as manager:
    return manager.latest_step() or 0
