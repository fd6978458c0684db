"""`auto`: the fastest schedule found for given stage times and a limit of microbatches in flight.

The candidates are every family of fixed order, list schedules with several limits, priorities and groupings, and with
two chunks a rank V-shaped schedules that fill the limit. Both placements are tried, so the placement is known only when
the schedule is: `schedule.placement`.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Literal

from ...meshes.arguments import check_count
from ...meshes.errors import ScheduleError
from ..action import Kind
from ..check import check_sizes
from ..family import Family
from ..schedule import Schedule
from ..simulate import Clock, count_messages, simulate
from ..vocab import Vocab
from .building_block import HALF_BLOCK, THIRD_BLOCK, TWO_THIRDS_BLOCK, build_from_block
from .fixed import FIXED
from .list_schedule import list_schedule

_PRIORITIES: tuple[tuple[Kind, ...], ...] = (("I", "F", "W"), ("I", "W", "F"), ("F", "I", "W"))
_GROUPS: tuple[Literal["ranks", "one"], ...] = ("ranks", "one")


def auto(
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 1,
    max_in_flight: int | None = None,
    clock: Clock = "lockstep",
    vocab: Vocab = "ends",
    **costs: Any,
) -> Schedule:
    """Search for the schedule of least makespan that holds at most `max_in_flight` microbatches on any rank.

    It is never slower than the families of fixed order with as many chunks under the same limit. Of equally fast ones
    it is the one that holds fewest microbatches, then the one that sends fewest messages. Two chunks may be in a V.

    Args:
        max_in_flight: limit in whole microbatches; a microbatch of one of v chunks counts 1/v. None is no limit.
        costs: times as in `simulate`, from `forward` to `stages`.

    Raises:
        ScheduleError: a count is below 1, or no schedule keeps the limit.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    if max_in_flight is not None:
        check_count("max_in_flight", max_in_flight, error=ScheduleError)
    limit = num_microbatches if max_in_flight is None else max_in_flight
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches, "num_chunks": num_chunks}
    ranked = []
    for schedule in _list_candidates(sizes, limit=limit, clock=clock, vocab=vocab):
        timing = simulate(schedule, clock=clock, **costs)
        held = max(timing.peak_in_flight)
        if held <= limit * num_chunks:
            ranked.append((timing.makespan, held, count_messages(schedule), schedule))
    if not ranked:
        raise ScheduleError(
            f"no schedule of {num_ranks} ranks x {num_chunks} chunks and {num_microbatches} microbatches holds at most "
            f"{limit} in flight.",
            fix="allow more in flight, or use fewer chunks.",
        )
    return replace(min(ranked, key=lambda entry: entry[:3])[3], name="auto")


def _list_candidates(sizes: dict[str, int], *, limit: int, clock: Clock, vocab: Vocab) -> Iterator[Schedule]:
    yield from _build_fixed(sizes, clock=clock, vocab=vocab)
    yield from _repeat_blocks(sizes, limit=limit)
    yield from _search_lists(sizes, limit=limit)


def _repeat_blocks(sizes: dict[str, int], *, limit: int) -> Iterator[Schedule]:
    """Yield V-shaped schedules that use all of the limit to fill their ramps, for two chunks a rank."""
    if sizes["num_chunks"] != 2:
        return
    num_ranks, num_microbatches = sizes["num_ranks"], sizes["num_microbatches"]
    # In microbatches of a chunk. With 2p of them the bubble is the least that there is.
    most = 2 * min(limit, num_ranks)
    for block in (THIRD_BLOCK, HALF_BLOCK, TWO_THIRDS_BLOCK):
        try:
            yield build_from_block(
                block, name="auto", num_ranks=num_ranks, num_microbatches=num_microbatches, limit=most
            )
        except ScheduleError:
            # Microbatches live too long in this block for the limit.
            continue


def _build_fixed(sizes: dict[str, int], *, clock: Clock, vocab: Vocab) -> Iterator[Schedule]:
    given: dict[str, Any] = {**sizes, "clock": clock, "vocab": vocab}
    for family in FIXED:
        if family.allows_chunks(sizes["num_chunks"]):
            yield family(**family.accepted(given))


def _search_lists(sizes: dict[str, int], *, limit: int) -> Iterator[Schedule]:
    """Yield list schedules that hold at most the limit, and those that hold no more than a full pipeline needs."""
    num_ranks, num_chunks = sizes["num_ranks"], sizes["num_chunks"]
    # In microbatches of a chunk. v p + p - 1 of them keep the pipeline full (`interleaved_zero_bubble.py`).
    most = limit * num_chunks
    limits = sorted({min(most, num_ranks * num_chunks + num_ranks - 1), most})
    for size, priority, group in product(limits, _PRIORITIES, _GROUPS):
        try:
            yield list_schedule(name="auto", limit=size, priority=priority, group=group, **sizes)
        except ScheduleError:
            # Forwards in this order fill a rank with microbatches that cannot finish under the limit.
            continue


AUTO = Family(
    name="auto",
    build=auto,
    takes=frozenset({"num_chunks", "clock", "vocab", "max_in_flight", "stages"}),
    chunks="any",
    placement="searched",
    backward="either",
    order="searched",
)
