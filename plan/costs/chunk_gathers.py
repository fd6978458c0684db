"""Count how often a rank gathers weights that data shards keep parts of, and how many of them it has whole at once.

    zero 3, gathers "layer"    2 m times each, forward and backward of every microbatch; about one layer is whole
    zero 3, gathers "chunk"    once for a run of actions of a chunk; as many chunks are whole as have slots

Slots and runs are those of the schedule that training runs (`schedules/chunk_weights.py`). From some length on a
schedule repeats itself every `p` microbatches, so the gathers of a long one are those of two short ones extrapolated.
"""

from dataclasses import dataclass
from functools import lru_cache

from ...layers import ModelConfig
from ...schedules.chunk_weights import count_gathers
from .layout import Layout
from .pipeline_time import SearchTerms, count_few, is_searched_whole, plan_schedule, search_terms
from .runtime import OrderTraits, Runtime


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """Gathers of weights over data.

    rounds: times that each parameter is gathered in a step.
    slots: chunks that a rank has whole at once; 0 where layers are gathered one by one.
    """

    rounds: float
    slots: int


def find_gathers(model: ModelConfig, *, layout: Layout, num_tokens: int, runtime: Runtime) -> Gathers:
    """Return the gathers of a layout whose parameters and gradients are split over data (`zero` 3, or `fsdp`)."""
    if layout.zero != 3 or layout.gathers == "layer":
        return Gathers(rounds=2 * layout.microbatches, slots=0)
    if layout.pipe == 1:
        return Gathers(rounds=1, slots=layout.chunks)
    return _count(
        layout.schedule,
        num_ranks=layout.pipe,
        num_microbatches=layout.microbatches,
        num_chunks=layout.chunks,
        traits=runtime.order_traits,
        terms=search_terms(model, layout=layout, num_tokens=num_tokens, runtime=runtime),
    )


@lru_cache(maxsize=1024)
def _count(
    schedule: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    traits: OrderTraits,
    terms: SearchTerms | None,
) -> Gathers:
    def run(count: int) -> tuple[int, int]:
        sizes = {"num_ranks": num_ranks, "num_microbatches": count, "num_chunks": num_chunks}
        return count_gathers(plan_schedule(schedule, **sizes, traits=traits, terms=terms))

    few = count_few(num_microbatches, num_ranks=num_ranks)
    is_whole = is_searched_whole(schedule, num_stages=num_ranks * num_chunks, num_microbatches=num_microbatches)
    if is_whole or few == num_microbatches:
        slots, gathers = run(num_microbatches)
    else:
        slots, start = run(few)
        gathers = start + (num_microbatches - few) // num_ranks * (run(few + num_ranks)[1] - start)
    return Gathers(rounds=gathers / num_chunks, slots=slots)
