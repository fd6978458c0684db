"""The parts of a step's time add up to it."""

import time
from types import SimpleNamespace

import pytest
from trellax.train import pace as pace_module
from trellax.train.pace import Pace
from trellax.train.run import _FEWEST_TIMED


def test_parts_are_what_was_waited_and_add_up() -> None:
    pace = Pace(window=2)
    for _ in range(2):
        with pace.waiting("input"):
            time.sleep(0.01)
        with pace.waiting("device"):
            time.sleep(0.03)
        pace.tick()
    parts = pace.parts_s
    assert sum(parts.values()) == pytest.approx(pace.step_time_s)
    assert parts["input_s"] >= 0.01
    assert parts["device_s"] >= 0.03
    assert parts["host_s"] >= 0


def test_pauses_belong_to_no_step() -> None:
    pace = Pace(window=5)
    pace.tick()
    with pace.waiting("device"):
        time.sleep(0.05)
    pace.restart()
    pace.tick()
    assert pace.mean_step_time_s < 0.04
    assert pace.parts_s["device_s"] == 0.0


@pytest.mark.parametrize("late_s", [0.0, 0.5, 0.98])
def test_last_step_is_not_logged_as_faster_than_the_devices_are(late_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every end is seen late, since the next step keeps the host's cores busy, but for the last, which has no next.
    clock = iter([0.0, *(step + late_s for step in range(1, 20)), 20.0])
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    pace = Pace(window=_FEWEST_TIMED)
    for _ in range(20):
        pace.tick()
    assert 0.9 <= pace.step_time_s <= 1.0
