"""Whole weights of chunks are in the slot that an action reads, and are gathered as seldom as the slots allow."""

from hypothesis import given
from hypothesis import strategies as st
from trellax.pipeline import lower
from trellax.pipeline.lowering.tables import IDLE, NONE
from trellax.schedules import Schedule, build_schedule

from ..pipeline.lowering.random_schedules import paired_schedules
from ..pipeline.lowering.test_lower import ANY_SCHEDULE, every_schedule


def gathers_of(schedule: Schedule, *, overlap: bool = False) -> tuple[int, list[int]]:
    """Check every turn of every rank; return the slots, and how often each rank gathers."""
    tables = lower(schedule, overlap=overlap, gathers="chunks")
    columns, compute = tables.turns.weights, tables.turns.compute
    assert columns is not None
    for rank in range(schedule.num_ranks):
        held: dict[int, int] = {}
        for turn in range(tables.num_turns):
            gather, read = int(columns.gather[turn, rank]), int(columns.read[turn, rank])
            if compute.kind[turn, rank] == IDLE:
                assert gather == read == NONE
                continue
            chunk = int(compute.chunk[turn, rank])
            if gather != NONE:
                assert chunk not in held.values()
                held[gather] = chunk
            assert held[read] == chunk
        assert max(held) < tables.num_weight_slots <= schedule.num_chunks
    return tables.num_weight_slots, (columns.gather != NONE).sum(axis=0).tolist()


def least_recently_used(schedule: Schedule, *, rank: int, num_slots: int) -> int:
    """Count the gathers of a rank that gives up the slot it has not used for longest."""
    held: list[int] = []
    count = 0
    for action in (action for _, own, action in schedule.placed() if own == rank):
        chunk = schedule.placement.chunk_of(action.stage)
        count += chunk not in held
        held = [*(own for own in held if own != chunk), chunk][-num_slots:]
    return count


@every_schedule
@given(ANY_SCHEDULE)
def test_every_action_finds_its_chunk(schedule: Schedule) -> None:
    slots, counts = gathers_of(schedule)
    for rank, count in enumerate(counts):
        assert count <= least_recently_used(schedule, rank=rank, num_slots=slots)


@every_schedule
@given(paired_schedules(), st.booleans())
def test_every_action_finds_its_chunk_where_forwards_come_first(schedule: Schedule, overlap: bool) -> None:
    gathers_of(schedule, overlap=overlap)


def test_interleaved_chunks_are_gathered_for_each_run() -> None:
    def counts(num_chunks: int, num_microbatches: int) -> tuple[int, set[int]]:
        sizes = {"num_ranks": 4, "num_chunks": num_chunks, "num_microbatches": num_microbatches}
        slots, gathers = gathers_of(build_schedule("interleaved-1f1b", **sizes))
        return slots, set(gathers)

    # Two chunks are both at work all the time; of four, 64 and 128 actions, two.
    assert counts(2, 16) == (2, {2})
    assert counts(4, 8) == (2, {10})
    assert counts(4, 16) == (2, {18})


def test_a_single_chunk_is_gathered_once() -> None:
    for name in ("1f1b", "gpipe", "zb-h1"):
        assert gathers_of(build_schedule(name, num_ranks=4, num_microbatches=8)) == (1, [1] * 4)
