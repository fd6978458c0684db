"""The best schedule we can find for given costs and memory: every named one, and what a list scheduler makes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal

from ...meshes.arguments import check_count
from ...meshes.errors import ScheduleError
from .action import Kind
from .check import check_sizes
from .gpipe import gpipe
from .grid import Schedule
from .interleaved import interleaved_1f1b
from .interleaved_zero_bubble import interleaved_zb_h1
from .list_schedule import list_schedule
from .naive import naive
from .one_f_one_b import one_f_one_b
from .place import Vocab
from .simulate import Clock, simulate
from .zero_bubble import zb_h1

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
    """Return the schedule of least makespan by a clock that holds at most `max_in_flight` microbatches on any rank.

    It is never worse than the named schedules of as many chunks under the same limit; of equals, the one that holds
    less.

    Args:
        max_in_flight: limit in whole microbatches; a microbatch of one of v chunks counts 1/v. None is no limit.
        costs: those of `simulate`, from `forward` to `stages`.

    Raises:
        ScheduleError: a count is below 1, or nothing runs under the limit.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    if max_in_flight is not None:
        check_count("max_in_flight", max_in_flight, error=ScheduleError)
    limit = num_microbatches if max_in_flight is None else max_in_flight
    ranked = []
    for schedule in _candidates(num_ranks, num_microbatches, num_chunks, limit, clock=clock, vocab=vocab):
        timing = simulate(schedule, clock=clock, **costs)
        held = max(timing.peak_in_flight)
        if held <= limit * num_chunks:
            ranked.append((timing.makespan, held, schedule))
    if not ranked:
        raise ScheduleError(
            f"no schedule of {num_ranks} ranks x {num_chunks} chunks and {num_microbatches} microbatches holds at most "
            f"{limit} in flight.",
            fix="allow more in flight, or use fewer chunks.",
        )
    return replace(min(ranked, key=lambda entry: entry[:2])[2], name="auto")


def _candidates(
    num_ranks: int, num_microbatches: int, num_chunks: int, limit: int, *, clock: Clock, vocab: Vocab
) -> Iterator[Schedule]:
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
    named: list[Callable[..., Schedule]] = [partial(interleaved_1f1b, vocab=vocab), interleaved_zb_h1]
    if num_chunks > 1:
        sizes["num_chunks"] = num_chunks
    else:
        named = [naive, gpipe, partial(one_f_one_b, clock=clock, vocab=vocab), partial(zb_h1, vocab=vocab)]
    for build in named:
        yield build(**sizes)
    most = limit * num_chunks
    limits = sorted({min(most, num_ranks * num_chunks + num_ranks - 1), most})
    for size, priority, group in product(limits, _PRIORITIES, _GROUPS):
        try:
            yield list_schedule(name="auto", limit=size, priority=priority, group=group, **sizes)
        except ScheduleError:
            continue  # These forwards fill a rank with what cannot finish under the limit.
