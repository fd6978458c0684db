"""The formulas of the papers beside the simulation: equal where they speak of the same thing, else with a reason."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.schedules import (
    SCHEDULES,
    Clock,
    Schedule,
    build_schedule,
    explain_difference,
    find_formula,
    schedule_from_csv,
    simulate,
)

COST = st.sampled_from((0.5, 1.0, 1.5, 2.0))
CLOCK = st.sampled_from(("lockstep", "async"))
NAMES = ("naive", "gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "interleaved-zb-h1")

every_size = settings(derandomize=True, deadline=None)


def build(name: str, ranks: int, microbatches: int, clock: Clock = "lockstep") -> Schedule:
    num_chunks = SCHEDULES[name].default_chunks
    return build_schedule(name, num_ranks=ranks, num_microbatches=microbatches, num_chunks=num_chunks, clock=clock)


@every_size
@given(name=st.sampled_from(("naive", "gpipe", "1f1b")), p=st.integers(1, 8), m=st.integers(1, 32), b=COST, clock=CLOCK)
def test_whole_backwards_have_the_bubble_of_the_formula(name: str, p: int, m: int, b: float, clock: Clock) -> None:
    schedule = build(name, p, m, clock)
    formula = find_formula(schedule, input_grad=b)
    assert formula
    timing = simulate(schedule, clock=clock, input_grad=b)
    assert timing.bubble_fraction == pytest.approx(formula.bubble_fraction, abs=1e-12)
    assert explain_difference(schedule, formula, timing, input_grad=b) is None


@every_size
@given(p=st.integers(1, 8), m=st.integers(1, 32), f=COST, i=COST)
def test_zb_h1_of_separate_programs_has_the_bubble_of_table_2(p: int, m: int, f: float, i: float) -> None:
    weight_grad = 0.9 * min(f, i)
    schedule = build("zb-h1", p, m, "async")
    formula = find_formula(schedule, forward=f, input_grad=i, weight_grad=weight_grad)
    assert formula
    timing = simulate(schedule, clock="async", forward=f, input_grad=i, weight_grad=weight_grad)
    assert timing.bubble_fraction == pytest.approx(formula.bubble_fraction, abs=1e-12)


@every_size
@given(name=st.sampled_from(NAMES), p=st.integers(1, 6), groups=st.integers(1, 4))
def test_equal_costs_in_whole_groups_reach_every_formula_in_lockstep(name: str, p: int, groups: int) -> None:
    schedule = build(name, p, groups * p)
    formula = find_formula(schedule)
    assert formula
    assert simulate(schedule).bubble_fraction == pytest.approx(formula.bubble_fraction, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "microbatches", "clock", "costs", "reason"),
    [
        ("1f1b", 8, "async", {"transfer": 0.1}, "no transfer"),
        ("interleaved-1f1b", 6, "lockstep", {}, "whole groups"),
        ("zb-h1", 8, "lockstep", {"weight_grad": 0.5}, "in lockstep a tick lasts"),
        ("interleaved-zb-h1", 32, "async", {"input_grad": 2.0}, "F = I = W"),
        ("zb-h1", 8, "async", {"weight_grad": 3.0}, "no longer than F and I"),
        ("zb-v", 8, "lockstep", {}, "begin the next step before others end this one"),
        ("v-half", 8, "lockstep", {}, "rounds the idle time up, to 3p ticks"),
        ("v-min", 7, "async", {}, "rounds the idle time up, to 4p ticks"),
        ("v-min", 8, "async", {"transfer": 0.1}, "no transfer"),
        ("v-half", 8, "lockstep", {"weight_grad": 0.5}, "in lockstep a tick lasts"),
        ("dualpipev", 8, "lockstep", {}, "whole backwards, which are split here"),
    ],
)
def test_difference_from_the_formula_is_explained(
    name: str, microbatches: int, clock: Clock, costs: dict[str, Any], reason: str
) -> None:
    schedule = build(name, 4, microbatches, clock)
    formula = find_formula(schedule, **{key: value for key, value in costs.items() if key != "transfer"})
    assert formula
    timing = simulate(schedule, clock=clock, **costs)
    assert reason in str(explain_difference(schedule, formula, timing, **costs))


@pytest.mark.parametrize(
    ("name", "bubble"), [("zb-v", 0), ("v-half", 4 / 20), ("v-min", 8 / 32), ("dualpipev", 3 / 27)]
)
def test_v_shaped_schedules_have_the_formula_of_their_source(name: str, bubble: float) -> None:
    """Bubbles are 0, p / 2 and 2p / 3 microbatches beside 8, and (p - 1)(F + 2I - W) / 2 beside 8 (F + I + W)."""
    formula = find_formula(build(name, 4, 8))
    assert formula
    assert formula.bubble_fraction == pytest.approx(bubble)


def test_formula_names_its_source() -> None:
    formula = find_formula(build("zb-h1", 4, 8))
    assert formula
    assert formula.source == "Qi et al. 2024, Table 2"
    assert formula.bubble_fraction == pytest.approx(3 / 27)


def test_few_microbatches_have_the_formula_of_the_appendix() -> None:
    formula = find_formula(build("zb-h1", 4, 2))
    assert formula
    assert formula.source == "Qi et al. 2024, Appendix H"
    # (m+p-1)(F+I) + W = 11 of which 6 are work.
    assert formula.bubble_fraction == pytest.approx(5 / 11)


def test_schedule_of_a_file_has_no_formula() -> None:
    assert find_formula(schedule_from_csv("0F0,0B0\n", name="mine.csv")) is None
