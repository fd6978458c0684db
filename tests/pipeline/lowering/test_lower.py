"""The tables of a schedule, interpreted in plain Python: every action reads exactly what it needs.

The interpreter obeys the columns alone, as the executor does, but its buffers hold names instead of arrays: ("y", s, k)
is the output of stage s for microbatch k, ("dy", s, k) the gradient of that output. It begins with empty buffers, so
whatever is read before it was written, after it was overwritten, or from the wrong neighbour is seen. A
forward's residuals are ("saved", s, k), and ("halved", s, k) once the input gradient left what the weight's needs.
Ends that run together make ("y", -1, k) and take the last stage's output and ("dy", -1, k).
"""

from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.pipeline import lower
from trellax.pipeline.lowering.tables import (
    BACKWARD,
    FORWARD,
    IDLE,
    INPUT_GRAD,
    NONE,
    WEIGHT_GRAD,
    Ends,
)
from trellax.schedules import Action, Placement, Schedule, build_schedule, simulate

from ...schedules.sizes import named_schedules
from .interpreter import Interpreter
from .random_schedules import paired_schedules, random_schedules

Name = tuple[str, int, int]
"""What a slot holds: kind, stage and microbatch."""

every_schedule = settings(derandomize=True, deadline=None, max_examples=40)


ANY_SCHEDULE = st.one_of(named_schedules(min_ranks=2, max_microbatches=16), random_schedules())


