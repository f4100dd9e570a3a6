from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import signal
import threading
from typing import Any

from jax.experimental import multihost_utils

from l2t_jax import errors
from l2t_jax.runtime import distributed

# What asks a command to leave: schedulers, and Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def leaving_when_asked() -> Iterator[None]:
  """Let a signal end a command as `errors.Interrupted`, whenever it comes.

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
  raise errors.Interrupted("asked to stop; the same command goes on")


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
    if in_main_thread and not distributed.are_several():
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
    if (
      distributed.are_several()
      and multihost_utils.reached_preemption_sync_point(step)
    ):
      self._asked = signal.SIGTERM
    return self.were_made()
