"""A schedule prints as a grid and is read back from one."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from trellax.meshes import ScheduleError
from trellax.schedules import SCHEDULES, Action, Schedule, build_schedule

from .sizes import named_schedules

Golden = Callable[[str, str], None]

NO_GRIDS = {
    "lines_of_different_length": "0F0 . . 0B0 \n . 1F0 1B0",
    "word_that_is_no_action": "0F0 oops 0B0",
}


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(3, 4), (4, 8)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_grid_of_a_named_schedule(name: str, num_ranks: int, num_microbatches: int, golden: Golden) -> None:
    num_chunks = SCHEDULES[name].default_chunks
    schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    golden(f"schedules/{name}_{num_ranks}x{num_microbatches}.txt", str(schedule))


def test_grid_of_1f1b_for_separate_programs(golden: Golden) -> None:
    golden("schedules/1f1b_async_4x8.txt", str(build_schedule("1f1b", num_ranks=4, num_microbatches=8, clock="async")))


@settings(derandomize=True, deadline=None)
@given(named_schedules(max_microbatches=12))
def test_schedule_survives_a_round_trip_through_text(schedule: Schedule) -> None:
    sizes = {"num_microbatches": schedule.num_microbatches, "num_chunks": schedule.num_chunks}
    assert Schedule.parse(str(schedule), name=schedule.name, placement=schedule.placement, **sizes) == schedule


def test_chunks_survive_a_round_trip_through_text() -> None:
    text = "0F0 . 2F0 . . 2B0 . 0B0; . 1F0 . 3F0 3B0 . 1B0 ."
    schedule = Schedule.parse(text, name="looped", num_microbatches=1, num_chunks=2)
    assert Schedule.parse(str(schedule), name="looped", num_microbatches=1, num_chunks=2) == schedule


def test_chunks_multiply_the_stages() -> None:
    text = "0F0 . 2F0 . . 2B0 . 0B0; . 1F0 . 3F0 3B0 . 1B0 ."
    assert Schedule.parse(text, name="looped", num_microbatches=1, num_chunks=2).num_stages == 4


def test_semicolon_ends_a_line() -> None:
    one = Schedule.parse("0F0 . 0B0; . 1F0+1B0 .", name="mine", num_microbatches=1)
    other = Schedule.parse("rank 0 | 0F0 . 0B0\nrank 1 | . 1F0+1B0 .", name="mine", num_microbatches=1)
    assert one == other


def test_actions_are_placed_in_the_order_of_execution() -> None:
    schedule = Schedule.parse("0F0 . 0B0; . 1F0+1B0 .", name="mine", num_microbatches=1)
    order = [(tick, rank, str(action)) for tick, rank, action in schedule.placed()]
    assert order == [(0, 0, "0F0"), (1, 1, "1F0"), (1, 1, "1B0"), (2, 0, "0B0")]


def test_actions_by_rank_and_tick_make_the_grid_with_its_gaps() -> None:
    forward, backward = Action(stage=0, kind="F", microbatch=0), Action(stage=0, kind="B", microbatch=0)
    schedule = Schedule.from_ticks([{0: [forward], 2: [backward]}], name="mine", num_microbatches=1)
    assert str(schedule) == "rank 0 | 0F0 . 0B0"


@pytest.mark.parametrize("name", NO_GRIDS)
def test_text_that_is_not_a_grid_is_refused(name: str, golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(NO_GRIDS[name], name="mine", num_microbatches=1)
    golden(f"errors/pipeline/grid_{name}.txt", str(caught.value))


@pytest.mark.parametrize("name", ["1f1", "g-pipe", "zbh1"])
def test_unknown_schedule_suggests_the_nearest(name: str, golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        build_schedule(name, num_ranks=2, num_microbatches=2)
    golden(f"errors/pipeline/schedule_unknown_{name}.txt", str(caught.value))


@pytest.mark.parametrize(("name", "num_chunks"), [("interleaved-1f1b", 1), ("interleaved-zb-h1", 1), ("zb-h1", 2)])
def test_chunks_that_do_not_fit_the_name_are_refused(name: str, num_chunks: int, golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        build_schedule(name, num_ranks=2, num_microbatches=2, num_chunks=num_chunks)
    golden(f"errors/pipeline/schedule_{name}_{num_chunks}_chunks.txt", str(caught.value))
