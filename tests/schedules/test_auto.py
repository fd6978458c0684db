"""`auto` is never worse than a named schedule under the same limit, and keeps the limit."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.meshes import ScheduleError
from trellax.meshes.columns import align
from trellax.schedules import SCHEDULES, Clock, Placement, Schedule, Timing, build_schedule, simulate
from trellax.schedules.families.auto import auto

COSTS = st.sampled_from([0.5, 1.0, 1.7, 3.0])


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    ranks=st.integers(1, 8),
    microbatches=st.integers(1, 24),
    chunks=st.integers(1, 3),
    limit=st.integers(1, 12),
    costs=st.tuples(COSTS, COSTS, COSTS),
    clock=st.sampled_from(get_args(Clock)),
)
def test_auto_is_the_best_of_all_that_fit(
    *, ranks: int, microbatches: int, chunks: int, limit: int, costs: tuple[float, float, float], clock: Clock
) -> None:
    times: dict[str, Any] = dict(zip(("forward", "input_grad", "weight_grad"), costs, strict=True))

    def time(schedule: Schedule) -> Timing:
        return simulate(schedule, clock=clock, **times)

    sizes = {"num_ranks": ranks, "num_microbatches": microbatches, "num_chunks": chunks}
    found = auto(**sizes, max_in_flight=limit, clock=clock, **times)
    ours = time(found)
    assert max(ours.peak_in_flight) <= limit * chunks
    for name in SCHEDULES.keys() - {"auto"}:
        if SCHEDULES[name].allows_chunks(chunks):
            theirs = time(build_schedule(name, **sizes, clock=clock))
            if max(theirs.peak_in_flight) <= limit * chunks:
                assert ours.makespan <= theirs.makespan + 1e-9


def test_auto_without_a_limit_reaches_the_floor_of_zero_bubble() -> None:
    found = auto(num_ranks=4, num_microbatches=8)
    assert simulate(found).makespan == simulate(build_schedule("zb-h1", num_ranks=4, num_microbatches=8)).makespan


def idle_ticks(schedule: Schedule) -> int:
    """Return the ticks of a chunk in which a rank of two chunks does not work."""
    return round(2 * simulate(schedule).makespan) - 6 * schedule.num_microbatches


def test_two_chunks_under_a_limit_are_placed_in_a_v_that_fills_it() -> None:
    sizes = {"num_ranks": 8, "num_microbatches": 32, "num_chunks": 2}
    found = {limit: auto(**sizes, max_in_flight=limit) for limit in (4, 5, 6, 7, 8)}
    assert {limit: idle_ticks(schedule) for limit, schedule in found.items()} == {4: 25, 5: 17, 6: 11, 7: 9, 8: 7}
    for schedule in found.values():
        assert schedule.placement == Placement.of("v", num_ranks=8, num_chunks=2)
    # No family of fixed order is as fast with six microbatches: V-Half holds five and is idle for 17 ticks.
    assert max(simulate(found[6]).peak_in_flight) == 12


def test_bubble_falls_as_the_limit_rises(golden: Callable[[str, str], None]) -> None:
    sizes = {"num_ranks": 8, "num_microbatches": 32, "num_chunks": 2}
    rows = [("max_in_flight", "bubble", "makespan")]
    for limit in (4, 5, 6, 7, 8):
        timing = simulate(auto(**sizes, max_in_flight=limit))
        rows.append((str(limit), f"{timing.bubble_fraction:.1%}", f"{timing.makespan:g}"))
    golden("schedules/auto_8x32_limits.txt", align(rows))


def test_three_chunks_are_placed_in_a_loop() -> None:
    assert auto(num_ranks=2, num_microbatches=4, num_chunks=3).placement.is_loop


def test_limit_below_one_microbatch_is_refused(golden: Callable[[str, str], None]) -> None:
    with pytest.raises(ScheduleError) as caught:
        auto(num_ranks=4, num_microbatches=4, max_in_flight=0)
    golden("errors/pipeline/schedule_auto_without_room.txt", f"ScheduleError: {caught.value}")
