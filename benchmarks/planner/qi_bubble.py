"""The bubble of interleaved 1F1B as Qi et al. 2024 compute it, for the comparison with their Table 5."""

from trellax.schedules import Action, Schedule, StageCost
from trellax.schedules.check import needs


def qi_bubble(schedule: Schedule, *, stage: StageCost, transfer: float) -> float:
    """Return the bubble fraction of interleaved 1F1B by the calculation behind Table 5, equal to all its 12 rows.

    Their calculation leaves out p hops: of p consecutive microbatches on the last rank only the first waits for its
    gradient to come around from rank 0. `simulate` waits for each of them, and the planner uses `simulate`.

    Args:
        stage: seconds of one stage for one microbatch.
        transfer: seconds of one hop.
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
