"""The tables of a schedule, interpreted in plain Python: every action reads exactly what it needs.

The interpreter obeys the columns alone, as the executor does, but its buffers hold names instead of arrays: ("y", s, k)
is the output of stage s for microbatch k, ("dy", s, k) the gradient of that output. It begins with empty buffers, so
whatever is read before it was written, after it was overwritten, or from the wrong neighbour is seen. A
forward's residuals are ("saved", s, k), and ("halved", s, k) once the input gradient left what the weight's needs.
Ends that run together make ("y", -1, k) and take the last stage's output and ("dy", -1, k).
"""

from itertools import count, product
from typing import Any, Literal

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.pipeline import lower
from trellax.pipeline.executor.tables import (
    BACKWARD,
    FORWARD,
    IDLE,
    INPUT_GRAD,
    NONE,
    WEIGHT_GRAD,
    Tables,
    Transfer,
    Turns,
)
from trellax.schedules import Action, Kind, Placement, Schedule, build_schedule, simulate
from trellax.schedules.check import needs
from trellax.schedules.placement import Link

from ...schedules.sizes import named_schedules

KINDS: tuple[tuple[Kind, ...], ...] = (("F", "B"), ("F", "I", "W"))
"""With whole backwards, and with halves."""

Name = tuple[str, int, int]
"""What a slot holds: kind, stage and microbatch."""

every_schedule = settings(derandomize=True, deadline=None, max_examples=40)


@st.composite
def placements(draw: st.DrawFn, *, max_ranks: int = 4, max_chunks: int = 3) -> Placement:
    """Loops, Vs and what lies between: each chunk goes over all ranks, up or down."""
    ranks = range(draw(st.integers(2, max_ranks)))
    goes_down = draw(st.lists(st.booleans(), min_size=1, max_size=max_chunks))
    return Placement(tuple(rank for down in goes_down for rank in (reversed(ranks) if down else ranks)))


@st.composite
def random_schedules(draw: st.DrawFn) -> Schedule:
    """Any order that can run, with up to three chunks: in every tick each rank does some of what it could."""
    placement, num_microbatches = draw(placements()), draw(st.integers(1, 5))
    num_ranks, num_stages = placement.num_ranks, len(placement.ranks)
    rng = draw(st.randoms(use_true_random=False))
    kinds = draw(st.sampled_from(KINDS))
    every = product(range(num_stages), kinds, range(num_microbatches))
    todo = {Action(stage=stage, kind=kind, microbatch=microbatch) for stage, kind, microbatch in every}
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for tick in count():
        before = frozenset(todo)
        for rank, kind in ((rank, kind) for rank in range(num_ranks) for kind in rng.sample(kinds, len(kinds))):
            own = [action for action in sorted(todo) if placement.ranks[action.stage] == rank and action.kind == kind]
            ready = [action for action in own if _is_ready(action, num_stages, before=before, todo=todo)]
            if ready and rng.random() < 0.8:
                todo.remove(action := rng.choice(ready))
                ticks_of[rank].setdefault(tick, []).append(action)
        if not todo:
            break
    sizes = {"num_microbatches": num_microbatches, "num_chunks": placement.num_chunks}
    return Schedule.from_ticks(ticks_of, name="random", placement=placement, **sizes)


def _is_ready(action: Action, num_stages: int, *, before: frozenset[Action], todo: set[Action]) -> bool:
    """Return whether all that an action needs has run: on its own stage by this tick, elsewhere before it."""
    needed = needs(action, num_stages=num_stages, has_halves=action.kind in ("I", "W"))
    return all(other not in (todo if other.stage == action.stage else before) for other in needed)


ANY_SCHEDULE = st.one_of(named_schedules(min_ranks=2, max_microbatches=16), random_schedules())


