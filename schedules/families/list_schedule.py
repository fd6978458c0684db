"""A greedy list scheduler: in every tick each rank runs the ready action of the highest priority.

List scheduling (Graham 1969): no rank looks ahead, so one pass over the ticks is enough. With the priority I, F, W and
a limit of 3 microbatches:

    rank 0 | 0F0 0F1 0F2   .   . 0I0 0W0 0I1 0F3 0I2 0W1 0W2   . 0I3 0W3
    rank 1 |   . 1F0 1F1 1F2 1I0 1W0 1I1 1W1 1I2 1F3 1W2   . 1I3 1W3   .
    rank 2 |   .   . 2F0 2I0 2F1 2I1 2F2 2I2 2W0 2W1 2F3 2I3 2W2 2W3   .

Rank 0 holds 3 microbatches after tick 2, so 0F3 waits for 0W0, which ends microbatch 0 there. Rank 2 puts its weight
gradients off for as long as an input gradient or a forward is ready.
"""

from collections.abc import Sequence
from typing import Literal

from ..action import Action, Kind
from ..check import needs
from ..schedule import Schedule
from .interleaved import turns_of


def list_schedule(
    *,
    name: str,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 1,
    limit: int,
    priority: Sequence[Kind] = ("I", "F", "W"),
    group: Literal["ranks", "one"] = "ranks",
) -> Schedule:
    """Build a schedule with split backwards, in ticks of one action.

    Args:
        limit: a rank starts no forward while it holds this many microbatches of a chunk.
        priority: kinds of action, the most urgent first.
        group: microbatches that pass through one chunk before the next: as many as ranks, or one, which holds least.

    Raises:
        ScheduleError: a count is below 1, or the limit is too small to finish.
    """
    turns = turns_of(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    order = [(chunk, microbatch) for _, chunk, microbatch in turns]
    if group == "one":
        order.sort(key=lambda turn: (turn[1], turn[0]))
    state = _State(order, num_ranks, num_chunks, limit)
    # Once no rank can run anything nothing changes any more: all is done, or the limit blocks everything.
    while state.step(priority):
        pass
    return Schedule.from_ticks(state.ticks_of, name=name, num_microbatches=num_microbatches, num_chunks=num_chunks)


class _State:
    """The actions that have run, and each rank's queues of actions to run."""

    def __init__(self, turns: list[tuple[int, int]], num_ranks: int, num_chunks: int, limit: int) -> None:
        self.num_ranks, self.num_stages, self.limit = num_ranks, num_ranks * num_chunks, limit
        self.tick = 0
        self.tick_of: dict[Action, int] = {}
        self.ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
        self.held = [0] * num_ranks
        self.waiting: list[dict[Kind, list[Action]]] = [
            {kind: self._queue(kind, rank, turns) for kind in ("F", "I", "W")} for rank in range(num_ranks)
        ]

    def _queue(self, kind: Kind, rank: int, turns: list[tuple[int, int]]) -> list[Action]:
        """Return a rank's actions of a kind in reverse, so that the next one is popped from the end."""
        last = self.num_stages // self.num_ranks - 1
        stages = [((chunk if kind == "F" else last - chunk) * self.num_ranks + rank, k) for chunk, k in turns]
        return [Action(stage=stage, kind=kind, microbatch=k) for stage, k in reversed(stages)]

    def step(self, priority: Sequence[Kind]) -> bool:
        """Run one tick and return whether any rank had something to run."""
        # All ranks choose before any result counts: a tick's results are sent at its end.
        chosen = [self._choose(rank, priority) for rank in range(self.num_ranks)]
        for rank, action in enumerate(chosen):
            if action is not None:
                self.waiting[rank][action.kind].pop()
                # A microbatch is held until its weight gradient, which needs the layer's inputs.
                self.held[rank] += {"F": 1, "W": -1}.get(action.kind, 0)
                self.ticks_of[rank][self.tick] = [action]
                self.tick_of[action] = self.tick
        self.tick += 1
        return any(chosen)

    def _choose(self, rank: int, priority: Sequence[Kind]) -> Action | None:
        for kind in priority:
            queue = self.waiting[rank][kind]
            is_full = kind == "F" and self.held[rank] >= self.limit
            if queue and not is_full and self._is_ready(queue[-1]):
                return queue[-1]
        return None

    def _is_ready(self, action: Action) -> bool:
        needed = needs(action, num_stages=self.num_stages, has_halves=True)
        return all(self.tick_of.get(other, self.tick) < self.tick for other in needed)
