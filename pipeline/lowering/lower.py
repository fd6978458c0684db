"""Lower a schedule to tables: assign a turn to every action and a buffer slot to every value.

Worked example: a dense layer y = tanh(x @ w) on each of 2 ranks, 1F1B with 2 microbatches, whose tables are printed in
`tables.py`. Rank 0 makes y of microbatch 0 in turn 0 and sends it at the end of that turn; rank 1 reads it in turn 1.
So y takes one slot on each rank, each for an interval of time. Time is counted in thirds of a turn:

    turn           |------ 0 ------|------ 1 ------|
    third          0     1     2     3     4     5          3t      an action reads its inputs
    rank 0         F0   [y]    |                            3t + 1  it writes its output
    exchange                   +---+                        3t + 2  the exchange delivers
    rank 1                        [y    F0]                 3t - 1  `first`, run by all ranks together, delivers

The residuals of microbatch 0 take a slot of rank 0 from its forward in turn 0 to its backward in turn 3. The
next forward in turn 1 overlaps that interval and takes another slot: rank 0 needs two, and rank 1, whose backwards
follow their forwards at once, needs one. Every rank allocates the largest number.

Giving intervals the lowest free slot in order of their start uses as few slots as possible (interval
partitioning: Kleinberg and Tardos 2005, section 4.1).
Read `executor/execute.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, get_args

import jax
import numpy as np

from ...meshes import ScheduleError
from ...meshes.arguments import check_choice, check_instance
from ...schedules import Action, Kind, Schedule
from ...schedules.chunk_weights import count_slots, find_stays
from ...schedules.grid import Cell
from .offload import Wait, choose_copies
from .steady import find_steady, longest_run
from .tables import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    NONE,
    WEIGHT_GRAD,
    Column,
    Ends,
    Gathers,
    Offload,
    Tables,
    Transfer,
    Turns,
    empty_turns,
)

_CODES: dict[Kind, int] = {"F": FORWARD, "B": BACKWARD, "I": INPUT_GRAD, "W": WEIGHT_GRAD}


def lower(
    schedule: Schedule,
    *,
    kinds: Sequence[Kind] = ("F", "B", "I", "W"),
    ends: Ends = "alone",
    overlap: bool = False,
    offload: Offload = "none",
    gathers: Gathers = "none",
) -> Tables:
    """Return the tables of a schedule: columns [turns, ranks] and [turns], and the slots of each buffer.

    >>> lower(build_schedule("1f1b", num_ranks=2, num_microbatches=2)).num_turns
    6

    Args:
        kinds: all four kinds, or ("F",) to lower the forwards alone, without idle turns between them.
        ends: "alone" if the first and last stage run `first` and `last` themselves, "together" if all ranks do.
        overlap: whether to look for a steady state (`Steady`), in whose ticks forwards come first.
        offload: "residuals" if those that wait long are copied to the memory of the host (`offload.py`).
        gathers: "chunks" if weights are gathered for runs of actions of a chunk (`schedules/chunk_weights.py`).

    Raises:
        ScheduleError: `schedule` is not a `Schedule`, or another argument is not one of the choices.
    """
    _check(schedule, kinds=tuple(kinds), ends=ends, offload=offload, gathers=gathers)
    placed = _place_turns(schedule, kinds, overlap=overlap)
    lowering = _Lowering(schedule, placed, offload=offload, gathers=gathers)
    if gathers == "chunks":
        lowering.route_weights()
    lowering.route_activations(ends)
    if len(kinds) > 1:
        lowering.route_residuals(offload)
        lowering.route_gradients(ends)
    turns = lowering.turns
    for transfer in (*turns.forward.values(), *turns.backward.values()):
        # The same on all ranks: a permute that some ranks skip would hang the others.
        transfer.is_active[:] = (transfer.send != NONE).any(axis=1)
    steady = find_steady(turns, lowering.paired, ends)
    return Tables(turns=turns, placement=schedule.placement, steady=steady, **_count_all(turns))


def _check(schedule: Schedule, **given: Any) -> None:
    check_instance("schedule", schedule, Schedule, error=ScheduleError, fix="make it with build_schedule(...).")
    choices = {"kinds": (("F",), get_args(Kind)), "ends": get_args(Ends), "offload": get_args(Offload)}
    for name, own in (choices | {"gathers": get_args(Gathers)}).items():
        check_choice(name, given[name], own, error=ScheduleError)


def _count_all(turns: Turns) -> dict[str, int]:
    """Return the number of slots of each buffer."""
    host = turns.host
    return {
        "num_activation_slots": _count_slots(*jax.tree.leaves(turns.activations), *_receives(turns.forward)),
        "num_gradient_slots": _count_slots(*jax.tree.leaves(turns.gradients), *_receives(turns.backward)),
        "num_residual_slots": _count_slots(turns.compute.residuals, *([host.receive] if host else [])),
        "num_host_slots": _count_slots(host.store) if host else 0,
        "num_weight_slots": _count_slots(turns.weights.read) if turns.weights else 0,
    }


@dataclass(frozen=True, kw_only=True)
class _TurnOf:
    """Time of every action.

    action: turn in which it runs.
    exchange: last turn of its tick, at the end of which its result is sent.
    paired: turns of the ticks in which all ranks run a forward, then a backward, for overlap.
    """

    action: dict[Action, int]
    exchange: dict[Action, int]
    paired: range
    num_turns: int


def _place_turns(schedule: Schedule, kinds: Sequence[Kind], *, overlap: bool) -> _TurnOf:
    """Give every action a turn: a tick takes as many turns as the rank with the most actions in it."""
    turn_of: dict[Action, int] = {}
    exchange_of: dict[Action, int] = {}
    turn, paired = 0, range(0)
    pairs = longest_run([_is_pair(cells) for cells in schedule.ticks]) if overlap else range(0)
    for tick, cells in enumerate(schedule.ticks):
        kept = [[action for action in cell if action.kind in kinds] for cell in cells]
        if tick in pairs:
            # A backward needs at most the forward of its own tick, so forwards may always come first.
            kept = [sorted(cell, key=lambda action: action.kind == "B") for cell in kept]
            paired = range(paired.start or turn, turn + 2)
        num_turns = max(map(len, kept))
        for cell in kept:
            for position, action in enumerate(cell):
                turn_of[action] = turn + position
                exchange_of[action] = turn + num_turns - 1
        turn += num_turns
    return _TurnOf(action=turn_of, exchange=exchange_of, paired=paired, num_turns=turn)


def _is_pair(cells: Sequence[Cell]) -> bool:
    """Return whether every rank runs a forward and a whole backward in a tick."""
    return all(sorted(action.kind for action in cell) == ["B", "F"] for cell in cells)


@dataclass(frozen=True, kw_only=True)
class _Interval:
    """A value that needs a slot from third `start` to third `end` of a turn on one rank, both included.

    entries: places (column, turn) in the tables that name the slot, filled once it is chosen.
    """

    start: int
    end: int
    rank: int
    entries: tuple[tuple[Column, int], ...]


class _Lowering:
    """The columns of one schedule, filled value by value; see the module's picture for thirds of a turn."""

    def __init__(self, schedule: Schedule, placed: _TurnOf, *, offload: Offload, gathers: Gathers) -> None:
        self.schedule, self.turn_of, self.exchange_of = schedule, placed.action, placed.exchange
        self.paired = placed.paired
        self.has_halves = any(action.kind == "I" for action in self.turn_of)
        size: dict[str, Any] = {"num_turns": placed.num_turns, "placement": schedule.placement}
        self.turns: Turns = empty_turns(**size, offload=offload, gathers=gathers)
        compute = self.turns.compute
        for action, turn in self.turn_of.items():
            rank = self.rank(action)
            compute.kind[turn, rank] = _CODES[action.kind]
            compute.microbatch[turn, rank] = action.microbatch
            compute.stage[turn, rank] = action.stage
            compute.chunk[turn, rank] = schedule.placement.chunk_of(action.stage)

    def rank(self, action: Action) -> int:
        """Return the rank that runs an action."""
        return self.schedule.placement.rank_of(action.stage)

    def route_activations(self, ends: Ends) -> None:
        """Route each stage's output to the next stage, and with ends together `first` in and `last` out."""
        turns, last_stage = self.turns, self.schedule.num_stages - 1
        slots = turns.activations
        uses = self._route_hops(kind="F", step=1, read=slots.read, write=slots.write, transfers=turns.forward)
        if ends == "together":
            uses += self._route_first()
            uses += self._route_out(kind="F", stage=last_stage, write=slots.write, slot=slots.last, to=turns.ends.last)
        self._assign(uses)

    def route_gradients(self, ends: Ends) -> None:
        """Route each stage's input gradient to the stage before, and the loss's to the last stage's backward."""
        turns, kind = self.turns, self._backward_kind()
        slots = turns.gradients
        uses = self._route_hops(kind=kind, step=-1, read=slots.read, write=slots.write, transfers=turns.backward)
        if ends == "together":
            uses += self._route_out(
                kind=kind, stage=0, write=slots.write, slot=slots.first_back, to=turns.ends.first_back
            )
        last_stage = self.schedule.num_stages - 1
        for microbatch in range(self.schedule.num_microbatches):
            # The loss and dy are computed in the turn of the forward; dy waits for the backward of that stage.
            made = self.turn_of[Action(stage=last_stage, kind="F", microbatch=microbatch)]
            backward = Action(stage=last_stage, kind=kind, microbatch=microbatch)
            used = self.turn_of[backward]
            entries = ((slots.loss, made), (slots.read, used))
            uses.append(_Interval(start=3 * made + 1, end=3 * used, rank=self.rank(backward), entries=entries))
        self._assign(uses)

    def route_residuals(self, offload: Offload) -> None:
        """Keep each forward's residuals until its backward, or the later of its halves, has read them."""
        readers: list[Kind] = ["I", "W"] if self.has_halves else ["B"]
        waits = []
        for forward, made in self.turn_of.items():
            if forward.kind == "F":
                stage, microbatch = forward.stage, forward.microbatch
                used = [self.turn_of[Action(stage=stage, kind=k, microbatch=microbatch)] for k in readers]
                waits.append(Wait(rank=self.rank(forward), made=made, used=tuple(used)))
        copies = choose_copies(waits, paired=self.paired) if offload == "residuals" else {}
        column, host = self.turns.compute.residuals, self.turns.host
        on_device, on_host = [], []
        for wait in waits:
            # Layers write residuals all through the forward and read them all through the backward, so the slot is
            # taken from the first third of the one to the output of the other.
            start, end, entries = 3 * wait.made, 3 * max(wait.used) + 1, tuple((column, turn) for turn in wait.used)
            made = (column, wait.made)
            if host is None or wait not in copies:
                on_device.append(_Interval(start=start, end=end, rank=wait.rank, entries=(made, *entries)))
                continue
            out, back = copies[wait]
            uses = (made, (host.send, out)), ((host.receive, back), *entries), ((host.store, out), (host.load, back))
            # Both copies end after the action of their turn; that to the device leaves the host before it.
            on_device.append(_Interval(start=start, end=3 * out + 2, rank=wait.rank, entries=uses[0]))
            on_device.append(_Interval(start=3 * back + 2, end=end, rank=wait.rank, entries=uses[1]))
            on_host.append(_Interval(start=3 * out + 2, end=3 * back, rank=wait.rank, entries=uses[2]))
        self._assign(on_device)
        self._assign(on_host)

    def route_weights(self) -> None:
        """Keep whole weights of a chunk from the first to the last action that reads them: `chunk_weights.py`."""
        columns, chunk_of = self.turns.weights, self.schedule.placement.chunk_of
        assert columns is not None
        uses: list[list[tuple[int, Kind, int]]] = [[] for _ in range(self.schedule.num_ranks)]
        for action, turn in sorted(self.turn_of.items(), key=itemgetter(1)):
            uses[self.rank(action)].append((turn, action.kind, chunk_of(action.stage)))
        # Every rank allocates as many slots as the rank that needs the most.
        num_slots = max(map(count_slots, uses))
        intervals = []
        for rank, own in enumerate(uses):
            for turns in find_stays(own, num_slots=num_slots):
                entries = ((columns.gather, turns[0]), *((columns.read, turn) for turn in turns))
                intervals.append(_Interval(start=3 * turns[0], end=3 * turns[-1] + 1, rank=rank, entries=entries))
        self._assign(intervals)

    def _backward_kind(self) -> Kind:
        """Kind of the action that makes the gradient of a stage's input."""
        return "I" if self.has_halves else "B"

    def _route_hops(
        self, *, kind: Kind, step: Literal[1, -1], read: Column, write: Column, transfers: dict[int, Transfer]
    ) -> list[_Interval]:
        """Give every value that passes from stage to stage two slots: until it is sent, and until it is read.

        Between two stages of one rank a single slot serves for both.
        """
        uses = []
        # Transfers to both sides follow each other: what the second sends must outlast what the first delivers.
        sends_end = 1 if len(transfers) < 2 else 2
        for action, made in self.turn_of.items():
            next_stage = action.stage + step
            if action.kind != kind or not 0 <= next_stage < self.schedule.num_stages:
                continue
            user = Action(stage=next_stage, kind=kind, microbatch=action.microbatch)
            sent, used = self.exchange_of[action], self.turn_of[user]
            offset = self.schedule.placement.offset(action.stage, step)
            if not offset:
                stay = ((write, made), (read, used))
                uses.append(_Interval(start=3 * made + 1, end=3 * used, rank=self.rank(action), entries=stay))
                continue
            transfer = transfers[offset]
            leave = ((write, made), (transfer.send, sent))
            end = 3 * sent + sends_end
            uses.append(_Interval(start=3 * made + 1, end=end, rank=self.rank(action), entries=leave))
            wait = ((transfer.receive, sent), (read, used))
            uses.append(_Interval(start=3 * sent + 2, end=3 * used, rank=self.rank(user), entries=wait))
        return uses

    def _route_first(self) -> list[_Interval]:
        """Give the output of `first`, made by all ranks just before the first stage's forward, a slot on its rank."""
        slots = self.turns.activations
        uses = []
        for microbatch in range(self.schedule.num_microbatches):
            action = Action(stage=0, kind="F", microbatch=microbatch)
            turn = self.turn_of[action]
            # In pairs x is made a turn early, beside the backward of the pair before.
            made = turn - (turn in self.paired and turn - 1 in self.paired)
            self.turns.ends.first[made] = microbatch
            entries = ((slots.first, made), (slots.read, turn))
            uses.append(_Interval(start=3 * made - 1, end=3 * turn, rank=self.rank(action), entries=entries))
        return uses

    def _route_out(self, *, kind: Kind, stage: int, write: Column, slot: Column, to: Column) -> list[_Interval]:
        """Give the result of an end stage, which all ranks take just after its action, a slot on its rank."""
        uses = []
        for microbatch in range(self.schedule.num_microbatches):
            action = Action(stage=stage, kind=kind, microbatch=microbatch)
            turn = self.turn_of[action]
            # In pairs dx is taken a turn late, beside the forward of the pair after.
            taken = turn + (kind == "B" and turn in self.paired and turn + 1 in self.paired)
            to[taken] = microbatch
            entries = ((write, turn), (slot, taken))
            uses.append(_Interval(start=3 * turn + 1, end=3 * taken + 1, rank=self.rank(action), entries=entries))
        return uses

    def _assign(self, uses: list[_Interval]) -> None:
        """Set the entries of every interval to the lowest slot that is free on its rank."""
        # ends_of[rank][slot] is the end of the last interval in that slot.
        ends_of: list[list[int]] = [[] for _ in range(self.schedule.num_ranks)]
        for use in sorted(uses, key=lambda use: (use.start, use.end, use.rank)):
            ends = ends_of[use.rank]
            slot = next((slot for slot, end in enumerate(ends) if end < use.start), len(ends))
            if slot == len(ends):
                ends.append(use.end)
            ends[slot] = use.end
            for column, turn in use.entries:
                column[turn, use.rank] = slot


def _receives(transfers: dict[int, Transfer]) -> list[Column]:
    return [transfer.receive for transfer in transfers.values()]


def _count_slots(*columns: np.ndarray) -> int:
    """Return one more than the largest slot, and at least one."""
    return 1 + max(0, *(int(column.max()) for column in columns))
