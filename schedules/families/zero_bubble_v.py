"""The order of `zb-v` for many microbatches: from its first action to its last no rank waits (F = I = W).

Rank r of p, with F, I and W of chunk 0 in capitals and of chunk 1 in small letters, 3 ranks, 5 microbatches:

    fill     2(p-r) - 1 times F     rank 0 | F F F F F f i w f i w f i w I W f i w I W f i w I W I W I W . .
             r times       f F      rank 1 | . F F F f F f i w f i w F I W f i w I W f i w I i I W I W w W .
             p - r times   f i w    rank 2 | . . F f F f F f i w F I W f i w F I W f i w I i I i I W w w W W
    steady   F I W f i w, while there are any
    drain    r times       I i
             p - r times   I W, then the weight gradients that are left

Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 6; the order is that of PyTorch's schedule of that name. A
rank holds 2 p microbatches of a chunk at most, fewer on later ranks before the drain.
"""

from collections import Counter
from collections.abc import Iterator

from ..action import Action, Kind
from ..orders import fill_ticks
from ..placement import Placement
from ..schedule import Schedule

Step = tuple[int, Kind]
"""A chunk and a kind; its microbatch is the next that the rank has not done."""

_FORWARDS: tuple[Step, ...] = ((1, "F"), (0, "F"))
_THERE: tuple[Step, ...] = ((0, "F"), (0, "I"), (0, "W"))
_BACK: tuple[Step, ...] = ((1, "F"), (1, "I"), (1, "W"))
_GRADIENTS: tuple[Step, ...] = ((0, "I"), (1, "I"))


def build_steady(*, name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the schedule, for at least 2 p - 1 microbatches: with fewer it runs, but ranks wait."""
    placement = Placement.of("v", num_ranks=num_ranks, num_chunks=2)
    orders = []
    for rank in range(num_ranks):
        stages, done = placement.stages_of(rank), Counter[Step]()
        own = []
        for step in _steps(num_ranks, rank, num_microbatches=num_microbatches):
            if (microbatch := done[step]) < num_microbatches:
                own.append(Action(stage=stages[step[0]], kind=step[1], microbatch=microbatch))
                done[step] += 1
        orders.append(own)
    return Schedule(
        name=name,
        num_ranks=num_ranks,
        num_chunks=2,
        placement=placement,
        num_microbatches=num_microbatches,
        ticks=fill_ticks(orders, width=1, num_chunks=2, name=name),
    )


def _steps(num_ranks: int, rank: int, *, num_microbatches: int) -> Iterator[Step]:
    """Yield the steps of a rank in order, and at the ends some that have no microbatch left."""
    later = num_ranks - rank
    yield from _THERE[:1] * (2 * later - 1)
    yield from _FORWARDS * rank
    yield from _BACK * later
    yield from (*_THERE, *_BACK) * (num_microbatches - num_ranks)
    yield from _GRADIENTS * rank
    yield from _THERE[1:] * later
    yield from _BACK[2:] * num_microbatches
    yield from _THERE[2:] * num_microbatches
