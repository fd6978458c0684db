"""Schedules whose stages take different times, by both clocks, against sums done by hand."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.meshes import ScheduleError
from trellax.schedules import (
    Clock,
    Schedule,
    StageCost,
    build_schedule,
    draw_picture,
    explain_difference,
    find_formula,
    simulate,
    trace_from_schedule,
)
from trellax.schedules.stage_cost import is_even

from .sizes import named_schedules

COST = st.sampled_from((0.5, 1.0, 2.0, 3.0))
TRANSFER = st.sampled_from((0.0, 0.25))
CLOCK = st.sampled_from(("lockstep", "async"))

every_size = settings(derandomize=True, deadline=None)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def layers(*counts: float) -> tuple[StageCost, ...]:
    return tuple(StageCost(forward=n, input_grad=n, weight_grad=n) for n in counts)


@every_size
@given(schedule=named_schedules(), clock=CLOCK, times=st.tuples(COST, COST, COST), transfer=TRANSFER)
def test_equal_stages_are_the_times_of_a_rank_over_its_chunks(
    schedule: Schedule, clock: Clock, times: tuple[float, float, float], transfer: float
) -> None:
    (f, i, w), v = times, schedule.num_chunks
    stages = [StageCost(forward=f / v, input_grad=i / v, weight_grad=w / v)] * schedule.num_stages
    plain = simulate(schedule, clock=clock, forward=f, input_grad=i, weight_grad=w, transfer=transfer)
    assert simulate(schedule, clock=clock, stages=stages, transfer=transfer) == plain


@every_size
@given(schedule=named_schedules(), clock=CLOCK, data=st.data())
def test_rank_is_busy_for_its_own_stages(schedule: Schedule, clock: Clock, data: st.DataObject) -> None:
    times = data.draw(st.lists(st.tuples(COST, COST, COST), min_size=schedule.num_stages, max_size=schedule.num_stages))
    stages = [StageCost(forward=f, input_grad=i, weight_grad=w) for f, i, w in times]
    p, m = schedule.num_ranks, schedule.num_microbatches
    timing = simulate(schedule, clock=clock, stages=stages)
    own = [schedule.placement.stages_of(rank) for rank in range(p)]
    assert timing.busy == tuple(near(m * sum(stages[stage].total for stage in mine)) for mine in own)
    assert timing.makespan >= max(timing.busy) - 1e-9
    assert timing.bubble_fraction == near(1 - sum(timing.busy) / (p * timing.makespan))


def test_lockstep_tick_waits_for_the_largest_stage_at_work() -> None:
    schedule = build_schedule("1f1b", num_ranks=3, num_microbatches=2)
    timing = simulate(schedule, stages=layers(3, 3, 2))
    # Ticks: 0F0; 0F1 1F0; 1F1 2F0+2B0; 1B0 2F1+2B1; 0B0 1B1; 0B1.
    assert timing.makespan == near(3 + 3 + 6 + 6 + 6 + 6)
    assert timing.busy == (near(18), near(18), near(12))
    assert timing.bubble_fraction == near(1 - 48 / 90)


def test_separate_programs_wait_for_large_stages_only_where_they_must() -> None:
    schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=2, clock="async")
    timing = simulate(schedule, clock="async", stages=layers(2, 1))
    # Rank 0: 0F0 to 2, 0F1 to 4, then waits for 1B0 until 5, 0B0 to 9, 0B1 to 13.
    assert timing.makespan == near(13)
    assert timing.busy == (near(12), near(6))
    assert timing.bubble_fraction == near(1 - 18 / 26)


def test_chunk_takes_the_time_of_its_stage() -> None:
    text = "0F0 . 2F0 . . 2B0 . 0B0; . 1F0 . 3F0 3B0 . 1B0 ."
    schedule = Schedule.parse(text, name="looped", num_microbatches=1, num_chunks=2)
    for clock in ("lockstep", "async"):
        timing = simulate(schedule, clock=clock, stages=layers(1, 2, 3, 5))
        assert timing.busy == (near(3 * (1 + 3)), near(3 * (2 + 5)))
        assert timing.makespan == near(3 * (1 + 2 + 3 + 5))


def test_one_large_stage_sets_the_pace_of_all() -> None:
    schedule = build_schedule("1f1b", num_ranks=4, num_microbatches=32)
    even, uneven = (simulate(schedule, stages=layers(*counts)) for counts in ((8, 8, 8, 8), (7, 7, 7, 11)))
    assert even.bubble_fraction == near(3 / 35)
    # The last rank is at work in 32 ticks; before and after are 3 of forwards and 3 of backwards, of 7 layers each.
    assert uneven.makespan == near(3 * (32 * 11 + 3 * 7))
    assert uneven.bubble_fraction == near(1 - 32 * 32 / (4 * (32 * 11 + 3 * 7)))


@every_size
@given(p=st.integers(1, 6), m=st.integers(1, 16), loss=COST)
def test_shared_loss_is_work_of_every_rank_once_a_microbatch(p: int, m: int, loss: float) -> None:
    schedule = build_schedule("gpipe", num_ranks=p, num_microbatches=m)
    without, timing = simulate(schedule), simulate(schedule, shared_loss=loss)
    assert timing.makespan == near(without.makespan + m * loss)
    assert timing.busy == tuple(near(busy + m * loss) for busy in without.busy)


def test_ranks_wait_for_each_other_before_a_shared_loss() -> None:
    schedule = Schedule.parse("0F0 0F1 0B0 0B1; . 1F0+1B0 1F1+1B1 .", name="mine", num_microbatches=2)
    timing = simulate(schedule, shared_loss=0.5)
    # In the third tick rank 1 ends its forward after 1 and waits until 2, when rank 0 ends its backward.
    assert timing.makespan == near(1 + (1 + 0.5 + 2) + (2 + 0.5 + 2) + 2)
    assert timing.busy == (near(2 * 3.5),) * 2


@pytest.mark.parametrize("clock", ["lockstep", "async"])
def test_pictures_and_traces_show_stages_as_long_as_they_are(clock: Clock) -> None:
    schedule = build_schedule("gpipe", num_ranks=2, num_microbatches=1)
    stages = layers(2, 1)
    assert "bubble 50.0%" in draw_picture(schedule, format="svg", clock=clock, stages=stages).decode()
    assert '"dur": 4000' in trace_from_schedule(schedule, clock=clock, stages=stages)


def test_formula_speaks_of_equal_stages_only() -> None:
    schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=4)
    formula = find_formula(schedule)
    assert formula
    uneven, even = layers(2, 1), layers(0.1 + 0.2, 0.3)
    reason = "the formula is for stages of equal time"
    assert explain_difference(schedule, formula, simulate(schedule, stages=uneven), stages=uneven) == reason
    assert explain_difference(schedule, formula, simulate(schedule, stages=even), stages=even) is None


def test_stages_that_differ_by_rounding_are_even() -> None:
    assert is_even(layers(0.1 + 0.2, 0.3))
    assert not is_even(layers(0.3, 0.31))
    assert not is_even([*layers(1), StageCost(forward=1, input_grad=1, weight_grad=2)])


@pytest.mark.parametrize("time", [-1.0, math.nan, math.inf])
def test_time_that_is_negative_or_not_finite_is_refused(time: float) -> None:
    with pytest.raises(ScheduleError, match=r"input_grad=.* is not a finite number"):
        StageCost(forward=1, input_grad=time, weight_grad=1)


def test_times_of_another_number_of_stages_are_refused(golden: Callable[[str, str], None]) -> None:
    schedule = build_schedule("interleaved-1f1b", num_ranks=2, num_microbatches=2, num_chunks=2)
    with pytest.raises(ScheduleError) as caught:
        simulate(schedule, stages=layers(1, 2))
    golden("errors/pipeline/simulate_other_stages.txt", f"ScheduleError: {caught.value}")


def test_shared_loss_of_separate_programs_is_refused(golden: Callable[[str, str], None]) -> None:
    schedule = build_schedule("gpipe", num_ranks=2, num_microbatches=2)
    with pytest.raises(ScheduleError) as caught:
        simulate(schedule, clock="async", shared_loss=0.5)
    golden("errors/pipeline/simulate_shared_loss_async.txt", f"ScheduleError: {caught.value}")
