"""Experts split over context ranks, and over ranks of data x context, equal one device."""

import pytest

from .test_context import Case, found_in

CASES = (Case(mesh="context_expert=2,tensor=2,pipe=2", experts="on", sequence="on", packed="on"),)

MORE_CASES = (
    Case(mesh="context_expert=2", experts="on"),
    Case(mesh="context_expert=4,pipe=2", experts="on", schedule="zb-h1", window=5, packed="on", remat="dots"),
    Case(mesh="context=2,context_expert=4", experts="on", num_microbatches=1, packed="on"),
    Case(mesh="context=2,context_expert=2,pipe=2", experts="on", shard="chunk", schedule="zb-v", num_chunks=2),
    Case(mesh="context=2,context_expert=2,tensor=2", experts="on", context="gather-once", shard="step", remat="full"),
    Case(mesh="data=2,context_expert=2,pipe=2", experts="on", shard="layer", schedule="interleaved-1f1b", num_chunks=2),
    Case(mesh="data=2,context_expert=4", experts="on", context="ulysses", packed="on", remat="dots"),
    Case(mesh="expert=2,context_expert=2,pipe=2", experts="on", schedule="zb-h1", packed="on", remat="full"),
    Case(mesh="expert=2,context_expert=2,tensor=2", experts="on", sequence="on", shard="layer", vocab="split"),
    Case(mesh="expert=2,context=2,context_expert=2", experts="on", shard="step", window=4),
    Case(mesh="ranks=2:context_expert,dp=2:batch,pp=2:pipe", experts="on", shard="layer"),
)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_experts_over_context_ranks_equal_one_device(case: Case) -> None:
    assert found_in(case) == {}
