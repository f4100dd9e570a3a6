"""The processes of a run: their start, their signals, the loss of one.

In most runs there is one process, and nothing here does anything but
`leaving_when_asked` and `StopRequests`.
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
# Seconds that process 0 waits before it leaves with an error: the others may
# have met the same.
_GRACE = 3
# What JAX's errors say where another process is the reason.
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
  """Join the other processes of the run; before anything computes.

  Args:
    coordinator: HOST:PORT of process 0, a free port there. None, as for the
      other two, where Slurm, Open MPI, Kubernetes or a TPU pod tell.
    num_processes: how many there are.
    process_id: of this one, from 0.

  Raises:
    errors.InputError: something is missing or wrong.
    errors.LostProcessError: the others did not come.
  """
  if coordinator and not re.fullmatch(r"\S+:\d+", coordinator):
    raise errors.InputError(
      f"--coordinator={coordinator} must be HOST:PORT, such as node0:1234"
    )
  is_told = None not in (coordinator, num_processes, process_id)
  # While JAX waits for the others, no handler of Python's would run.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  # The others would wait for a process that leaves politely of its own.
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
  """Return whether the run was started as one of several processes."""
  return jax.distributed.is_initialized()


def is_first() -> bool:
  """Return whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def is_found_by_all(error: BaseException) -> bool:
  """Return whether an error meets every process of the run at once."""
  return not are_several() or getattr(error, "meets_all_processes", False)


def is_of_another(error: BaseException) -> bool:
  """Return whether what went wrong is that another process was lost."""
  return are_several() and bool(_OF_ANOTHER.search(str(error)))


def agree(number: int) -> int:
  """Return what process 0 says: file systems may show others less."""
  if not are_several():
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def is_true_for_all(condition: bool) -> bool:
  """Return whether a condition holds in each process; all have to ask."""
  if not are_several():
    return condition
  return bool(np.all(multihost_utils.process_allgather(np.bool_(condition))))


def wait_for_all(where: str) -> None:
  """Wait until every process has come as far; `where` tells places apart."""
  if are_several():
    multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Let no process wait for others that are lost, or leave before they did.

  Wraps all of a command. A process that fails alone ends at once, without the
  usual farewell, for which it would wait; that ends the others, too.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if is_found_by_all(error):
      wait_for_all("the end")
      raise
    if is_first():
      time.sleep(_GRACE)  # Its end ends the others: let them speak first.
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
  """What JAX's abort() becomes when it hears that a process is lost.

  It is called in a thread of JAX's own, of whose signals Python never hears.
  """
  _leave(_LOST, errors.LostProcessError.exit_code)


def _in_one_line(error: Exception) -> str:
  return " ".join(str(error).split())
