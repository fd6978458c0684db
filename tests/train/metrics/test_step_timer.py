"""The parts of a step's time add up to the time of the step."""

import time
from types import SimpleNamespace

import pytest
from trellax.train.metrics import step_timer
from trellax.train.metrics.step_timer import StepTimer
from trellax.train.run import _MIN_TIMED_STEPS


def test_parts_are_the_waiting_times_and_add_up() -> None:
    timer = StepTimer(window=2)
    for _ in range(2):
        with timer.waiting("input"):
            time.sleep(0.01)
        with timer.waiting("device"):
            time.sleep(0.03)
        timer.end_step()
    parts = timer.breakdown_s
    assert sum(parts.values()) == pytest.approx(timer.step_time_s)
    assert parts["input_s"] >= 0.01
    assert parts["device_s"] >= 0.03
    assert parts["host_s"] >= 0


def test_pauses_belong_to_no_step() -> None:
    timer = StepTimer(window=5)
    timer.end_step()
    with timer.waiting("device"):
        time.sleep(0.05)
    timer.restart()
    timer.end_step()
    assert timer.mean_step_time_s < 0.04
    assert timer.breakdown_s["device_s"] == 0.0


@pytest.mark.parametrize("late_s", [0.0, 0.5, 0.98])
def test_last_step_is_not_logged_as_faster_than_the_devices_are(late_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every end is seen late, since the next step keeps the host's cores busy, but for the last, which has no next.
    clock = iter([0.0, *(step + late_s for step in range(1, 20)), 20.0])
    monkeypatch.setattr(step_timer, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timer = StepTimer(window=_MIN_TIMED_STEPS)
    for _ in range(20):
        timer.end_step()
    assert 0.9 <= timer.step_time_s <= 1.0
