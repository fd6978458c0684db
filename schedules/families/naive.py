"""Naive: one microbatch passes through the whole pipeline and back before the next begins."""

from ..action import Action
from ..check import check_sizes
from ..family import Family
from ..formula import one_rank_bubble
from ..schedule import Schedule


def naive(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the schedule in which one rank works at a time.

    In flight: 1 microbatch. Bubble fraction: (p - 1) / p.

    Raises:
        ScheduleError: a count is below 1.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    round_trip = 2 * num_ranks - 1
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for rank, ticks in enumerate(ticks_of):
        for microbatch in range(num_microbatches):
            start = microbatch * round_trip
            forward, backward = start + rank, start + 2 * (num_ranks - 1) - rank
            # On the last rank both fall into one tick.
            ticks.setdefault(forward, []).append(Action(stage=rank, kind="F", microbatch=microbatch))
            ticks.setdefault(backward, []).append(Action(stage=rank, kind="B", microbatch=microbatch))
    return Schedule.from_ticks(ticks_of, name="naive", num_microbatches=num_microbatches)


NAIVE = Family(name="naive", build=naive, bubble=one_rank_bubble)
