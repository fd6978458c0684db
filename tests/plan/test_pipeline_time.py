"""Pipelines of many microbatches: a few simulated and the rest continued give what simulating all gives."""

import pytest
from trellax.pipeline.schedules import Clock, StageCost, simulate
from trellax.plan.pipeline_time import pipeline_time_s, plan_schedule, screen_pipeline_s

NAMES = [("1f1b", 1), ("zb-h1", 1), ("gpipe", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3)]


def uneven(count: int) -> list[StageCost]:
    return [
        StageCost(forward=1 + 0.1 * (k % 3), input_grad=1.1, weight_grad=0.9 + 0.2 * (k == count - 1))
        for k in range(count)
    ]


@pytest.mark.parametrize("clock", ["async", "lockstep"])
@pytest.mark.parametrize(("name", "chunks"), NAMES)
def test_time_continues_with_the_slope_of_the_steady_state(name: str, chunks: int, clock: Clock) -> None:
    stages = uneven(4 * chunks)
    sizes = {"num_ranks": 4, "num_microbatches": 32}
    schedule = plan_schedule(name, **sizes, num_chunks=chunks, clock=clock)
    whole = simulate(schedule, clock=clock, stages=stages, transfer=0.05).makespan
    found = pipeline_time_s(stages, schedule=name, **sizes, clock=clock, transfer=0.05)
    assert found == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("gpipe", 1), ("interleaved-1f1b", 2)])
def test_closed_form_is_exact_on_equal_stages_without_transfer(name: str, chunks: int) -> None:
    stages = [StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0)] * (4 * chunks)
    sizes = {"num_ranks": 4, "num_microbatches": 16}
    simulated = pipeline_time_s(stages, schedule=name, **sizes, clock="async")
    assert screen_pipeline_s(stages, schedule=name, **sizes, clock="async") == pytest.approx(simulated)


def test_one_rank_has_no_bubble() -> None:
    stages = [StageCost(forward=1.0, input_grad=2.0, weight_grad=3.0)]
    assert pipeline_time_s(stages, schedule="1f1b", num_ranks=1, num_microbatches=5, clock="lockstep") == 30
