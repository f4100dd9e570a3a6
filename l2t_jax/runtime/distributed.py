"""The processes of a run: their start, their agreement, the loss of one.

With a single process, as in most runs, the functions do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import traceback
from typing import NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from l2t_jax import errors

# Seconds without a sign of life after which a process counts as lost.
_HEARTBEAT_TIMEOUT = 30
# Seconds that the processes have to find one another.
_START_TIMEOUT = 300
# Seconds that process 0 waits before it leaves with an error, so that others
# can report theirs.
_GRACE = 3
# Words in JAX's errors that tell that another process is the reason.
_OF_ANOTHER = re.compile(
  r"gloo|nccl|collective|coordination|barrier|heartbeat|UNAVAILABLE"
  r"|DEADLINE_EXCEEDED|Connection (reset|closed|refused)|Socket closed",
  re.IGNORECASE,
)


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Join the other processes of the run, before anything is computed.

  All arguments are None where Slurm, Open MPI, Kubernetes or a TPU pod tells.

  Args:
    coordinator: HOST:PORT of process 0, with a free port.
    num_processes: how many processes there are.
    process_id: index of this process, from 0.

  Raises:
    errors.InputError: an argument is missing or wrong.
    errors.LostProcessError: the others did not join in time.
  """
  if coordinator and not re.fullmatch(r"\S+:\d+", coordinator):
    raise errors.InputError(
      f"--coordinator={coordinator} must be HOST:PORT, such as node0:1234"
    )
  is_told = None not in (coordinator, num_processes, process_id)
  # While JAX waits for the others, no Python handler would run.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  # The others would wait for a process that saves and leaves alone.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      cluster_detection_method="deactivate" if is_told else None,
      initialization_timeout=_START_TIMEOUT,
      heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
    )
  except (ValueError, TypeError, KeyError) as error:
    raise errors.InputError(
      f"cannot start in several processes: {_in_one_line(error)}; give"
      " --coordinator=HOST:PORT, --num_processes and --process_id"
    ) from error
  except RuntimeError as error:
    raise errors.LostProcessError(
      f"the processes did not find one another: {_in_one_line(error)}"
    ) from error
  ctypes.CDLL(None).signal(signal.SIGABRT, _leave_on_abort)


def are_several() -> bool:
  """Return whether this is one of several processes of a run."""
  return jax.distributed.is_initialized()


def is_first() -> bool:
  """Return whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def is_found_by_all(error: BaseException) -> bool:
  """Return whether every process raises an error at the same iteration."""
  return not are_several() or getattr(error, "meets_all_processes", False)


def is_of_another(error: BaseException) -> bool:
  """Return whether an error says that another process was lost."""
  return are_several() and bool(_OF_ANOTHER.search(str(error)))


def agree(number: int) -> int:
  """Return process 0's number: file systems may show other processes less."""
  if not are_several():
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def is_true_for_all(condition: bool) -> bool:
  """Return whether a condition holds in every process; all must call this."""
  if not are_several():
    return condition
  return bool(np.all(multihost_utils.process_allgather(np.bool_(condition))))


def wait_for_all(where: str) -> None:
  """Wait until every process calls this with the same `where`."""
  if are_several():
    multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Exit all processes together.

  Wraps a whole command. A process that fails alone ends at once, without JAX's
  shutdown, which would wait for the others; its end ends them too, so that they
  do not hang in a collective.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if is_found_by_all(error):
      wait_for_all("the end")
      raise
    if is_first():
      time.sleep(_GRACE)  # Its end ends the others.
    if isinstance(error, errors.Stop):
      _leave(str(error), error.exit_code)
    traceback.print_exc()
    if is_of_another(error):
      _leave(_LOST, errors.LostProcessError.exit_code)
    if isinstance(error, KeyboardInterrupt):
      _leave("interrupted", 130)
    _leave("this process failed, as told above", 1)
  else:
    wait_for_all("the end")


_LOST = (
  "another process of the run ended or no longer answers, or JAX itself failed"
  " (its own words stand above); the others' output says more. Start all"
  " processes again, also on other machines or another number of them: they go"
  " on from the last checkpoint"
)


def _leave(message: str, exit_code: int) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(exit_code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _leave_on_abort(_):
  """Handle the abort() by which JAX ends when a process is lost.

  JAX calls it in a thread of its own, where no Python handler runs.
  """
  _leave(_LOST, errors.LostProcessError.exit_code)


def _in_one_line(error: Exception) -> str:
  return " ".join(str(error).split())
