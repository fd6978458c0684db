"""Bubbles and peaks that follow from the grid equal the formulas of the papers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.pipeline import SCHEDULES, Schedule, build_schedule, simulate

RANKS = st.integers(1, 8)
MICROBATCHES = st.integers(1, 32)
COST = st.sampled_from((0.5, 1.0, 2.0, 3.0))

every_size = settings(derandomize=True, deadline=None)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-12, abs=1e-12)


@every_size
@given(name=st.sampled_from(("gpipe", "1f1b")), p=RANKS, m=MICROBATCHES, backward=COST)
def test_gpipe_and_1f1b_have_the_textbook_bubble(name: str, p: int, m: int, backward: float) -> None:
    schedule = build_schedule(name, num_ranks=p, num_microbatches=m)
    assert simulate(schedule, backward=backward).bubble_fraction == near((p - 1) / (m + p - 1))


@every_size
@given(p=RANKS, m=MICROBATCHES, backward=COST)
def test_naive_leaves_all_but_one_rank_idle(p: int, m: int, backward: float) -> None:
    schedule = build_schedule("naive", num_ranks=p, num_microbatches=m)
    assert simulate(schedule, backward=backward).bubble_fraction == near((p - 1) / p)


@every_size
@given(name=st.sampled_from(list(SCHEDULES)), p=RANKS, m=MICROBATCHES, backward=COST)
def test_every_rank_is_busy_for_all_microbatches(name: str, p: int, m: int, backward: float) -> None:
    schedule = build_schedule(name, num_ranks=p, num_microbatches=m)
    assert simulate(schedule, backward=backward).busy == (near(m * (1 + backward)),) * p


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_naive_holds_one_microbatch(p: int, m: int) -> None:
    schedule = build_schedule("naive", num_ranks=p, num_microbatches=m)
    assert simulate(schedule).peak_in_flight == (1,) * p


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_gpipe_holds_every_microbatch(p: int, m: int) -> None:
    schedule = build_schedule("gpipe", num_ranks=p, num_microbatches=m)
    assert simulate(schedule).peak_in_flight == (m,) * p


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_1f1b_holds_no_more_than_the_round_trip_to_the_last_rank(p: int, m: int) -> None:
    schedule = build_schedule("1f1b", num_ranks=p, num_microbatches=m)
    expected = tuple(min(m, max(1, 2 * (p - 1 - rank))) for rank in range(p))
    assert simulate(schedule).peak_in_flight == expected


def test_tick_lasts_as_long_as_its_slowest_rank() -> None:
    schedule = Schedule.parse("0F0 . 0B0; . 1F0+1B0 .", name="mine", num_microbatches=1)
    assert simulate(schedule, forward=1.0, backward=3.0).makespan == near(1 + 4 + 3)


def test_chunk_costs_its_share_of_the_rank() -> None:
    text = "0F0 . 2F0 . . 2B0 . 0B0; . 1F0 . 3F0 3B0 . 1B0 ."
    schedule = Schedule.parse(text, name="looped", num_microbatches=1, num_chunks=2)
    assert simulate(schedule, forward=1.0, backward=2.0).busy == (near(3.0), near(3.0))
