"""V-shaped schedules take the ticks and hold the microbatches that their papers state, or fewer ticks.

Counts are in ticks of one action and in microbatches of a chunk, for F = I = W; a rank has six actions a microbatch.
"""

import time
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.meshes import ScheduleError
from trellax.schedules import Placement, Timing, build_schedule, find_formula, simulate

from .sizes import V_SHAPED

PAPER = ("zb-v", "v-half", "v-min")
RANKS = range(2, 17)

PEAKS: dict[str, Callable[[int], int]] = {
    "zb-v": lambda p: 2 * p,
    "v-half": lambda p: 2 * ((p + 2) // 2),
    "v-min": lambda p: 2 * ((p + 4) // 3),
    "dualpipev": lambda p: 2 * p + 1,
}
"""In flight on the fullest rank: p, (p + 2) // 2 and (p + 4) // 3 microbatches of the whole rank, and PP + 1 stages."""

IDLE: dict[str, Callable[[int], int]] = {
    "zb-v": lambda p: p - 1,
    "v-half": lambda p: max(p - 1, 3 * p - (4 if p % 2 else 7)),
    "v-min": lambda p: 4 * p - (5 if p % 3 == 1 else 7),
    "dualpipev": lambda p: p - 1,
}
"""Ticks in which a rank is idle, if there are enough microbatches."""

PUBLISHED_IDLE: dict[str, Callable[[int], int]] = {
    "v-half": lambda p: max(p - 1, 3 * p - (4 if p % 2 else 7)),
    "v-min": lambda p: 4 * p - (7 if p % 3 == 0 else 5),
}
"""The same of the schedules that the procedure in the authors' repository makes, for many microbatches."""


@cache
def build(name: str, p: int, m: int) -> tuple[int, Timing]:
    """Return the ticks that are not work, and the timing."""
    timing = simulate(build_schedule(name, num_ranks=p, num_microbatches=m, num_chunks=2))
    return round(2 * timing.makespan) - 6 * m, timing


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", V_SHAPED)
def test_ticks_and_peak_are_the_published_counts(name: str, p: int) -> None:
    least = 2 * p if name == "dualpipev" else p
    for m in (least, least + 1, 2 * p + 3):
        idle, timing = build(name, p, m)
        assert idle == IDLE[name](p)
        assert max(timing.peak_in_flight) == PEAKS[name](p)


@pytest.mark.parametrize("p", RANKS)
def test_no_rank_of_zb_v_waits_between_its_first_action_and_its_last(p: int) -> None:
    # The paper's count of its bubble, none: ramps are those of one synchronous program.
    for m in (2 * p - 1, 2 * p, 3 * p + 1):
        schedule = build_schedule("zb-v", num_ranks=p, num_microbatches=m, num_chunks=2)
        for rank in range(p):
            busy = [tick for tick, cells in enumerate(schedule.ticks) if cells[rank]]
            assert busy == list(range(rank, rank + 6 * m))


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", PUBLISHED_IDLE)
def test_ticks_are_never_more_than_those_of_the_authors(name: str, p: int) -> None:
    assert build(name, p, 2 * p + 3)[0] <= PUBLISHED_IDLE[name](p)


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", PUBLISHED_IDLE)
def test_bubble_is_below_the_rounded_one_of_the_paper(name: str, p: int) -> None:
    schedule = build_schedule(name, num_ranks=p, num_microbatches=4 * p, num_chunks=2)
    formula = find_formula(schedule)
    assert formula
    assert simulate(schedule).bubble_fraction < formula.bubble_fraction


@settings(derandomize=True, deadline=None, max_examples=100)
@given(name=st.sampled_from(V_SHAPED), p=st.integers(1, 12), m=st.integers(1, 40))
def test_any_size_has_one_action_a_tick_and_the_same_time_by_both_clocks(name: str, p: int, m: int) -> None:
    schedule = build_schedule(name, num_ranks=p, num_microbatches=m, num_chunks=2)
    assert schedule.placement == Placement.of("v", num_ranks=p, num_chunks=2)
    assert {len(cell) for row in schedule.ticks for cell in row} <= {0, 1}
    lockstep, separate = simulate(schedule), simulate(schedule, clock="async")
    assert lockstep.makespan == separate.makespan == schedule.num_ticks / 2
    assert max(lockstep.peak_in_flight) == min(2 * m, PEAKS[name](p))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(name=st.sampled_from(PAPER), p=st.integers(1, 12), m=st.integers(1, 40))
def test_one_microbatch_more_takes_six_ticks_more_once_the_pipeline_is_full(name: str, p: int, m: int) -> None:
    m += p
    assert build(name, p, m + 1)[0] == build(name, p, m)[0]


@pytest.mark.parametrize("p", [4, 8])
def test_slow_messages_cost_dualpipev_least_and_v_min_most_in_separate_programs(p: int) -> None:
    times = [
        simulate(
            build_schedule(name, num_ranks=p, num_microbatches=4 * p, num_chunks=2), clock="async", transfer=0.25
        ).makespan
        for name in ("dualpipev", *PAPER)
    ]
    assert times == sorted(times)
    assert len(set(times)) == 4


@pytest.mark.parametrize("name", V_SHAPED)
def test_turn_and_both_ends_are_on_one_rank(name: str) -> None:
    placement = build_schedule(name, num_ranks=4, num_microbatches=4, num_chunks=2).placement
    assert placement.rank_of(0) == placement.rank_of(7) == 0
    assert placement.rank_of(3) == placement.rank_of(4) == 3


@pytest.mark.parametrize("name", V_SHAPED)
def test_sixteen_ranks_and_sixty_four_microbatches_are_built_within_a_second(name: str) -> None:
    start = time.thread_time()
    build_schedule(name, num_ranks=16, num_microbatches=64, num_chunks=2)
    assert time.thread_time() - start < 1


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("name", V_SHAPED)
def test_chunks_other_than_two_are_refused(name: str, num_chunks: int) -> None:
    with pytest.raises(ScheduleError, match=f"'{name}' has two chunks a rank, not {num_chunks}"):
        build_schedule(name, num_ranks=2, num_microbatches=2, num_chunks=num_chunks)
