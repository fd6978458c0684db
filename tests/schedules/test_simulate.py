"""Bubbles and peaks that follow from the grid equal the formulas of the papers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.schedules import Schedule, build_schedule, simulate

from .sizes import named_schedules

RANKS = st.integers(1, 8)
CHUNKS = st.integers(2, 4)
MICROBATCHES = st.integers(1, 32)
COST = st.sampled_from((0.5, 1.0, 2.0, 3.0))

every_size = settings(derandomize=True, deadline=None)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def idle_over_work(schedule: Schedule) -> float:
    timing = simulate(schedule)
    work = sum(timing.busy)
    return (schedule.num_ranks * timing.makespan - work) / work


@every_size
@given(name=st.sampled_from(("gpipe", "1f1b")), p=RANKS, m=MICROBATCHES, i=COST, w=COST)
def test_gpipe_and_1f1b_have_the_textbook_bubble(name: str, p: int, m: int, i: float, w: float) -> None:
    schedule = build_schedule(name, num_ranks=p, num_microbatches=m)
    timing = simulate(schedule, input_grad=i, weight_grad=w)
    assert timing.bubble_fraction == near((p - 1) / (m + p - 1))


@every_size
@given(p=RANKS, m=MICROBATCHES, i=COST, w=COST)
def test_1f1b_of_separate_programs_has_the_textbook_bubble(p: int, m: int, i: float, w: float) -> None:
    schedule = build_schedule("1f1b", num_ranks=p, num_microbatches=m, clock="async")
    timing = simulate(schedule, clock="async", input_grad=i, weight_grad=w)
    assert timing.bubble_fraction == near((p - 1) / (m + p - 1))


@every_size
@given(p=RANKS, m=MICROBATCHES, i=COST, w=COST)
def test_naive_leaves_all_but_one_rank_idle(p: int, m: int, i: float, w: float) -> None:
    schedule = build_schedule("naive", num_ranks=p, num_microbatches=m)
    assert simulate(schedule, input_grad=i, weight_grad=w).bubble_fraction == near((p - 1) / p)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_four_ranks_idle_for_three_of_32_microbatches(name: str) -> None:
    schedule = build_schedule(name, num_ranks=4, num_microbatches=32)
    assert idle_over_work(schedule) == near(3 / 32)


@every_size
@given(name=st.sampled_from(("gpipe", "1f1b")), p=RANKS, m=MICROBATCHES)
def test_gpipe_and_1f1b_idle_for_p_minus_1_microbatches(name: str, p: int, m: int) -> None:
    schedule = build_schedule(name, num_ranks=p, num_microbatches=m)
    assert idle_over_work(schedule) == near((p - 1) / m)


@every_size
@given(p=RANKS, v=CHUNKS, groups=st.integers(1, 4), i=COST, w=COST)
def test_chunks_divide_the_bubble_of_1f1b(p: int, v: int, groups: int, i: float, w: float) -> None:
    m = groups * p
    schedule = build_schedule("interleaved-1f1b", num_ranks=p, num_microbatches=m, num_chunks=v)
    assert simulate(schedule, input_grad=i, weight_grad=w).bubble_fraction == near((p - 1) / (v * m + p - 1))


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_halves_fill_two_thirds_of_the_bubble_of_1f1b(p: int, m: int) -> None:
    schedule = build_schedule("zb-h1", num_ranks=p, num_microbatches=m)
    # Fewer microbatches than ranks have fewer weight gradients to fill it with (Qi et al. 2024, Appendix H).
    idle = p - 1 if m >= p else 2 * (p - 1) - (m - 1)
    assert simulate(schedule).bubble_fraction == near(idle / (3 * m + idle))


@every_size
@given(p=RANKS, v=CHUNKS, groups=st.integers(1, 4))
def test_chunks_divide_the_bubble_of_zb_h1(p: int, v: int, groups: int) -> None:
    m = groups * p
    schedule = build_schedule("interleaved-zb-h1", num_ranks=p, num_microbatches=m, num_chunks=v)
    assert simulate(schedule).bubble_fraction == near((p - 1) / (3 * v * m + p - 1))


@every_size
@given(schedule=named_schedules(), clock=st.sampled_from(("lockstep", "async")), i=COST, w=COST)
def test_every_rank_is_busy_for_all_microbatches(schedule: Schedule, clock: str, i: float, w: float) -> None:
    timing = simulate(schedule, clock="async" if clock == "async" else "lockstep", input_grad=i, weight_grad=w)
    assert timing.busy == (near(schedule.num_microbatches * (1 + i + w)),) * schedule.num_ranks


@every_size
@given(schedule=named_schedules(), i=COST, w=COST, transfer=st.sampled_from((0.0, 0.25)))
def test_separate_programs_are_never_slower_than_lockstep(
    schedule: Schedule, i: float, w: float, transfer: float
) -> None:
    costs = {"input_grad": i, "weight_grad": w, "transfer": transfer}
    lockstep, separate = simulate(schedule, **costs), simulate(schedule, clock="async", **costs)
    assert separate.makespan <= lockstep.makespan * (1 + 1e-12)


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_naive_holds_one_microbatch(p: int, m: int) -> None:
    schedule = build_schedule("naive", num_ranks=p, num_microbatches=m)
    assert simulate(schedule).peak_in_flight == (1,) * p


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_gpipe_holds_every_microbatch(p: int, m: int) -> None:
    schedule = build_schedule("gpipe", num_ranks=p, num_microbatches=m)
    assert simulate(schedule).peak_in_flight == (m,) * p


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_1f1b_holds_no_more_than_the_round_trip_to_the_last_rank(p: int, m: int) -> None:
    schedule = build_schedule("1f1b", num_ranks=p, num_microbatches=m)
    expected = tuple(min(m, max(1, 2 * (p - 1 - rank))) for rank in range(p))
    assert simulate(schedule).peak_in_flight == expected


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_1f1b_of_separate_programs_holds_as_many_as_ranks_follow(p: int, m: int) -> None:
    schedule = build_schedule("1f1b", num_ranks=p, num_microbatches=m, clock="async")
    assert simulate(schedule, clock="async").peak_in_flight == tuple(min(m, p - rank) for rank in range(p))


@every_size
@given(p=RANKS, m=MICROBATCHES)
def test_zb_h1_holds_as_many_microbatches_as_ranks(p: int, m: int) -> None:
    schedule = build_schedule("zb-h1", num_ranks=p, num_microbatches=m)
    assert simulate(schedule).peak_in_flight == (min(m, p),) * p


@every_size
@given(p=RANKS, m=MICROBATCHES, v=CHUNKS)
def test_interleaved_1f1b_holds_no_more_than_the_round_trip_to_the_last_rank(p: int, m: int, v: int) -> None:
    schedule = build_schedule("interleaved-1f1b", num_ranks=p, num_microbatches=m, num_chunks=v)
    bounds = [min(m * v, v * p + p - 2 - 2 * rank + (rank == p - 1)) for rank in range(p)]
    peaks = simulate(schedule).peak_in_flight
    assert [peak <= bound for peak, bound in zip(peaks, bounds, strict=True)] == [True] * p
    if m % p == 0:
        assert list(peaks) == bounds


@every_size
@given(p=RANKS, m=MICROBATCHES, v=CHUNKS)
def test_interleaved_zb_h1_holds_no_more_than_a_round_of_chunks(p: int, m: int, v: int) -> None:
    schedule = build_schedule("interleaved-zb-h1", num_ranks=p, num_microbatches=m, num_chunks=v)
    assert max(simulate(schedule).peak_in_flight) <= min(m * v, p * v + p - 1)


def test_tick_lasts_as_long_as_its_slowest_rank() -> None:
    schedule = Schedule.parse("0F0 . 0B0; . 1F0+1B0 .", name="mine", num_microbatches=1)
    assert simulate(schedule, input_grad=1.0, weight_grad=2.0).makespan == near(1 + 4 + 3)


def test_separate_programs_wait_for_what_they_need_alone() -> None:
    schedule = Schedule.parse("0F0 . 0I0 0W0; . 1F0+1I0 1W0 .", name="mine", num_microbatches=1)
    costs = {"forward": 2.0, "input_grad": 3.0, "weight_grad": 5.0, "transfer": 0.5}
    # Forward, hop, forward, input gradient, hop, input gradient, weight gradient.
    assert simulate(schedule, clock="async", **costs).makespan == near(2 + 0.5 + 2 + 3 + 0.5 + 3 + 5)


def test_lockstep_pays_a_transfer_in_ticks_with_a_hop() -> None:
    schedule = Schedule.parse("0F0 . 0I0 0W0; . 1F0+1I0 1W0 .", name="mine", num_microbatches=1)
    costs = {"forward": 2.0, "input_grad": 3.0, "weight_grad": 5.0, "transfer": 0.5}
    assert simulate(schedule, **costs).makespan == near((2 + 0.5) + (2 + 3 + 0.5) + 5 + 5)


def test_chunk_costs_its_share_of_the_rank() -> None:
    text = "0F0 . 2F0 . . 2B0 . 0B0; . 1F0 . 3F0 3B0 . 1B0 ."
    schedule = Schedule.parse(text, name="looped", num_microbatches=1, num_chunks=2)
    assert simulate(schedule).busy == (near(3.0), near(3.0))
