"""How long a pipeline takes for many microbatches, by the schedule's own simulator.

A schedule is periodic once it is full, so a few microbatches are simulated and the rest continue with the slope of
the last `p`: exact where the steady state is reached. Read `step_time.py` next.
"""

from dataclasses import dataclass
from functools import lru_cache

from ...layers import ModelConfig
from ...pipeline import stage_costs
from ...pipeline.schedules import Clock, Schedule, StageCost, Vocab, build_schedule, simulate
from .layouts import Layout
from .megatron_order import megatron_interleaved
from .stage_time import stage_layers

_SHORT = 2
_AUTO_ACTIONS = 1024


@dataclass(frozen=True, kw_only=True)
class AutoTerms:
    """What schedule "auto" is built for: times of the stages in any unit, and the most microbatches a rank may hold."""

    stages: tuple[StageCost, ...]
    max_in_flight: int | None


def auto_terms(model: ModelConfig, *, layout: Layout, num_tokens: int, vocab: Vocab) -> AutoTerms | None:
    """Return what training builds a layout's schedule for, so that the same is priced; None for all but "auto"."""
    if layout.schedule != "auto" or layout.pipe == 1:
        return None
    stages = stage_costs(
        model,
        layers_per_stage=stage_layers(model, layout),
        num_tokens=num_tokens,
        vocab=vocab,
        remat="dots" if layout.remat == "selective" else layout.remat,
    )
    return AutoTerms(stages=stages, max_in_flight=layout.max_in_flight)


# Layouts that differ in ZeRO alone have the same pipeline.
@lru_cache(maxsize=1024)
def pipeline_time_s(
    stages: tuple[StageCost, ...],
    *,
    schedule: str,
    num_ranks: int,
    num_microbatches: int,
    clock: Clock,
    vocab: Vocab = "ends",
    transfer: float = 0.0,
    shared_loss: float = 0.0,
    auto: AutoTerms | None = None,
) -> float:
    """Return the seconds from the first forward to the last gradient, by the schedule's simulator.

    Args:
        stages: times of every stage, first to last; their number over the ranks is the number of chunks.
        transfer, shared_loss: as in `simulate`.
        auto: what schedule "auto" is built for.
    """
    num_chunks = len(stages) // num_ranks
    if num_ranks == 1:
        return num_microbatches * (sum(stage.total for stage in stages) + shared_loss)

    def run(count: int) -> float:
        sizes = {"num_ranks": num_ranks, "num_microbatches": count, "num_chunks": num_chunks}
        grid = plan_schedule(schedule, **sizes, clock=clock, vocab=vocab, auto=auto)
        return simulate(grid, clock=clock, stages=stages, transfer=transfer, shared_loss=shared_loss).makespan

    periods = (num_microbatches - _SHORT * num_ranks) // num_ranks
    if periods < 2 or is_auto_built_whole(schedule, num_stages=len(stages), num_microbatches=num_microbatches):
        return run(num_microbatches)
    few = num_microbatches - periods * num_ranks
    start = run(few)
    return start + periods * (run(few + num_ranks) - start)


def is_auto_built_whole(schedule: str, *, num_stages: int, num_microbatches: int) -> bool:
    """Return whether "auto" is built for all microbatches: what it chooses may turn on their number; a second or so."""
    return schedule == "auto" and num_stages * num_microbatches <= _AUTO_ACTIONS


@lru_cache(maxsize=256)
def plan_schedule(
    schedule: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    clock: Clock,
    vocab: Vocab = "ends",
    auto: AutoTerms | None = None,
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
        stages=auto.stages if auto else None,
        max_in_flight=auto.max_in_flight if auto else None,
    )
