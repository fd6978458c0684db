"""Megatron's order of interleaved 1F1B, for programs of their own on each rank.

trellax's own interleaved grid pairs a forward with a backward in each tick, which suits one lockstep program; with
hops that take time, separate programs do better to run ahead (Narayanan et al. 2021, section 2.2: warm-up of
2 (p - r - 1) + (v - 1) p). Read `pipeline_time.py` next.
"""

from ...pipeline.schedules import Action, Schedule, StageCost
from ...pipeline.schedules.check import needs
from ...pipeline.schedules.families.interleaved import turns_of
from ...pipeline.schedules.orders import schedule_from_orders


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


def qi_bubble(schedule: Schedule, *, stage: StageCost, transfer: float) -> float:
    """Return the bubble rate of interleaved 1F1B as Qi et al. 2024 compute it for their Table 5: over 12 rows the same.

    Their calculation lets one thing go: of p microbatches in turn on the last rank only the first waits for its
    gradient to come around from rank 0, so p hops too few are on the path. `simulate` waits for every one; no step is
    priced by this.

    Args:
        stage: seconds of one stage for one microbatch.
    """
    last, end_of, free_at = schedule.num_ranks - 1, dict[Action, float](), [0.0] * schedule.num_ranks
    for _, rank, action in schedule.placed():
        start = free_at[rank]
        for needed in needs(action, num_stages=schedule.num_stages, has_halves=False):
            is_around = rank == last and needed.kind == "B"
            if not (is_around and action.microbatch % schedule.num_ranks):
                hop = transfer if needed.stage % schedule.num_ranks != rank else 0.0
                start = max(start, end_of[needed] + hop)
        free_at[rank] = end_of[action] = start + stage.time_of(action.kind)
    work = schedule.num_microbatches * schedule.num_chunks * stage.total
    return 1 - work / max(free_at)
