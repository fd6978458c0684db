"""How long a pipeline takes for many microbatches: the schedule's own simulator, and a closed form for screening.

A schedule is periodic once it is full, so a few microbatches are simulated and the rest continue with the slope of
the last `p`: exact where the steady state is reached. Read `step_time.py` next.
"""

from collections.abc import Sequence
from functools import lru_cache

from ..pipeline.schedules import Clock, Schedule, StageCost, Vocab, build_schedule, simulate
from .megatron_order import megatron_interleaved

_SHORT = 2


def pipeline_time_s(
    stages: Sequence[StageCost],
    *,
    schedule: str,
    num_ranks: int,
    num_microbatches: int,
    clock: Clock,
    vocab: Vocab = "ends",
    transfer: float = 0.0,
    shared_loss: float = 0.0,
) -> float:
    """Return the seconds from the first forward to the last gradient, by the schedule's simulator.

    Args:
        stages: times of every stage, first to last; their number over the ranks is the number of chunks.
        transfer, shared_loss: as in `simulate`.
    """
    num_chunks = len(stages) // num_ranks
    if num_ranks == 1:
        return num_microbatches * (sum(stage.total for stage in stages) + shared_loss)

    def run(count: int) -> float:
        sizes = {"num_ranks": num_ranks, "num_microbatches": count, "num_chunks": num_chunks}
        grid = plan_schedule(schedule, **sizes, clock=clock, vocab=vocab)
        return simulate(grid, clock=clock, stages=stages, transfer=transfer, shared_loss=shared_loss).makespan

    periods = (num_microbatches - _SHORT * num_ranks) // num_ranks
    if periods < 2:
        return run(num_microbatches)
    few = num_microbatches - periods * num_ranks
    start = run(few)
    return start + periods * (run(few + num_ranks) - start)


def screen_pipeline_s(
    stages: Sequence[StageCost],
    *,
    schedule: str,
    num_ranks: int,
    num_microbatches: int,
    clock: Clock,
    vocab: Vocab = "ends",
    transfer: float = 0.0,
    shared_loss: float = 0.0,
) -> float:
    """Return the seconds by a closed form: every microbatch on the slowest rank, and the other ranks' filling.

    Exact for gpipe, 1f1b and their interleaved forms on equal stages; zero-bubble ones save a weight gradient a rank.
    """
    num_chunks = len(stages) // num_ranks
    ranks = [sum(stages[chunk * num_ranks + rank].total for chunk in range(num_chunks)) for rank in range(num_ranks)]
    slowest = max(range(num_ranks), key=ranks.__getitem__)
    fill = sum(stage.total for rank, stage in enumerate(stages[:num_ranks]) if rank != slowest)
    if schedule.endswith("zb-h1"):
        fill -= sum(stage.weight_grad for rank, stage in enumerate(stages[:num_ranks]) if rank != slowest)
    if num_ranks == 1:
        fill = 0.0
    if schedule == "naive":
        return num_microbatches * (sum(ranks) + shared_loss)
    # In lockstep every tick with a hop pays it; separate programs pay on the way in and out alone.
    hops = 2 * (num_ranks - 1) + (num_microbatches * num_chunks if clock == "lockstep" and num_ranks > 1 else 0)
    delay = shared_loss if vocab == "split" else 0.0
    return num_microbatches * (ranks[slowest] + shared_loss) + fill + delay + hops * transfer


@lru_cache(maxsize=256)
def plan_schedule(
    schedule: str, *, num_ranks: int, num_microbatches: int, num_chunks: int, clock: Clock, vocab: Vocab = "ends"
) -> Schedule:
    """Return the grid of a schedule by the clock it is for."""
    if schedule == "interleaved-1f1b" and clock == "async":
        return megatron_interleaved(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    return build_schedule(
        schedule,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_chunks=num_chunks,
        clock=clock,
        vocab=vocab,
    )
