"""Every named schedule passes the check, and whatever breaks one is refused with the grid and an arrow.

A schedule is broken on purpose in every way of `mutations.py`, each drawn at random over schedules and sizes.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trellax.meshes import ScheduleError
from trellax.schedules import SCHEDULES, Action, Kind, Schedule, build_schedule

from .mutations import MUTATIONS, Grid, Mutation, move_to_another_chunk
from .sizes import HALVES, V_SHAPED, WHOLE, named_schedules

Golden = Callable[[str, str], None]

KINDS_OF: dict[bool, tuple[Kind, ...]] = {True: ("F", "I", "W"), False: ("B", "F")}
"""In alphabetical order, by whether the backwards are in halves."""


@settings(derandomize=True, deadline=None, max_examples=200)
@given(named_schedules())
def test_every_named_schedule_runs_each_action_exactly_once(schedule: Schedule) -> None:
    actions = sorted(action for _, _, action in schedule.placed())
    assert actions == [
        Action(stage=stage, kind=kind, microbatch=microbatch)
        for stage in range(schedule.num_ranks * schedule.num_chunks)
        for kind in KINDS_OF[schedule.name in HALVES]
        for microbatch in range(schedule.num_microbatches)
    ]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(named_schedules())
def test_every_named_schedule_meets_its_dependencies(schedule: Schedule) -> None:
    """Stated once more, and otherwise than in the check: what comes before on the own rank, and on a neighbour."""
    place = {action: place for place, (_, _, action) in enumerate(schedule.placed())}
    tick = {action: tick for tick, _, action in schedule.placed()}
    before_on_own_rank: dict[Kind, Kind] = {"B": "F", "I": "F", "W": "I"}
    step_to_source = {"F": -1, "B": 1, "I": 1}
    for action, own_place in place.items():
        if action.kind in before_on_own_rank:
            assert place[replace(action, kind=before_on_own_rank[action.kind])] < own_place
        stage = action.stage + step_to_source.get(action.kind, 0)
        if action.kind in step_to_source and stage >= 0:
            source = replace(action, stage=stage)
            # On one rank the order within a cell counts, between ranks a result travels at the end of a tick.
            when = place if schedule.num_ranks == 1 else tick
            assert source not in place or when[source] < when[action]


@settings(derandomize=True, deadline=None)
@given(named_schedules())
def test_stage_runs_on_the_rank_that_its_number_names(schedule: Schedule) -> None:
    last = 2 * schedule.num_ranks - 1

    def home(stage: int) -> int:
        return min(stage, last - stage) if schedule.name in V_SHAPED else stage % schedule.num_ranks

    ranks = {(home(action.stage), rank) for _, rank, action in schedule.placed()}
    assert ranks == {(rank, rank) for rank in range(schedule.num_ranks)}


@pytest.mark.parametrize(("mutate", "kind"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_broken_schedule_is_refused(mutate: Mutation, kind: Kind) -> None:
    names = {"F": (*WHOLE, *HALVES), "B": WHOLE, "I": HALVES, "W": HALVES}[kind]
    if mutate is move_to_another_chunk:
        names = tuple(name for name in names if SCHEDULES[name].chunks != "one")

    @settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
    @given(good=named_schedules(names, max_ranks=5, max_chunks=3, max_microbatches=8), data=st.data())
    def is_refused(good: Schedule, data: st.DataObject) -> None:
        places = [
            (tick, rank, position)
            for tick, row in enumerate(good.ticks)
            for rank, cell in enumerate(row)
            for position, action in enumerate(cell)
            if action.kind == kind
        ]
        tick, rank, position = data.draw(st.sampled_from(places))
        cells = [[list(cell) for cell in row] for row in good.ticks]
        with pytest.raises(ScheduleError):
            break_at(Grid(like=good, cells=cells, tick=tick, rank=rank, position=position))

    def break_at(grid: Grid) -> None:
        # A number below 0 is refused by the action itself, the rest by the schedule.
        mutate(grid)
        replace(grid.like, ticks=tuple(tuple(tuple(cell) for cell in row) for row in grid.cells))

    is_refused()


def test_there_are_forty_kinds_of_mutation_and_more() -> None:
    assert len(set(MUTATIONS)) >= 40


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
    "weight_gradient_before_input_gradient": ("0F0 0W0 0I0", 1),
    "weight_gradient_missing": ("0F0 . 0I0 0W0; . 1F0+1I0 . .", 1),
    "input_gradient_before_next_stage": ("0F0 0I0 . 0W0; . 1F0 1I0 1W0", 1),
    "input_gradient_with_next_stage": ("0F0 . 0I0 0W0; . 1F0 1I0 1W0", 1),
    "whole_backward_among_halves": ("0F0+0I0+0W0 0F1+0B1", 2),
    "half_among_whole_backwards": ("0F0+0B0 0F1+0B1+0W1", 2),
    "weight_gradient_on_another_rank": ("0F0 . 0I0 1W0; . 1F0 1I0 0W0", 1),
    "late_in_a_long_grid": ("0F0 0F1 0F2 0F3 0F4 0B0 0B1 0B2 0B3 0B5 0B4 0F5", 6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_shows_rule_and_cell(name: str, golden: Golden) -> None:
    text, num_microbatches = REFUSED[name]
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text, name="mine", num_microbatches=num_microbatches)
    golden(f"errors/pipeline/schedule_{name}.txt", str(caught.value))


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(0, 4), (2, 0), (-1, 4)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_counts_below_one_are_refused(name: str, num_ranks: int, num_microbatches: int) -> None:
    with pytest.raises(ScheduleError, match="is below 1"):
        SCHEDULES[name](num_ranks=num_ranks, num_microbatches=num_microbatches)


def test_no_microbatches_are_refused_with_the_numbers(golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        build_schedule("1f1b", num_ranks=2, num_microbatches=0)
    golden("errors/pipeline/schedule_no_microbatches.txt", str(caught.value))


def test_tick_without_a_cell_for_every_rank_is_refused(golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule(name="mine", num_ranks=2, num_microbatches=1, ticks=(((),),))
    golden("errors/pipeline/schedule_cells_for_ranks.txt", str(caught.value))
