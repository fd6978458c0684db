"""A family says of its schedules what the schedules themselves show."""

import inspect
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.meshes import ScheduleError
from trellax.schedules import SCHEDULES, Family, Schedule, Vocab, build_schedule, simulate
from trellax.schedules.families.gpipe import gpipe
from trellax.schedules.family import Option

NAMES = tuple(SCHEDULES)
FIXED = tuple(name for name, family in SCHEDULES.items() if family.order == "fixed")


@pytest.mark.parametrize("name", NAMES)
def test_a_family_takes_what_its_builder_takes(name: str) -> None:
    family = SCHEDULES[name]
    parameters = inspect.signature(family.build).parameters
    # `auto` takes the times of the stages among the costs of `simulate`.
    known = {option for option in get_args(Option) if option in parameters or "costs" in parameters}
    assert family.takes == known


@pytest.mark.parametrize("name", FIXED)
def test_a_family_says_whether_backwards_are_split(name: str) -> None:
    family = SCHEDULES[name]
    schedule = build_schedule(name, num_ranks=3, num_microbatches=4, num_chunks=family.default_chunks)
    kinds = {action.kind for _, _, action in schedule.placed()}
    assert kinds == {"whole": {"F", "B"}, "split": {"F", "I", "W"}}[family.backward]


@settings(derandomize=True, deadline=None)
@given(
    name=st.sampled_from([name for name in FIXED if SCHEDULES[name].peak_in_flight]),
    ranks=st.integers(2, 6),
    groups=st.integers(1, 5),
    chunks=st.integers(2, 3),
    vocab=st.sampled_from(get_args(Vocab)),
)
def test_the_peak_of_a_family_is_that_of_its_schedules(
    *, name: str, ranks: int, groups: int, chunks: int, vocab: Vocab
) -> None:
    family, microbatches = SCHEDULES[name], groups * ranks
    num_chunks = chunks if family.chunks == "several" else family.default_chunks
    sizes = {"num_ranks": ranks, "num_microbatches": microbatches, "num_chunks": num_chunks}
    peak = max(simulate(build_schedule(name, **sizes, vocab=vocab)).peak_in_flight)
    formula = family.peak_in_flight
    most = microbatches if formula == "all" or formula is None else formula(ranks, num_chunks, vocab)
    assert peak == min(most, microbatches * num_chunks)


@pytest.mark.parametrize("name", NAMES)
def test_counterparts_name_each_other(name: str) -> None:
    family = SCHEDULES[name]
    if family.counterpart is not None:
        other = SCHEDULES[family.counterpart]
        assert other.counterpart == name
        assert {family.chunks, other.chunks} == {"one", "several"}


def test_a_family_of_ones_own_is_built_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*, num_ranks: int, num_microbatches: int) -> Schedule:
        return gpipe(num_ranks=num_ranks, num_microbatches=num_microbatches)

    monkeypatch.setitem(SCHEDULES, "mine", Family(name="mine", build=mine))
    sizes = {"num_ranks": 2, "num_microbatches": 3}
    assert build_schedule("mine", **sizes, vocab="split").ticks == gpipe(**sizes).ticks
    with pytest.raises(ScheduleError, match="schedule 'mine' has one chunk a rank, not 2"):
        build_schedule("mine", **sizes, num_chunks=2)


def test_a_family_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"family 'mine' has chunks='several' and takes \[\]"):
        Family(name="mine", build=gpipe, chunks="several")
