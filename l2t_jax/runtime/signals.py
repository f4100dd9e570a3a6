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
_USUAL_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)


class StopRequests:
  """Context manager that records SIGTERM or Ctrl-C instead of exiting.

  A second Ctrl-C is handled as if there were no context manager. Nested
  instances share the request. If Ctrl-C is ignored, as under a shell's `&`, it
  stays ignored. With several processes JAX listens to SIGTERM instead, so that
  all processes stop at the same iteration.

  With `for_command` the context manager wraps a whole command. It then raises
  `errors.Interrupted` at once, unless a nested instance wants to save first;
  further signals are ignored, because the command is exiting.
  """

  def __init__(self, *, for_command: bool = False):
    self._for_command = for_command
    self._outermost = self  # The instance that holds the request.
    self._num_saving = 0  # Active instances that save before the exit.
    self._received: signal.Signals | None = None
    self._previous: dict[signal.Signals, Any] = {}  # Signal -> its old handler.

  def __enter__(self) -> StopRequests:
    # Python allows only the main thread to set handlers.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and not distributed.are_several():
      around = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
      if isinstance(around, StopRequests):
        self._outermost = around
      else:
        self._install_handlers()
    self._outermost._num_saving += not self._for_command
    return self

  def __exit__(self, _, error: BaseException | None, traceback) -> None:
    outermost = self._outermost
    outermost._num_saving -= not self._for_command
    if outermost._for_command:
      is_exiting = outermost._received and not outermost._num_saving
      # A further signal must not interrupt a command that is exiting.
      if is_exiting or self._for_command:
        _ignore_signals()
    elif outermost is self:
      for number, handler in self._previous.items():
        signal.signal(number, handler)
      # A request that came after the last check has its usual effect. If there
      # is an error, it already ends what would be interrupted.
      if self._received in self._previous:
        handler = self._previous[self._received]
        if not error or handler not in _USUAL_HANDLERS:
          signal.raise_signal(self._received)

  def received(self) -> bool:
    """Return whether this process received a request."""
    return self._outermost._received is not None

  def should_stop_after(self, step: int) -> bool:
    """Return whether to stop after an iteration; call this after each one."""
    if (
      distributed.are_several()
      and multihost_utils.reached_preemption_sync_point(step)
    ):
      self._outermost._received = signal.SIGTERM
    return self.received()

  def _install_handlers(self) -> None:
    for number in _SIGNALS:
      # None is a handler that was not installed from Python.
      handler = signal.getsignal(number) or signal.SIG_DFL
      if number == signal.SIGTERM or handler is not signal.SIG_IGN:
        self._previous[number] = handler
        signal.signal(number, self._handle)

  def _handle(self, number: int, _) -> None:
    self._received = signal.Signals(number)
    if not self._num_saving:
      self._exit()
    if number == signal.SIGINT:
      # Not print, which the signal may have interrupted.
      os.write(2, b"stopping after this iteration; Ctrl-C again: at once\n")
      previous = self._previous[signal.SIGINT]
      signal.signal(number, self._exit if self._for_command else previous)

  def _exit(self, *_) -> None:
    _ignore_signals()
    raise errors.Interrupted("asked to stop; the same command resumes")


def _ignore_signals() -> None:
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_IGN)
