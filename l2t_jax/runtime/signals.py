"""Requests to stop: SIGTERM, which schedulers send first, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from jax.experimental import multihost_utils

from l2t_jax import errors
from l2t_jax.runtime import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
  """Context manager that records SIGTERM or Ctrl-C instead of exiting.

  A second Ctrl-C does what it did before. Nested instances share the request.
  Ctrl-C stays ignored where a shell's `&` has it ignored. With several
  processes JAX listens in place of this class, so that all processes stop at
  the same iteration.

  An instance for a whole command (`for_command`) raises `errors.Interrupted` as
  soon as it is asked, unless a nested instance takes the time to save. From
  then on signals are ignored: the command is leaving.
  """

  def __init__(self, *, for_command: bool = False):
    self._for_command = for_command
    self._outermost = self  # The instance that holds the request.
    self._num_saving = 0  # Instances that want to save before they leave.
    self._asked: signal.Signals | None = None  # By which signal.
    self._usual: dict[signal.Signals, Any] = {}  # Handlers before.

  def __enter__(self) -> StopRequests:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and not distributed.are_several():
      around = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
      if isinstance(around, StopRequests):
        self._outermost = around
      else:
        self._listen()
    self._outermost._num_saving += not self._for_command
    return self

  def __exit__(self, _, error: BaseException | None, traceback) -> None:
    outermost = self._outermost
    outermost._num_saving -= not self._for_command
    if outermost._for_command:
      is_leaving = outermost._asked and not outermost._num_saving
      if is_leaving or self._for_command:
        _ignore_signals()
    elif outermost is self:
      for number, usual in self._usual.items():
        signal.signal(number, usual)
      # A request that came too late to be obeyed is passed on.
      usual = self._usual.get(self._asked) if self._asked else None
      is_told = error and usual is signal.default_int_handler
      if callable(usual) and not is_told:
        usual(self._asked, None)

  def were_made(self) -> bool:
    """Return whether this process, and no other, received a request."""
    return self._outermost._asked is not None

  def after(self, step: int) -> bool:
    """Return whether to leave after an iteration; to be called after each."""
    if (
      distributed.are_several()
      and multihost_utils.reached_preemption_sync_point(step)
    ):
      self._outermost._asked = signal.SIGTERM
    return self.were_made()

  def _listen(self) -> None:
    for number in _SIGNALS:
      usual = signal.getsignal(number) or signal.SIG_DFL
      if number == signal.SIGTERM or usual is not signal.SIG_IGN:
        self._usual[number] = usual
        signal.signal(number, self._ask)

  def _ask(self, number: int, _) -> None:
    self._asked = signal.Signals(number)
    if not self._num_saving:
      self._leave()
    if number == signal.SIGINT:
      # Not print: the signal may have interrupted another print.
      os.write(2, b"stopping after this iteration; Ctrl-C again: at once\n")
      again = self._leave if self._for_command else self._usual[signal.SIGINT]
      signal.signal(number, again)

  def _leave(self, *_) -> None:
    _ignore_signals()
    raise errors.Interrupted("asked to stop; the same command goes on")


def _ignore_signals() -> None:
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_IGN)
