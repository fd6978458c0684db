"""The time of many microbatches, extrapolated from a few, equals the time of simulating all."""

from dataclasses import replace

import pytest
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.pipeline_time import SearchTerms, pipeline_time_s, plan_schedule, search_terms
from trellax.plan.costs.runtime import MEGATRON, TRELLAX, Runtime
from trellax.schedules import Clock, StageCost, build_schedule, simulate
from trellax.schedules.families.interleaved import interleaved_run_ahead

from benchmarks.planner.qi_bubble import qi_bubble

from .models import GPT2

NAMES = [("1f1b", 1), ("zb-h1", 1), ("gpipe", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3)]
NAMES += [("zb-v", 2), ("v-half", 2), ("v-min", 2), ("dualpipev", 2)]


def uneven(count: int) -> tuple[StageCost, ...]:
    return tuple(
        StageCost(forward=1 + 0.1 * (k % 3), input_grad=1.1, weight_grad=0.9 + 0.2 * (k == count - 1))
        for k in range(count)
    )


RUNTIMES = {"async": MEGATRON, "lockstep": replace(TRELLAX, vocab="ends")}


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
@pytest.mark.parametrize(("name", "chunks"), NAMES)
def test_time_continues_with_the_slope_of_the_steady_state(name: str, chunks: int, runtime: Runtime) -> None:
    traits = runtime.order_traits
    stages = uneven(4 * chunks)
    sizes = {"num_ranks": 4, "num_microbatches": 32}
    schedule = plan_schedule(name, **sizes, num_chunks=chunks, traits=traits)
    whole = simulate(schedule, clock=traits.clock, stages=stages, transfer=0.05).makespan
    found = pipeline_time_s(stages, schedule=name, **sizes, traits=traits, transfer=0.05)
    assert found == pytest.approx(whole, rel=1e-9)


def test_one_rank_has_no_bubble() -> None:
    stages = (StageCost(forward=1.0, input_grad=2.0, weight_grad=3.0),)
    assert pipeline_time_s(stages, schedule="1f1b", num_ranks=1, num_microbatches=5, traits=TRELLAX.order_traits) == 30


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("clock", ["async", "lockstep"])
def test_auto_is_priced_by_the_schedule_that_training_builds(limit: int | None, clock: Clock) -> None:
    runtime = replace(TRELLAX, clock=clock)
    stages, sizes = uneven(4), {"num_ranks": 4, "num_microbatches": 16}
    layout = Layout(pipe=4, microbatches=16, schedule="auto", max_in_flight=limit)
    terms = search_terms(GPT2, layout=layout, num_tokens=1024, runtime=runtime)
    assert terms is not None
    built = build_schedule("auto", **sizes, clock=clock, vocab="split", max_in_flight=limit, stages=terms.stages)
    whole = simulate(built, clock=clock, stages=stages, transfer=0.05)
    found = pipeline_time_s(stages, schedule="auto", **sizes, traits=runtime.order_traits, transfer=0.05, terms=terms)
    assert found == pytest.approx(whole.makespan, rel=1e-12)
    assert limit is None or max(whole.peak_in_flight) <= limit


def test_extrapolated_auto_is_near_the_price_of_the_whole_schedule() -> None:
    stages = uneven(4)
    terms = SearchTerms(stages=tuple(stages), max_in_flight=4)
    sizes = {"num_ranks": 4, "num_microbatches": 300}
    found = pipeline_time_s(stages, schedule="auto", **sizes, traits=MEGATRON.order_traits, terms=terms)
    grid = plan_schedule("auto", **sizes, num_chunks=1, traits=MEGATRON.order_traits, terms=terms)
    assert found == pytest.approx(simulate(grid, clock="async", stages=stages).makespan, rel=1e-3)


def test_qi_et_al_count_as_many_hops_less_as_there_are_ranks() -> None:
    schedule = interleaved_run_ahead(num_ranks=4, num_microbatches=12, num_chunks=3)
    stage = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0)
    costs = {"forward": 3.0, "input_grad": 3.0, "weight_grad": 3.0}
    assert qi_bubble(schedule, stage=stage, transfer=0.0) == pytest.approx(
        simulate(schedule, clock="async", **costs).bubble_fraction
    )
    whole = simulate(schedule, clock="async", transfer=0.01, **costs)
    assert qi_bubble(schedule, stage=stage, transfer=0.01) == pytest.approx(1 - 12 * 9 / (whole.makespan - 4 * 0.01))
