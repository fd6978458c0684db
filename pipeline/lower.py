"""From a schedule to tables of integers: which slot of which buffer every action reads and writes.

The executor is one loop over the rows of these tables and knows no schedule by name. Read `execute.py` next.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .schedules import Action, Schedule

NONE = -1
"""Table entry for "nothing to do here"."""

COLUMNS = (
    "forward",  # microbatch to run forward, or NONE
    "forward_chunk",
    "forward_input",  # slot of the inbox that holds its input; NONE on the first stage
    "forward_save",  # slot that keeps its residuals
    "forward_grad",  # last stage only: slot of the gradient inbox for the loss's gradient
    "arrive",  # slot of the inbox for the activation that arrives at the end of the tick, or NONE
    "backward",  # microbatch to run backward, or NONE
    "backward_chunk",
    "backward_grad",  # slot of the gradient inbox that holds its output's gradient
    "backward_save",  # slot that kept its residuals
    "backward_first",  # 1 on the first stage, whose input gradient goes to the embedding
    "arrive_grad",  # slot of the gradient inbox for the gradient that arrives at the end of the tick, or NONE
)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A lowered schedule: int32 arrays [ticks, ranks] by column, and how many slots each buffer needs.

    `sends_forward` and `sends_backward` [ticks] say whether any rank passes something on in that tick.
    """

    columns: Mapping[str, np.ndarray]
    sends_forward: np.ndarray
    sends_backward: np.ndarray
    num_inbox_slots: int
    num_grad_slots: int
    num_save_slots: int


def lower(schedule: Schedule, *, kinds: Iterable[str] = ("F", "B")) -> Tables:
    """Return the tables of a schedule; with `kinds=("F",)` those of its forwards alone, packed without gaps."""
    placed = [(tick, rank, action) for tick, rank, action in schedule.placed() if action.kind in set(kinds)]
    placed, num_ticks = _squeeze(placed)
    at = {action: (tick, rank) for tick, rank, action in placed}
    columns = {name: np.full((num_ticks, schedule.num_ranks), NONE, np.int32) for name in COLUMNS}
    inbox, grads, saves = _Slots(schedule), _Slots(schedule), _Slots(schedule)
    for tick, rank, action in placed:
        if action.kind == "F":
            columns["forward"][tick, rank] = action.microbatch
            columns["forward_chunk"][tick, rank] = action.stage // schedule.num_ranks
        else:
            columns["backward"][tick, rank] = action.microbatch
            columns["backward_chunk"][tick, rank] = action.stage // schedule.num_ranks
            columns["backward_first"][tick, rank] = int(action.stage == 0)
    _route_forward(schedule, at, columns, inbox)
    if "B" in set(kinds):
        _route_backward(schedule, at, columns, grads, saves)
    return Tables(
        columns=columns,
        sends_forward=(columns["arrive"] != NONE).any(axis=1),
        sends_backward=(columns["arrive_grad"] != NONE).any(axis=1),
        num_inbox_slots=inbox.count,
        num_grad_slots=grads.count,
        num_save_slots=saves.count,
    )


def _squeeze(placed: list[tuple[int, int, Action]]) -> tuple[list[tuple[int, int, Action]], int]:
    """Drop ticks in which nobody acts, as happens when only the forwards are kept."""
    used = sorted({tick for tick, _, _ in placed})
    new = {tick: i for i, tick in enumerate(used)}
    return [(new[tick], rank, action) for tick, rank, action in placed], len(used)


class _Slots:
    """Hands out the lowest slot that is free on a rank; intervals must be asked for in order of their start."""

    def __init__(self, schedule: Schedule) -> None:
        self._free_from: list[list[int]] = [[] for _ in range(schedule.num_ranks)]

    def take(self, rank: int, start: int, end: int) -> int:
        """Return a slot of `rank` that is free over the half-ticks start..end, both included."""
        free_from = self._free_from[rank]
        for slot, free in enumerate(free_from):
            if free < start:
                free_from[slot] = end
                return slot
        free_from.append(end)
        return len(free_from) - 1

    @property
    def count(self) -> int:
        return max(1, *map(len, self._free_from))


# Time in thirds of a tick: forward at 3t, backward at 3t + 1, arrival of what the neighbours sent at 3t + 2.
def _route_forward(
    schedule: Schedule, at: dict[Action, tuple[int, int]], columns: dict[str, np.ndarray], inbox: _Slots
) -> None:
    arrivals = []
    for action, (tick, rank) in at.items():
        if action.kind == "F" and action.stage < schedule.num_stages - 1:
            user = at[Action(stage=action.stage + 1, kind="F", microbatch=action.microbatch)]
            arrivals.append((tick, user[1], user[0], rank))
    for sent, rank, used, _ in sorted(arrivals):
        slot = inbox.take(rank, 3 * sent + 2, 3 * used)
        columns["arrive"][sent, rank] = slot
        columns["forward_input"][used, rank] = slot


def _route_backward(
    schedule: Schedule,
    at: dict[Action, tuple[int, int]],
    columns: dict[str, np.ndarray],
    grads: _Slots,
    saves: _Slots,
) -> None:
    forwards = sorted((place, action) for action, place in at.items() if action.kind == "F")
    live = []
    for (tick, rank), action in forwards:
        used, _ = at[Action(stage=action.stage, kind="B", microbatch=action.microbatch)]
        slot = saves.take(rank, 3 * tick, 3 * used + 1)
        columns["forward_save"][tick, rank] = columns["backward_save"][used, rank] = slot
        if action.stage == schedule.num_stages - 1:
            live.append((3 * tick, rank, used, "forward_grad"))
    for action, (tick, _) in at.items():
        if action.kind == "B" and action.stage > 0:
            used, rank = at[Action(stage=action.stage - 1, kind="B", microbatch=action.microbatch)]
            live.append((3 * tick + 2, rank, used, "arrive_grad"))
    for start, rank, used, column in sorted(live):
        slot = grads.take(rank, start, 3 * used + 1)
        columns[column][start // 3, rank] = columns["backward_grad"][used, rank] = slot
