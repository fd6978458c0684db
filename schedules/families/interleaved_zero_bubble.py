"""Interleaved ZB-H1: several chunks per rank and split backwards, in ticks of one action.

Interleaving divides the bubble by the number of chunks, and weight gradients fill what is left of it. No paper has this
schedule in closed form; it is found by the greedy scheduler of `list_schedule.py`.
"""

from functools import partial

from ..check import check_sizes
from ..family import Family
from ..formula import split_backward_bubble
from ..schedule import Schedule
from .list_schedule import list_schedule


def interleaved_zb_h1(*, num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Build the schedule in which a rank runs a ready input gradient first, then a forward, then a weight gradient.

    Forwards come in the order of interleaved 1F1B, and a rank holds at most v p + p - 1 microbatches of a chunk. Bubble
    fraction: (p - 1) / (3 v m + p - 1) where F = I = W and p divides m.

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


INTERLEAVED_ZB_H1 = Family(
    name="interleaved-zb-h1",
    build=interleaved_zb_h1,
    takes=frozenset({"num_chunks"}),
    chunks="several",
    backward="split",
    bubble=partial(
        split_backward_bubble,
        text="(p-1)(F+I-W)/v / (m(F+I+W) + (p-1)(F+I-W)/v)",
        source="Qi et al. 2024, Table 2, with chunks as in Narayanan et al. 2021",
    ),
    counterpart="zb-h1",
)
