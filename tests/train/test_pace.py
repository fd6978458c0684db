"""The parts of a step's time add up to it."""

import time

import pytest
from trellax.train.pace import Pace


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
