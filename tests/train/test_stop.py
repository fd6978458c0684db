"""A signal stops a run before its next step; only a second Ctrl-C ends the process at once."""

import os
import signal
from collections.abc import Iterator

import pytest
from trellax.train import stop as module
from trellax.train.stop import StopRequest


class EndedError(Exception):
    pass


@pytest.fixture(autouse=True)
def stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(module.os, "_exit", leave)


def test_run_stops_before_the_next_step() -> None:
    with StopRequest() as stop:
        assert not stop.is_due(3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == ""
        assert stop.is_due(4)
    assert stop.signal_name == "SIGTERM"


def test_lost_terminal_stops_a_run_unless_sighup_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_due(1)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.is_due(1)
        assert stop.signal_name == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_a_second_interrupt_ends_at_once() -> None:
    with StopRequest() as stop:
        # Who passes Ctrl-C on, as mpirun does, sends SIGTERM beside the terminal's SIGINT.
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_due(4)
        with pytest.raises(EndedError):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def heard_hangups() -> Iterator[None]:
    """Under nohup, which ignores SIGHUP, these tests too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard_hangups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_to_one_process_after_the_last_step_changes_nothing(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_on: list[int] = []
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(module.multihost_utils, "reached_preemption_sync_point", lambda _: False)
    with StopRequest() as stop:
        assert not stop.is_due(9)
        monkeypatch.setattr(module.os, "kill", lambda _, number: passed_on.append(number))
        signal.raise_signal(number)
    # What follows, a validation say, takes all processes: they must not differ on whether it is to be.
    assert (stop.signal_name, passed_on) == ("", [signal.SIGTERM])


def test_closed_stderr_does_not_stop_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_pipe(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(module.os, "write", break_pipe)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_due(1)


def test_run_stops_when_its_seconds_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with StopRequest(seconds=7) as stop:
        assert not stop.is_due(1)
        clock[0] += 7
        assert stop.is_due(2)
    assert stop.signal_name == "train.seconds"


def test_processes_agree_on_the_step_at_which_their_seconds_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(module.os, "kill", lambda _, number: asked.append(number))
    monkeypatch.setattr(module.multihost_utils, "reached_preemption_sync_point", lambda step: step == 5)
    monkeypatch.setattr(module.time, "monotonic", iter(range(0, 900, 10)).__next__)
    with StopRequest(seconds=5) as stop:
        assert [stop.is_due(step) for step in (3, 4, 5)] == [False, False, True]
    assert (stop.signal_name, asked) == ("train.seconds", [signal.SIGTERM])