def needed(action: Action, schedule: Schedule) -> tuple[Name | None, ...]:
    """What an action must read: the previous stage's output; its own output's gradient and residuals; what I left."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return (("y", stage - 1, microbatch) if stage else None,)
    if action.kind == "W":
        return (("halved", stage, microbatch),)
    return ("dy", stage, microbatch), ("saved", stage, microbatch)


def interpreted(schedule: Schedule) -> Interpreter:
    return Interpreter(lower(schedule), schedule).run()


@every_schedule
@given(ANY_SCHEDULE)
def test_every_action_reads_exactly_what_it_needs(schedule: Schedule) -> None:
    read = interpreted(schedule).read
    assert read == {action: needed(action, schedule) for _, _, action in schedule.placed()}


@every_schedule
@given(ANY_SCHEDULE)
def test_ends_run_together_on_every_microbatch_with_what_they_need(schedule: Schedule) -> None:
    done = Interpreter(lower(schedule, ends="together"), schedule).run()
    # The first stage's forward finds what the ranks made together; all else is as it is alone.
    for _, _, action in schedule.placed():
        is_first = action.kind == "F" and action.stage == 0
        wanted = (("y", -1, action.microbatch),) if is_first else needed(action, schedule)
        assert done.read[action] == wanted
    every = range(schedule.num_microbatches)
    last = [("last", k, "y", schedule.num_stages - 1, k) for k in every]
    assert sorted(done.taken) == sorted([*last, *(("first_back", k, "dy", -1, k) for k in every)])


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.one_of(paired_schedules(), named_schedules(("1f1b", "interleaved-1f1b"), min_ranks=2, max_microbatches=24)),
    st.sampled_from(get_args(Ends)),
    st.booleans(),
)
def test_pairs_of_a_steady_state_read_what_the_turns_read(schedule: Schedule, ends: Ends, is_last_late: bool) -> None:
    tables = lower(schedule, ends=ends, overlap=True)
    turns = Interpreter(tables, schedule).run()
    plain = Interpreter(lower(schedule, ends=ends), schedule).run()
    assert turns.read == plain.read
    assert sorted(turns.taken) == sorted(plain.taken)
    if tables.steady is not None:
        pairs = Interpreter(tables, schedule).run_pairs(is_last_late=is_last_late)
        assert pairs.read == plain.read
        assert sorted(pairs.taken) == sorted(plain.taken)


@every_schedule
@given(ANY_SCHEDULE)
def test_every_action_runs_once_in_the_order_of_its_rank(schedule: Schedule) -> None:
    order = interpreted(schedule).order
    for rank in range(schedule.num_ranks):
        wanted = [action for _, own, action in schedule.placed() if own == rank]
        assert [action for action in order if schedule.placement.ranks[action.stage] == rank] == wanted


@every_schedule
@given(ANY_SCHEDULE)
def test_forward_tables_read_exactly_what_they_need(schedule: Schedule) -> None:
    read = Interpreter(lower(schedule, kinds=("F",)), schedule).run().read
    forwards = [action for _, _, action in schedule.placed() if action.kind == "F"]
    assert read == {action: needed(action, schedule) for action in forwards}


@every_schedule
@given(ANY_SCHEDULE)
def test_forward_tables_have_no_backward_and_no_idle_turn(schedule: Schedule) -> None:
    kinds = lower(schedule, kinds=("F",)).turns.compute.kind
    assert set(np.unique(kinds)) <= {IDLE, FORWARD}
    assert (kinds == FORWARD).any(axis=1).all()


@every_schedule
@given(ANY_SCHEDULE)
def test_only_the_ends_are_without_neighbours(schedule: Schedule) -> None:
    turns = lower(schedule).turns
    activations, gradients, kind = turns.activations, turns.gradients, turns.compute.kind
    is_forward, is_backward = kind == FORWARD, np.isin(kind, [BACKWARD, INPUT_GRAD])
    stage = turns.compute.stage
    is_first, is_last = stage == 0, stage == schedule.num_stages - 1
    assert np.array_equal(activations.read != NONE, is_forward & ~is_first)
    assert np.array_equal(activations.write != NONE, is_forward & ~is_last)
    assert np.array_equal(gradients.loss != NONE, is_forward & is_last)
    assert np.array_equal(gradients.write != NONE, is_backward & ~is_first)
    assert np.array_equal(gradients.read != NONE, is_backward)


@every_schedule
@given(ANY_SCHEDULE)
def test_residuals_take_as_many_slots_as_microbatches_are_in_flight(schedule: Schedule) -> None:
    assert lower(schedule).num_residual_slots == max(simulate(schedule).peak_in_flight)


@pytest.mark.parametrize("num_microbatches", [1, 2, 8, 32])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_slots_of_1f1b_do_not_grow_with_the_microbatches(num_ranks: int, num_microbatches: int) -> None:
    tables = lower(build_schedule("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches))
    slots = (tables.num_activation_slots, tables.num_gradient_slots, tables.num_residual_slots)
    assert slots == (1, 1, min(num_microbatches, 2 * (num_ranks - 1)))


@pytest.mark.parametrize("num_microbatches", [1, 2, 8, 32])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_slots_of_1f1b_with_a_split_vocabulary_are_one_more(num_ranks: int, num_microbatches: int) -> None:
    schedule = build_schedule("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches, vocab="split")
    tables = lower(schedule, ends="together")
    assert tables.num_residual_slots == min(num_microbatches, 2 * (num_ranks - 1) + 1)
    assert max(tables.num_activation_slots, tables.num_gradient_slots) <= 2


@pytest.mark.parametrize("num_microbatches", [1, 2, 8, 32])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_slots_of_zb_h1_do_not_grow_with_the_microbatches(num_ranks: int, num_microbatches: int) -> None:
    tables = lower(build_schedule("zb-h1", num_ranks=num_ranks, num_microbatches=num_microbatches))
    assert tables.num_residual_slots == min(num_microbatches, num_ranks)
    assert max(tables.num_activation_slots, tables.num_gradient_slots) <= 2


@every_schedule
@given(ANY_SCHEDULE)
def test_weight_gradients_touch_no_buffer_but_the_residuals(schedule: Schedule) -> None:
    turns = lower(schedule).turns
    is_weight_grad = turns.compute.kind == WEIGHT_GRAD
    slots = jax.tree.leaves((turns.activations, turns.gradients))
    assert [int((column[is_weight_grad] != NONE).sum()) for column in slots] == [0] * 8


@pytest.mark.parametrize("name", ["naive", "1f1b"])
def test_tick_with_two_actions_takes_two_turns(name: str) -> None:
    schedule = build_schedule(name, num_ranks=2, num_microbatches=1)
    assert schedule.num_ticks == 3
    assert lower(schedule).num_turns == 4


def test_exchange_happens_in_the_last_turn_of_a_tick() -> None:
    schedule = Schedule.parse("0F0 0F1 0B0 0B1; . 1F0+1B0 1F1+1B1 .", name="mine", num_microbatches=2)
    turns = lower(schedule).turns
    assert turns.forward[1].is_active.tolist() == [1, 0, 1, 0, 0, 0]
    assert turns.backward[-1].is_active.tolist() == [0, 0, 1, 0, 1, 0]


def test_the_turn_of_a_v_is_sent_nowhere() -> None:
    """Stages 1 and 2 are on rank 1: what the one makes the other reads from the same slot."""
    placement = Placement.of("v", num_ranks=2, num_chunks=2)
    grid = "0F0 . . 3F0 3B0 . . 0B0; . 1F0 2F0 . . 2B0 1B0 ."
    schedule = Schedule.parse(grid, name="mine", num_microbatches=1, num_chunks=2, placement=placement)
    turns = lower(schedule).turns
    assert [turns.forward[offset].is_active.tolist() for offset in (1, -1)] == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0],
    ]
    assert [turns.backward[offset].is_active.tolist() for offset in (1, -1)] == [
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
    ]
    assert turns.activations.write[1, 1] == turns.activations.read[2, 1] != NONE


def test_columns_are_int32_of_turns_by_ranks() -> None:
    turns = lower(build_schedule("gpipe", num_ranks=3, num_microbatches=4)).turns
    active = [turns.forward[1].is_active, turns.backward[-1].is_active]
    of_all_ranks = [*active, *jax.tree.leaves(turns.ends)]
    columns = jax.tree.leaves(turns)
    assert {column.dtype for column in columns} == {np.dtype(np.int32)}
    assert {column.shape for column in of_all_ranks} == {(12,)}
    assert [column.shape for column in columns].count((12, 3)) == len(columns) - len(of_all_ranks)
