"""Interleaved ZB-H1: chunks and halves together, in ticks of one action."""

from .check import check_sizes
from .grid import Schedule
from .list_schedule import list_schedule


def interleaved_zb_h1(*, num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Return the schedule in which every rank runs an input gradient if it can, else a forward, else a weight gradient.

    Forwards come in the order of interleaved 1F1B; a rank holds at most p x v + p - 1 microbatches of chunks. Bubble
    fraction: (p - 1) / (3 v m + p - 1) where p divides m.

    Raises:
        ScheduleError: a count is below 1.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    return list_schedule(
        name="interleaved-zb-h1",
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_chunks=num_chunks,
        limit=num_ranks * num_chunks + num_ranks - 1,
    )
