"""A greedy list scheduler: in every tick each rank runs the first kind of action, by priority, that is ready."""

from collections.abc import Sequence
from typing import Literal

from .action import Action, Kind
from .check import needs
from .grid import Schedule
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
    """Return the schedule, in ticks of one action, of backwards in halves.

    Args:
        limit: a rank starts no forward while it holds this many microbatches of chunks.
        priority: which kind comes first when several are ready.
        group: whether chunks take turns of as many microbatches as there are ranks, or of one, which holds the least.

    Raises:
        ScheduleError: a count is below 1, or the limit is too small to finish.
    """
    turns = turns_of(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    order = [(chunk, microbatch) for _, chunk, microbatch in turns]
    if group == "one":
        order.sort(key=lambda turn: (turn[1], turn[0]))
    state = _State(order, num_ranks, num_chunks, limit)
    # A tick in which nobody can run anything is followed by others like it.
    while state.step(priority):
        pass
    return Schedule.from_ticks(state.ticks_of, name=name, num_microbatches=num_microbatches, num_chunks=num_chunks)


class _State:
    """What has run, and what each rank would run next."""

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
        """Return a rank's actions of a kind, the last first, so that the next is popped from the end."""
        last = self.num_stages // self.num_ranks - 1
        stages = [((chunk if kind == "F" else last - chunk) * self.num_ranks + rank, k) for chunk, k in turns]
        return [Action(stage=stage, kind=kind, microbatch=k) for stage, k in reversed(stages)]

    def step(self, priority: Sequence[Kind]) -> bool:
        """Run one tick; False if nobody could run anything."""
        chosen = [self._choose(rank, priority) for rank in range(self.num_ranks)]
        for rank, action in enumerate(chosen):
            if action is not None:
                self.waiting[rank][action.kind].pop()
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
