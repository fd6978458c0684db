"""Megatron's order of interleaved 1F1B, for programs of their own on each rank.

trellax's own interleaved grid pairs a forward with a backward in each tick, which suits one lockstep program; with
hops that take time, separate programs do better to run ahead (Narayanan et al. 2021, section 2.2: warm-up of
2 (p - r - 1) + (v - 1) p). Read `pipeline_time.py` next.
"""

from ..pipeline.schedules import Action, Schedule
from ..pipeline.schedules.interleaved import turns_of
from ..pipeline.schedules.place import schedule_from_orders


def megatron_interleaved(*, num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """Return interleaved 1F1B in Megatron's order.

    Raises:
        ScheduleError: a count is below 1.
    """
    turns = turns_of(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    orders = []
    for rank in range(num_ranks):
        forwards = [Action(stage=chunk * num_ranks + rank, kind="F", microbatch=k) for _, chunk, k in turns]
        backwards = [
            Action(stage=(num_chunks - 1 - chunk) * num_ranks + rank, kind="B", microbatch=k) for _, chunk, k in turns
        ]
        warm_up = min(len(turns), 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks)
        order = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            order += [forward, backward]
        orders.append([*order, *backwards[len(turns) - warm_up :]])
    return schedule_from_orders(
        orders, name="interleaved-1f1b", num_microbatches=num_microbatches, num_chunks=num_chunks
    )
