"""Prefetched results are those of the steps asked for, and an error is raised at its own step."""

import threading

import pytest
from trellax.train.data.prefetch import Prefetch


def test_steps_come_in_any_order() -> None:
    with Prefetch(lambda step: step**2, end=10) as squares:
        assert [squares[step] for step in (0, 1, 5, 6, 2)] == [0, 1, 25, 36, 4]


def test_next_step_is_computed_ahead_until_the_last() -> None:
    made, is_made = [], threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 4:
            is_made.set()
        return step

    with Prefetch(make, end=5) as ahead:
        assert ahead[3] == 3
        assert is_made.wait(10)
        assert ahead[4] == 4
    assert made == [3, 4]


def test_error_is_raised_at_its_step_and_not_before() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("step 1 is lost")
        return step

    with Prefetch(make, end=5) as ahead:
        assert ahead[0] == 0
        with pytest.raises(ValueError, match="step 1 is lost"):
            ahead[1]
