"""From a schedule to tables of integers: which slot of which buffer every action reads and writes.

The executor is one loop over the rows of these tables and knows no schedule by name. A row is a turn: every rank runs
one action or none. A tick is one turn or more, and its last turn ends with the exchange between neighbours. Read
`execute.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ...meshes import ScheduleError
from ...meshes.arguments import check_choice, check_instance
from ..schedules import Action, Kind, Schedule

NONE = -1
"""Table entry for "not here"."""

Ends = Literal["alone", "together"]
"""Who runs what comes before the first layer and after the last: the first and last stage, or all ranks at once."""

IDLE, FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD = range(5)
"""Values of the column `kind`."""

_CODES: dict[Kind, int] = {"F": FORWARD, "B": BACKWARD, "I": INPUT_GRAD, "W": WEIGHT_GRAD}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A lowered schedule: int32 arrays, and how many slots each buffer needs.

    Columns [turns, ranks] of actions:
        kind: IDLE, FORWARD, BACKWARD, INPUT_GRAD or WEIGHT_GRAD.
        microbatch, chunk: what to run it on.
        source: slot of the activations (forward) or gradients (backward) to read; NONE for the first stage's forward,
            unless the ends run together.
        target: slot to leave the result in until it is taken; NONE where nobody waits for it, at either end alone.
        save: slot of the residuals, written by the forward, read by the backward or by both of its halves.
        loss_grad: slot of the gradients for that of the loss; NONE but in the last stage's forward.
        first_slot, last_slot, first_back_slot: where the ends together leave what enters the first stage and take what
            left the last, and the gradient that left the first; NONE on other ranks.
    Columns [turns, ranks] of the exchange, NONE but in the last turn of a tick:
        send, arrive: slots of the activations to send on and to receive into.
        send_grad, arrive_grad: the same of the gradients.
    Columns [turns]:
        passes_on, passes_back: 1 if any rank sends an activation, or a gradient, in this turn.
        first, last, first_back: the microbatch that all ranks run the ends of; NONE in most turns, and always NONE for
            ends alone. `first` comes before the actions of the turn, the others after them.
    """

    columns: dict[str, np.ndarray]
    num_activation_slots: int
    num_gradient_slots: int
    num_save_slots: int


def lower(schedule: Schedule, *, kinds: Sequence[Kind] = ("F", "B", "I", "W"), ends: Ends = "alone") -> Tables:
    """Return the tables of a schedule; with `kinds=("F",)` those of its forwards alone, without gaps between.

    Args:
        ends: whether the first and last stage run the ends of the model themselves, or all ranks together.

    Raises:
        ScheduleError: an argument is none of these.
    """
    check_instance("schedule", schedule, Schedule, error=ScheduleError, fix="make it with build_schedule(...).")
    check_choice("kinds", tuple(kinds), (("F",), get_args(Kind)), error=ScheduleError)
    check_choice("ends", ends, get_args(Ends), error=ScheduleError)
    lowering = _Lowering(schedule, kinds)
    lowering.route_activations(ends)
    if len(kinds) > 1:
        lowering.route_residuals()
        lowering.route_gradients(ends)
    columns = lowering.columns
    columns["passes_on"] = (columns["send"] != NONE).any(axis=1).astype(np.int32)
    columns["passes_back"] = (columns["send_grad"] != NONE).any(axis=1).astype(np.int32)
    return Tables(
        columns=columns,
        num_activation_slots=lowering.count("source", "target", "arrive", "first_slot", kinds=[FORWARD]),
        num_gradient_slots=lowering.count("source", "target", "arrive_grad", "loss_grad", kinds=[BACKWARD, INPUT_GRAD]),
        num_save_slots=lowering.count("save"),
    )


@dataclass(frozen=True, kw_only=True, order=True)
class _Use:
    """A slot is needed from `start` to `end` on one rank; then these (column, turn) entries are set to it."""

    start: int
    end: int
    rank: int
    entries: tuple[tuple[str, int], ...]


