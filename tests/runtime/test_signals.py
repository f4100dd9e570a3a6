"""SIGTERM and Ctrl-C, to a run and to a command."""

import signal

import pytest

from l2t_jax import errors
from l2t_jax.runtime import signals
from tests.support import small_runs


def test_a_stop_request_is_seen_and_forgotten():
  usual = signal.getsignal(signal.SIGTERM)
  # Otherwise the request would be passed on to this process's handler.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  with signals.StopRequests() as requests:
    assert not requests.should_stop_after(1)
    signal.raise_signal(signal.SIGTERM)
    assert requests.should_stop_after(2)
  assert signal.signal(signal.SIGTERM, usual) == signal.SIG_IGN
  assert signal.getsignal(signal.SIGTERM) == usual


def test_control_c_for_the_second_time_is_what_it_was():
  with pytest.raises(errors.Interrupted), signals.StopRequests() as requests:
    signal.raise_signal(signal.SIGINT)
    assert requests.received()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    raise errors.Interrupted("asked to stop")  # This error is reported.


def test_control_c_asks_all_and_then_is_what_it_was(capfd):
  with (
    pytest.raises(errors.Interrupted),
    signals.StopRequests() as outer,
    signals.StopRequests(),
  ):
    signal.raise_signal(signal.SIGINT)
    assert outer.received()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    raise errors.Interrupted("asked to stop")
  assert capfd.readouterr().err.count("Ctrl-C again: at once") == 1


def test_control_c_that_is_ignored_stays_so():
  """As in the background of a shell."""
  usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with signals.StopRequests() as requests:
      signal.raise_signal(signal.SIGINT)
      assert not requests.received()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, usual)


def test_a_stop_request_that_comes_too_late_is_for_the_next_around():
  usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)
  with signals.StopRequests() as outer:
    with signals.StopRequests():
      signal.raise_signal(signal.SIGTERM)
    assert outer.received()
  signal.signal(signal.SIGTERM, usual)


def test_a_stop_request_that_comes_too_late_ends_a_script():
  result = small_runs.run_python(
    "-c",
    "import signal; from l2t_jax.runtime import signals\n"
    "with signals.StopRequests(): signal.raise_signal(signal.SIGTERM)\n"
    "print('goes on')",
  )
  assert (result.returncode, result.stdout) == (-signal.SIGTERM, "")


@pytest.fixture
def usual_handlers():
  """Restore the handlers at the end: a command leaves signals ignored."""
  numbers = (signal.SIGTERM, signal.SIGINT)
  usual = {number: signal.getsignal(number) for number in numbers}
  yield
  for number, handler in usual.items():
    signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_leaves_at_once(number, usual_handlers):
  with (
    pytest.raises(errors.Interrupted, match="asked to stop"),
    signals.StopRequests(for_command=True),
  ):
    try:
      signal.raise_signal(number)
    finally:
      signal.raise_signal(signal.SIGTERM)  # Ignored: it is exiting.
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_command_waits_for_what_saves(usual_handlers, capfd):
  with signals.StopRequests(for_command=True):
    with signals.StopRequests() as outer, signals.StopRequests() as requests:
      signal.raise_signal(signal.SIGTERM)
      assert requests.should_stop_after(1) and outer.received()
      signal.raise_signal(signal.SIGINT)
      with pytest.raises(errors.Interrupted, match="asked to stop"):
        signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGTERM)  # Ignored: it is exiting.
    signal.raise_signal(signal.SIGTERM)
  assert capfd.readouterr().err.count("Ctrl-C again: at once") == 1


def test_a_command_is_leaving_when_it_has_saved(usual_handlers):
  with signals.StopRequests(for_command=True):
    with signals.StopRequests():
      signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
