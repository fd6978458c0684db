"""Every named schedule passes the check, and whatever breaks one is refused with the grid and an arrow.

A schedule is broken on purpose in fifteen ways, each drawn at random over schedules and sizes.
"""

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trellax.meshes import ScheduleError
from trellax.pipeline import SCHEDULES, Action, Schedule, build_schedule

Golden = Callable[[str, str], None]
Cells = list[list[list[Action]]]
"""A grid that can be changed: [tick][rank][position]."""


@settings(derandomize=True, deadline=None, max_examples=300)
@given(name=st.sampled_from(list(SCHEDULES)), num_ranks=st.integers(1, 8), num_microbatches=st.integers(1, 32))
def test_every_named_schedule_runs_each_action_exactly_once(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    actions = sorted(action for _, _, action in schedule.placed())
    assert actions == [
        Action(stage=stage, kind=kind, microbatch=microbatch)
        for stage in range(num_ranks)
        for kind in ("B", "F")
        for microbatch in range(num_microbatches)
    ]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(name=st.sampled_from(list(SCHEDULES)), num_ranks=st.integers(1, 8), num_microbatches=st.integers(1, 32))
def test_every_named_schedule_meets_its_dependencies(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    place = {action: place for place, (_, _, action) in enumerate(schedule.placed())}
    tick = {action: tick for tick, _, action in schedule.placed()}
    for action, own_place in place.items():
        if action.kind == "B":
            assert place[_other(action, kind="F")] < own_place
        earlier = _other(action, stage=action.stage + (1 if action.kind == "B" else -1))
        if earlier in tick:
            assert tick[earlier] < tick[action]


def _other(action: Action, *, stage: int | None = None, kind: str | None = None) -> Action:
    kind = kind or action.kind
    return Action(
        stage=action.stage if stage is None else stage,
        kind="F" if kind == "F" else "B",
        microbatch=action.microbatch,
    )


def drop(cells: Cells, tick: int, rank: int, position: int) -> None:
    del cells[tick][rank][position]


def duplicate_later(cells: Cells, tick: int, rank: int, position: int) -> None:
    cells.append([[] for _ in cells[0]])
    cells[-1][rank].append(cells[tick][rank][position])


def duplicate_in_place(cells: Cells, tick: int, rank: int, position: int) -> None:
    cells[tick][rank].insert(position, cells[tick][rank][position])


def move_to_next_stage(cells: Cells, tick: int, rank: int, position: int) -> None:
    action = cells[tick][rank][position]
    cells[tick][rank][position] = _other(action, stage=action.stage + 1)


def move_to_next_rank(cells: Cells, tick: int, rank: int, position: int) -> None:
    assume(len(cells[tick]) > 1)
    cells[tick][(rank + 1) % len(cells[tick])].append(cells[tick][rank].pop(position))


def rename_to_another_kind(cells: Cells, tick: int, rank: int, position: int) -> None:
    action = cells[tick][rank][position]
    cells[tick][rank][position] = _other(action, kind="B" if action.kind == "F" else "F")


def rename_to_next_microbatch(cells: Cells, tick: int, rank: int, position: int) -> None:
    action = cells[tick][rank][position]
    cells[tick][rank][position] = Action(stage=action.stage, kind=action.kind, microbatch=action.microbatch + 1)


def swap_forward_and_backward(cells: Cells, tick: int, rank: int, position: int) -> None:
    action = cells[tick][rank][position]
    other = _other(action, kind="B" if action.kind == "F" else "F")
    for cell in (cell for row in cells for cell in row):
        cell[:] = [{action: other, other: action}.get(here, here) for here in cell]


def run_forward_with_its_source(cells: Cells, tick: int, rank: int, position: int) -> None:
    """A result travels at the end of a tick: what it came from cannot run in that same tick."""
    action = cells[tick][rank].pop(position)
    assume(action.kind == "F" and action.stage > 0)
    source = _other(action, stage=action.stage - 1)
    next(row for row in cells if source in row[rank - 1])[rank].insert(0, action)


def run_backward_with_its_source(cells: Cells, tick: int, rank: int, position: int) -> None:
    action = cells[tick][rank].pop(position)
    assume(action.kind == "B" and rank < len(cells[0]) - 1)
    source = _other(action, stage=action.stage + 1)
    next(row for row in cells if source in row[rank + 1])[rank].append(action)


def run_first_of_all(cells: Cells, tick: int, rank: int, position: int) -> None:
    action = cells[tick][rank].pop(position)
    assume(action.kind == "B" or action.stage > 0)
    cells.insert(0, [[] for _ in cells[0]])
    cells[0][rank].append(action)


def join_two_of_a_kind(cells: Cells, tick: int, rank: int, position: int) -> None:
    action = cells[tick][rank][position]
    later = [row[rank] for row in cells[tick + 1 :] for other in row[rank] if other.kind == action.kind]
    assume(bool(later))
    moved = next(other for other in later[0] if other.kind == action.kind)
    later[0].remove(moved)
    cells[tick][rank].append(moved)


def add_a_negative_stage(cells: Cells, tick: int, rank: int, position: int) -> None:
    cells[tick][-1].append(Action(stage=-1, kind="F", microbatch=0))


def add_a_negative_microbatch(cells: Cells, tick: int, rank: int, position: int) -> None:
    cells.append([[] for _ in cells[0]])
    cells[-1][rank].append(Action(stage=rank, kind="F", microbatch=-1))


def lose_a_rank(cells: Cells, tick: int, rank: int, position: int) -> None:
    del cells[tick][rank]


MUTATIONS: tuple[Callable[[Cells, int, int, int], None], ...] = (
    drop,
    duplicate_later,
    duplicate_in_place,
    move_to_next_stage,
    move_to_next_rank,
    rename_to_another_kind,
    rename_to_next_microbatch,
    swap_forward_and_backward,
    run_forward_with_its_source,
    run_backward_with_its_source,
    run_first_of_all,
    join_two_of_a_kind,
    add_a_negative_stage,
    add_a_negative_microbatch,
    lose_a_rank,
)


def rebuilt(cells: Cells, like: Schedule) -> Schedule:
    return Schedule(
        name="broken",
        num_ranks=like.num_ranks,
        num_microbatches=like.num_microbatches,
        ticks=tuple(tuple(tuple(cell) for cell in row) for row in cells),
    )


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_broken_schedule_is_refused(mutate: Callable[[Cells, int, int, int], None]) -> None:
    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(
        name=st.sampled_from(list(SCHEDULES)),
        num_ranks=st.integers(1, 5),
        num_microbatches=st.integers(1, 8),
        data=st.data(),
    )
    def is_refused(name: str, num_ranks: int, num_microbatches: int, data: st.DataObject) -> None:
        good = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
        places = [
            (tick, rank, position)
            for tick, row in enumerate(good.ticks)
            for rank, cell in enumerate(row)
            for position in range(len(cell))
        ]
        cells = [[list(cell) for cell in row] for row in good.ticks]
        mutate(cells, *data.draw(st.sampled_from(places)))
        with pytest.raises(ScheduleError):
            rebuilt(cells, good)

    is_refused()


REFUSED: dict[str, tuple[str, int]] = {
    "backward_before_forward": ("0B0 0F0", 1),
    "backward_before_next_stage": ("0F0 0B0 . ; . 1F0 1B0", 1),
    "forward_with_previous_stage": ("0F0 . 0B0; 1F0 1B0 .", 1),
    "forward_missing": (". . 0B0; . 1F0+1B0 .", 1),
    "backward_missing": ("0F0 . . ; . 1F0+1B0 .", 1),
    "second_time": ("0F0 0F0 . 0B0; . 1F0 1B0 .", 1),
    "wrong_rank": ("1F0 . 0B0; . 0F0 1B0", 1),
    "unknown_stage": ("0F0 . 0B0; . 3F0 1B0", 1),
    "unknown_microbatch": ("0F0 0F1 . 0B0; . 1F0 1B0 .", 1),
    "two_forwards_in_a_cell": ("0F0+0F1 0B0 0B1", 2),
    "late_in_a_long_grid": ("0F0 0F1 0F2 0F3 0F4 0B0 0B1 0B2 0B3 0B5 0B4 0F5", 6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_shows_rule_and_cell(name: str, golden: Golden) -> None:
    text, num_microbatches = REFUSED[name]
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text, name="mine", num_microbatches=num_microbatches)
    golden(f"errors/schedule_{name}.txt", str(caught.value))


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(0, 4), (2, 0), (-1, 4)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_counts_below_one_are_refused(name: str, num_ranks: int, num_microbatches: int) -> None:
    with pytest.raises(ScheduleError, match="must each be 1 or more"):
        build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


def test_no_microbatches_are_refused_with_the_numbers(golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        build_schedule("1f1b", num_ranks=2, num_microbatches=0)
    golden("errors/schedule_no_microbatches.txt", str(caught.value))


def test_tick_without_a_cell_for_every_rank_is_refused(golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule(name="mine", num_ranks=2, num_microbatches=1, ticks=(((),),))
    golden("errors/schedule_cells_for_ranks.txt", str(caught.value))