class _Lowering:
    """Time runs in thirds of a turn: an action reads at 3t, writes at 3t + 1; the exchange is at 3t + 2.

    Ends together make what enters the first stage at 3t - 1, and take what left a stage at 3t + 1.
    """

    def __init__(self, schedule: Schedule, kinds: Sequence[Kind]) -> None:
        self.schedule = schedule
        self.turn_of: dict[Action, int] = {}
        self.last_turn_of: dict[Action, int] = {}
        turn = 0
        for cells in schedule.ticks:
            kept = [[action for action in cell if action.kind in kinds] for cell in cells]
            num_turns = max(map(len, kept))
            for cell in kept:
                for position, action in enumerate(cell):
                    self.turn_of[action], self.last_turn_of[action] = turn + position, turn + num_turns - 1
            turn += num_turns
        self.has_halves = any(action.kind == "I" for action in self.turn_of)
        names = ("kind", "microbatch", "chunk", "source", "target", "save", "loss_grad")
        names += ("send", "arrive", "send_grad", "arrive_grad", "first_slot", "last_slot", "first_back_slot")
        self.columns: dict[str, np.ndarray] = {
            name: np.full((turn, schedule.num_ranks), NONE, np.int32) for name in names
        }
        self.columns |= {name: np.full(turn, NONE, np.int32) for name in ("first", "last", "first_back")}
        self.columns["kind"][:] = IDLE
        for action, turn in self.turn_of.items():
            rank = self.rank(action)
            self.columns["kind"][turn, rank] = _CODES[action.kind]
            self.columns["microbatch"][turn, rank] = action.microbatch
            self.columns["chunk"][turn, rank] = action.stage // schedule.num_ranks

    def rank(self, action: Action) -> int:
        return action.stage % self.schedule.num_ranks

    def route_activations(self, ends: Ends) -> None:
        """From each stage's forward to the next stage's; together, from and to what all ranks run."""
        uses = self._hops(kind="F", step=1, send="send", arrive="arrive")
        if ends == "together":
            uses += self._enters(column="first", stage=0)
            uses += self._leaves(kind="F", column="last", stage=self.schedule.num_stages - 1)
        self._assign(uses)

    def route_gradients(self, ends: Ends) -> None:
        """From each stage's backward to the one before, and from the loss to the last stage's own backward."""
        kind: Kind = "I" if self.has_halves else "B"
        uses = self._hops(kind=kind, step=-1, send="send_grad", arrive="arrive_grad")
        if ends == "together":
            uses += self._leaves(kind=kind, column="first_back", stage=0)
        for microbatch in range(self.schedule.num_microbatches):
            last = self.schedule.num_stages - 1
            made = self.turn_of[Action(stage=last, kind="F", microbatch=microbatch)]
            used = self.turn_of[action := Action(stage=last, kind=kind, microbatch=microbatch)]
            entries = (("loss_grad", made), ("source", used))
            uses.append(_Use(start=3 * made + 1, end=3 * used, rank=self.rank(action), entries=entries))
        self._assign(uses)

    def route_residuals(self) -> None:
        """From each forward to its own backward, whole or in halves."""
        readers: list[Kind] = ["I", "W"] if self.has_halves else ["B"]
        uses = []
        for forward, made in self.turn_of.items():
            if forward.kind == "F":
                stage, microbatch = forward.stage, forward.microbatch
                used = [self.turn_of[Action(stage=stage, kind=k, microbatch=microbatch)] for k in readers]
                entries = tuple(("save", turn) for turn in [made, *used])
                # The buffer is written while the forward runs and read while the backward does.
                uses.append(_Use(start=3 * made, end=3 * max(used) + 1, rank=self.rank(forward), entries=entries))
        self._assign(uses)

    def _hops(self, *, kind: Kind, step: int, send: str, arrive: str) -> list[_Use]:
        uses = []
        for action, made in self.turn_of.items():
            user = Action(stage=max(0, action.stage + step), kind=kind, microbatch=action.microbatch)
            if action.kind != kind or user == action or user not in self.turn_of:
                continue
            sent, used = self.last_turn_of[action], self.turn_of[user]
            leave = (("target", made), (send, sent))
            uses.append(_Use(start=3 * made + 1, end=3 * sent + 1, rank=self.rank(action), entries=leave))
            wait = ((arrive, sent), ("source", used))
            uses.append(_Use(start=3 * sent + 2, end=3 * used, rank=self.rank(user), entries=wait))
        return uses

    def _enters(self, *, column: str, stage: int) -> list[_Use]:
        """What all ranks make just before a stage's forward, at that stage's rank."""
        uses = []
        for microbatch in range(self.schedule.num_microbatches):
            turn = self.turn_of[action := Action(stage=stage, kind="F", microbatch=microbatch)]
            self.columns[column][turn] = microbatch
            entries = ((f"{column}_slot", turn), ("source", turn))
            uses.append(_Use(start=3 * turn - 1, end=3 * turn, rank=self.rank(action), entries=entries))
        return uses

    def _leaves(self, *, kind: Kind, column: str, stage: int) -> list[_Use]:
        """What all ranks take just after a stage's action, from that stage's rank."""
        uses = []
        for microbatch in range(self.schedule.num_microbatches):
            turn = self.turn_of[action := Action(stage=stage, kind=kind, microbatch=microbatch)]
            self.columns[column][turn] = microbatch
            entries = (("target", turn), (f"{column}_slot", turn))
            uses.append(_Use(start=3 * turn + 1, end=3 * turn + 1, rank=self.rank(action), entries=entries))
        return uses

    def _assign(self, uses: list[_Use]) -> None:
        """Give every use the lowest slot that is free: first come, first served is optimal for intervals."""
        free_from: list[list[int]] = [[] for _ in range(self.schedule.num_ranks)]
        for use in sorted(uses):
            slots = free_from[use.rank]
            slot = next((i for i, free in enumerate(slots) if free < use.start), len(slots))
            slots[slot:] = [use.end, *slots[slot + 1 :]]
            for column, turn in use.entries:
                self.columns[column][turn, use.rank] = slot

    def count(self, *names: str, kinds: Sequence[int] = ()) -> int:
        """Number of slots used: one more than the largest entry, and at least one.

        `source` and `target` name slots of either buffer, by the kind of action, so they count for these kinds only.
        """
        is_counted = np.isin(self.columns["kind"], kinds)
        tables = [
            np.where(is_counted, self.columns[name], NONE) if name in ("source", "target") else self.columns[name]
            for name in names
        ]
        return 1 + max(0, *(int(table.max()) for table in tables))
