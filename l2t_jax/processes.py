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
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from l2t_jax import types

# What asks a command to leave: schedulers, and Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
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
    types.InputError: something is missing or wrong.
    types.LostProcessError: the others did not come.
  """
  if coordinator and not re.fullmatch(r"\S+:\d+", coordinator):
    raise types.InputError(
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
    raise types.InputError(
      f"cannot start in several processes: {_in_one_line(error)}; give"
      " --coordinator=HOST:PORT, --num_processes and --process_id"
    ) from error
  except RuntimeError as error:
    raise types.LostProcessError(
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
    if isinstance(error, types.Stop):
      _leave(str(error), error.exit_code)
    traceback.print_exc()
    if is_of_another(error):
      _leave(_LOST, types.LostProcessError.exit_code)
    if isinstance(error, KeyboardInterrupt):
      _leave("interrupted", 130)
    _leave("this process failed, as told above", 1)
  else:
    wait_for_all("the end")


@contextlib.contextmanager
def leaving_when_asked() -> Iterator[None]:
  """Let a signal end a command as `types.Interrupted`, whenever it comes.

  Wraps all of a command; within it a `StopRequests` may ask for time to save.
  Asked once, a command is leaving, and hears no more.
  """
  for number in _heard():
    signal.signal(number, _leave_when_asked)
  try:
    yield
  finally:
    _hear_no_more()


def _heard() -> list[signal.Signals]:
  """Return what is heard: not Ctrl-C where a shell's `&` has it ignored."""
  is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  return [signal.SIGTERM] if is_ignored else [*_SIGNALS]


def _hear_no_more() -> None:
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_IGN)


def _leave_when_asked(*_) -> None:
  _hear_no_more()
  raise types.Interrupted("asked to stop; the same command goes on")


class StopRequests:
  """Whether a signal asked the run to leave: SIGTERM, to any of its processes.

  A context manager. Schedulers send it before they take a machine away. In a
  single process Ctrl-C asks as well; once more, it is what it usually is. What
  asks one of these asks those around it, too.
  """

  def __init__(self):
    self._asked: signal.Signals | None = None  # By which signal.
    self._usual: dict[signal.Signals, Any] = {}
    self._around: StopRequests | None = None

  def __enter__(self) -> StopRequests:
    # In several processes JAX listens, so that all stop at the same iteration.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and not are_several():
      for number in _heard():
        usual = signal.getsignal(number) or signal.SIG_DFL
        self._usual[number] = usual
        around = getattr(usual, "__self__", None)
        if isinstance(around, StopRequests):
          self._around = around
        signal.signal(number, self._ask)
    return self

  def __exit__(self, _, error: BaseException | None, traceback) -> None:
    for number, usual in self._usual.items():
      is_leaving = self._asked and usual is _leave_when_asked
      signal.signal(number, signal.SIG_IGN if is_leaving else usual)
    # What came too late is for whoever else listens.
    usual = self._usual.get(self._asked) if self._asked else None
    is_told = (
      self._around is not None
      or usual is _leave_when_asked
      or (error and usual is signal.default_int_handler)
    )
    if callable(usual) and not is_told:
      usual(self._asked, None)

  def _ask(self, number: int, _) -> None:
    self._asked = signal.Signals(number)
    outermost = self
    while outermost._around:
      outermost = outermost._around
      outermost._asked = self._asked
    if number == signal.SIGINT:
      # Not by print, which a signal may meet in the midst of its work.
      os.write(2, b"stopping after this iteration; Ctrl-C again: at once\n")
      signal.signal(number, outermost._usual[signal.SIGINT])

  def were_made(self) -> bool:
    """Return whether the signal came, to this process alone."""
    return self._asked is not None

  def after(self, step: int) -> bool:
    """Return whether to leave after an iteration; to be called after each."""
    if are_several() and multihost_utils.reached_preemption_sync_point(step):
      self._asked = signal.SIGTERM
    return self.were_made()


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
  _leave(_LOST, types.LostProcessError.exit_code)


def _in_one_line(error: Exception) -> str:
  return " ".join(str(error).split())