class Interpreter:
    """Runs tables on names, and records which names each action read."""

    def __init__(self, tables: Tables, schedule: Schedule) -> None:
        self.tables, self.schedule = tables, schedule
        ranks = range(schedule.num_ranks)
        self.activations: list[list[Any]] = [[None] * tables.num_activation_slots for _ in ranks]
        self.gradients: list[list[Any]] = [[None] * tables.num_gradient_slots for _ in ranks]
        self.saved: list[list[Any]] = [[None] * tables.num_residual_slots for _ in ranks]
        self.read: dict[Action, tuple[Any, ...]] = {}
        self.order: list[Action] = []
        self.taken: list[Any] = []

    def run(self) -> "Interpreter":
        for number in range(self.tables.num_turns):
            turn = jax.tree.map(lambda column, number=number: column[number], self.tables.turns)
            self._enter(turn)
            for rank in range(self.schedule.num_ranks):
                self._act(turn.at_rank(rank), rank)
            self._leave(turn)
            for transfers, buffers, step in ((turn.forward, self.activations, 1), (turn.backward, self.gradients, -1)):
                assert set(transfers) == set(self._links(step))
                for offset, transfer in transfers.items():
                    self._exchange(transfer, buffers, links=self._links(step)[offset])
        return self

    def _act(self, turn: Turns, rank: int) -> None:
        kind, residuals = turn.compute.kind, turn.compute.residuals
        if kind == IDLE:
            return
        stage, microbatch = int(turn.compute.stage), int(turn.compute.microbatch)
        assert self.schedule.placement.stages_of(rank)[turn.compute.chunk] == stage
        if kind == FORWARD:
            action, slot = Action(stage=stage, kind="F", microbatch=microbatch), turn.activations.read
            self.read[action] = (None if slot == NONE else self.activations[rank][slot],)
            _put(self.saved[rank], residuals, ("saved", stage, microbatch))
            _put(self.activations[rank], turn.activations.write, ("y", stage, microbatch))
            if turn.ends.last == NONE:
                _put(self.gradients[rank], turn.gradients.loss, ("dy", stage, microbatch))
        elif kind == WEIGHT_GRAD:
            action = Action(stage=stage, kind="W", microbatch=microbatch)
            self.read[action] = (self.saved[rank][residuals],)
        else:
            is_half = kind == INPUT_GRAD
            assert is_half or kind == BACKWARD
            action = Action(stage=stage, kind="I" if is_half else "B", microbatch=microbatch)
            self.read[action] = (self.gradients[rank][turn.gradients.read], self.saved[rank][residuals])
            _put(self.gradients[rank], turn.gradients.write, ("dy", stage - 1, microbatch))
            if is_half:
                self.saved[rank][residuals] = ("halved", stage, microbatch)
        self.order.append(action)

    def _enter(self, turn: Turns) -> None:
        for buffer, slot in zip(self.activations, turn.activations.first, strict=True):
            _put(buffer, slot, ("y", -1, int(turn.ends.first)))

    def _leave(self, turn: Turns) -> None:
        steps = (
            ("last", turn.ends.last, self.activations, turn.activations.last),
            ("first_back", turn.ends.first_back, self.gradients, turn.gradients.first_back),
        )
        for name, microbatch, buffers, slots in steps:
            assert (slots != NONE).sum() == (microbatch != NONE)
            found = [buffer[slot] for buffer, slot in zip(buffers, slots, strict=True) if slot != NONE]
            self.taken += [(name, int(microbatch), *value) for value in found]
        if turn.ends.last != NONE:
            loss_grad = ("dy", self.schedule.num_stages - 1, int(turn.ends.last))
            rank = self.schedule.placement.ranks[-1]
            _put(self.gradients[rank], turn.gradients.loss[rank], loss_grad)

    def _links(self, step: Literal[1, -1]) -> dict[int, list[Link]]:
        return self.schedule.placement.links(step)

    def _exchange(self, transfer: Transfer, buffers: list[list[Any]], *, links: list[Link]) -> None:
        """Move names to the neighbour. None arrives where nobody sends, as the permute delivers zeros or NaN."""
        if not transfer.is_active:
            return
        sent = [None if slot == NONE else buffer[slot] for slot, buffer in zip(transfer.send, buffers, strict=True)]
        source_of = {receiver: sender for sender, receiver in links}
        for rank, buffer in enumerate(buffers):
            _put(buffer, transfer.receive[rank], sent[source_of[rank]] if rank in source_of else None)


def _put(buffer: list[Any], slot: int, value: Any) -> None:
    if slot != NONE:
        buffer[slot] = value


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
