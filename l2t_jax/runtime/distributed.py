"""Runs of several processes: start, agreement, and the loss of a process.

With a single process, agreement is trivial and nothing waits.
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

# Seconds without a heartbeat after which a process counts as lost.
_HEARTBEAT_TIMEOUT = 30
# Seconds that the processes have to find one another.
_START_TIMEOUT = 300
# Seconds that process 0 waits before it exits with an error, so that the others
# can report theirs.
_GRACE = 3
# Matches errors of JAX that are caused by the loss of another process.
_PROCESS_LOSS = re.compile(
  r"gloo|nccl|collective|coordination|barrier|heartbeat|UNAVAILABLE"
  r"|DEADLINE_EXCEEDED|Connection (reset|closed|refused)|Socket closed",
  re.IGNORECASE,
)


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Join the other processes of the run; call this before any computation.

  Under Slurm, Open MPI, Kubernetes or on a TPU pod no argument is needed.

  Args:
    coordinator: HOST:PORT of process 0, with a free port.
    num_processes: number of processes.
    process_id: index of this process, from 0.

  Raises:
    errors.InputError: an argument is missing or wrong.
    errors.LostProcessError: the others did not join in time.
  """
  if coordinator and not re.fullmatch(r"\S+:\d+", coordinator):
    raise errors.InputError(
      f"--coordinator={coordinator} must be HOST:PORT, such as node0:1234"
    )
  is_explicit = None not in (coordinator, num_processes, process_id)
  # Python's handlers do not run while JAX waits for the others.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  # Ctrl-C must not save and exit: the others would wait for this process.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      # With explicit arguments JAX must not ask a scheduler.
      cluster_detection_method="deactivate" if is_explicit else None,
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
  ctypes.CDLL(None).signal(signal.SIGABRT, _exit_on_abort)


def are_several() -> bool:
  """Return whether the run consists of several processes."""
  return jax.distributed.is_initialized()


def is_first() -> bool:
  """Return whether this is process 0, which writes and prints."""
  return jax.process_index() == 0


def is_raised_by_all(error: BaseException) -> bool:
  """Return whether every process raises an error at the same iteration."""
  return not are_several() or getattr(error, "meets_all_processes", False)


def is_process_loss(error: BaseException) -> bool:
  """Return whether an error was caused by the loss of another process."""
  return are_several() and bool(_PROCESS_LOSS.search(str(error)))


def from_first(number: int) -> int:
  """Return the number that process 0 passes; all must call this.

  Processes can see different files, because file systems may lag behind.
  """
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def is_true_for_all(condition: bool) -> bool:
  """Return whether a condition is true in every process; all must call this."""
  return bool(np.all(multihost_utils.process_allgather(np.bool_(condition))))


def wait_for_all(where: str) -> None:
  """Wait until every process calls this with the same `where`."""
  if are_several():
    multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
  """Context manager for a whole command: exit all processes together.

  A process that fails alone exits at once, without JAX's shutdown, which would
  wait for the others. Its exit ends the others too, so that they do not hang in
  a collective.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if is_raised_by_all(error):
      wait_for_all("the end")
      raise
    if is_first():
      time.sleep(_GRACE)  # The exit of process 0 ends the others.
    if isinstance(error, errors.Stop):
      _exit(str(error), error.exit_code)
    traceback.print_exc()
    if is_process_loss(error):
      _exit(_LOST, errors.LostProcessError.exit_code)
    if isinstance(error, KeyboardInterrupt):
      _exit("interrupted", 130)
    _exit("this process failed; see the traceback above", 1)
  else:
    wait_for_all("the end")


_LOST = (
  "another process of the run ended or no longer answers, or JAX itself failed"
  " (see its messages above and the output of the other processes); start all"
  " processes again, on any machines and in any number: they resume from the"
  " last checkpoint"
)


def _exit(message: str, exit_code: int) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(exit_code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _exit_on_abort(_):
  """Handle the abort() that JAX calls when a process is lost.

  This is a C handler: JAX aborts in a thread in which Python's do not run.
  """
  _exit(_LOST, errors.LostProcessError.exit_code)


def _in_one_line(error: Exception) -> str:
  return " ".join(str(error).split())
