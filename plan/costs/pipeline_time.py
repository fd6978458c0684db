"""Compute the time of a pipeline for many microbatches with the schedule's own simulator.

A schedule is periodic once the pipeline is full, so a few microbatches are simulated and the rest extrapolated with
the slope of the last `p`. That is exact where the steady state is reached:

    time(m) = time(few) + (m - few) / p * (time(few + p) - time(few))

Read `step_time.py` next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ...layers import ModelConfig
from ...pipeline import stage_costs
from ...schedules import Placement, Schedule, StageCost, build_schedule, find_family, simulate
from .layout import Layout
from .lockstep_ticks import TickCounts, count_ticks, lockstep_time_s
from .runtime import OrderTraits, Runtime
from .stage_time import stage_layers

# Microbatches of the shortest simulated schedule, in units of ranks.
_SHORT = 2
_MOST_SEARCHED_ACTIONS = 1024


@dataclass(frozen=True, kw_only=True)
class SearchTerms:
    """The inputs of a searched schedule: times of the stages in any unit, and the most microbatches a rank may hold."""

    stages: tuple[StageCost, ...]
    max_in_flight: int | None


def search_terms(model: ModelConfig, *, layout: Layout, num_tokens: int, runtime: Runtime) -> SearchTerms | None:
    """Return the inputs with which training searches for a layout's schedule; None if its order is fixed.

    The same inputs give the same schedule, so the plan prices what training runs.
    """
    if layout.pipe == 1 or layout.family.order == "fixed":
        return None
    stages = stage_costs(
        model,
        layers_per_stage=stage_layers(model, layout, runtime=runtime),
        num_tokens=num_tokens,
        vocab=runtime.vocab,
        remat="dots" if layout.remat == "selective" else layout.remat,
    )
    return SearchTerms(stages=stages, max_in_flight=layout.max_in_flight)


def find_placement(model: ModelConfig, *, layout: Layout, num_tokens: int, runtime: Runtime) -> Placement:
    """Return which rank holds which stage of a layout; a schedule that is searched for is built to know it."""
    shape = layout.family.placement
    if shape != "searched":
        return Placement.of(shape, num_ranks=layout.pipe, num_chunks=layout.chunks)
    if layout.pipe == 1:
        return Placement.of("loop", num_ranks=1, num_chunks=layout.chunks)
    whole = is_searched_whole(layout.schedule, num_stages=layout.num_stages, num_microbatches=layout.microbatches)
    return plan_schedule(
        layout.schedule,
        num_ranks=layout.pipe,
        num_microbatches=layout.microbatches if whole else _count_few(layout.microbatches, num_ranks=layout.pipe),
        num_chunks=layout.chunks,
        traits=runtime.order_traits,
        terms=search_terms(model, layout=layout, num_tokens=num_tokens, runtime=runtime),
    ).placement


# Layouts that differ in ZeRO alone have the same pipeline.
@lru_cache(maxsize=1024)
def pipeline_time_s(
    stages: tuple[StageCost, ...],
    *,
    schedule: str,
    num_ranks: int,
    num_microbatches: int,
    traits: OrderTraits,
    transfer: float = 0.0,
    shared_loss: float = 0.0,
    terms: SearchTerms | None = None,
) -> float:
    """Return the seconds from the first forward to the last gradient.

    Args:
        stages: times of every stage, first to last; their number divided by the ranks is the number of chunks.
        transfer, shared_loss: as in `simulate`.
        terms: inputs of a searched schedule.
    """
    num_chunks = len(stages) // num_ranks
    if num_ranks == 1:
        return num_microbatches * (sum(stage.total for stage in stages) + shared_loss)

    def run(count: int) -> float:
        sizes = {"num_ranks": num_ranks, "num_microbatches": count, "num_chunks": num_chunks}
        if traits.clock == "lockstep":
            alike = tuple(map(stages.index, stages))
            ticks = sort_ticks(schedule, **sizes, traits=traits, terms=terms, alike=alike)
            return lockstep_time_s(ticks, stages=stages, transfer=transfer, shared_loss=shared_loss)
        grid = plan_schedule(schedule, **sizes, traits=traits, terms=terms)
        return simulate(grid, clock=traits.clock, stages=stages, transfer=transfer, shared_loss=shared_loss).makespan

    return extrapolate(run, schedule, num_ranks=num_ranks, num_stages=len(stages), num_microbatches=num_microbatches)


def extrapolate(
    run: Callable[[int], float], schedule: str, *, num_ranks: int, num_stages: int, num_microbatches: int
) -> float:
    """Return what grows by the same in every period of a schedule, as its time does, given that of few microbatches."""
    few = _count_few(num_microbatches, num_ranks=num_ranks)
    periods = (num_microbatches - few) // num_ranks
    if not periods or is_searched_whole(schedule, num_stages=num_stages, num_microbatches=num_microbatches):
        return run(num_microbatches)
    start = run(few)
    return start + periods * (run(few + num_ranks) - start)


def _count_few(num_microbatches: int, *, num_ranks: int) -> int:
    """Return the microbatches of the shorter schedule that is simulated, all of them if they are few.

    8 ranks and 100 microbatches make 10 periods of 8 after 20, so schedules of 20 and 28 microbatches are simulated.
    """
    periods = (num_microbatches - _SHORT * num_ranks) // num_ranks
    return num_microbatches if periods < 2 else num_microbatches - periods * num_ranks


def is_searched_whole(schedule: str, *, num_stages: int, num_microbatches: int) -> bool:
    """Return whether a schedule is searched for with all microbatches rather than extrapolated.

    The order that a search finds may depend on their number; a search of up to 1,024 actions takes about a second.
    """
    is_searched = find_family(schedule).order == "searched"
    return is_searched and num_stages * num_microbatches <= _MOST_SEARCHED_ACTIONS


@lru_cache(maxsize=512)
def sort_ticks(
    schedule: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    traits: OrderTraits,
    terms: SearchTerms | None,
    alike: tuple[int, ...],
) -> TickCounts:
    """Return the ticks of the schedule in which a runtime runs, by what they cost; see `count_ticks`."""
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches, "num_chunks": num_chunks}
    return count_ticks(plan_schedule(schedule, **sizes, traits=traits, terms=terms), alike=alike)


@lru_cache(maxsize=256)
def plan_schedule(
    schedule: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    traits: OrderTraits,
    terms: SearchTerms | None = None,
) -> Schedule:
    """Build the schedule in the order that a runtime with these traits uses."""
    family = find_family(schedule)
    if family.run_ahead is not None and traits.chunk_order == "run-ahead":
        return family.run_ahead(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    return build_schedule(
        schedule,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_chunks=num_chunks,
        clock=traits.clock,
        vocab=traits.vocab,
        stages=terms.stages if terms else None,
        max_in_flight=terms.max_in_flight if terms else None,
    )
