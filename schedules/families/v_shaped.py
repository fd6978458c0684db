"""V-shaped schedules of a building block, split backwards and two chunks a rank: `zb-v`, `v-half` and `v-min`.

A rank holds all of 1F1B's activations, half or a third. The shorter a microbatch lives on a rank, the faster its four
sweeps along the ranks move, and the longer the ramps (m >= p, F = I = W, ticks of one chunk):

    name     ticks a rank, by sweep   microbatches in flight   ticks        from
    zb-v     4, 2, 4, 2               p                        6m + p - 1   "Zero Bubble Pipeline Parallelism", 6
    v-half   2, 1, 2, 1               (p + 2) // 2             6m + 3p - 4  "Controllable Memory", both Qi et al. 2024
    v-min    1, 1, 1, 1               (p + 4) // 3             6m + 4p - 7  the same

v-half takes three ticks fewer where p is even and above 2, v-min two more where p = 3n + 1. With zb-v and 2p - 1
microbatches or more no rank waits between its first action and its last, which is no bubble as the paper counts:
separate programs go on to the next step at once. In one synchronous program the step ends with its last rank, which
starts p - 1 ticks late, as in interleaved ZB-H1, which holds half as much again.
"""

from collections.abc import Callable
from functools import partial

from ..family import Family
from ..formula import v_shaped_bubble
from ..schedule import Schedule
from .building_block import HALF_BLOCK, THIRD_BLOCK, WHOLE_BLOCK, Block, build_from_block
from .zero_bubble_v import build_steady


def _family(name: str, block: Block, limit: Callable[[int], int], *, idle: float, text: str, premise: str) -> Family:
    """Return a family whose ranks hold at most `limit` microbatches, by number of ranks; the rest is its bubble."""

    def build(*, num_ranks: int, num_microbatches: int) -> Schedule:
        sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
        if block is WHOLE_BLOCK and num_microbatches >= 2 * num_ranks - 1:
            return build_steady(name=name, **sizes)
        return build_from_block(block, name=name, **sizes, limit=chunks_in_flight(num_ranks))

    def chunks_in_flight(num_ranks: int, *_: object) -> int:
        return 2 * limit(num_ranks)

    return Family(
        name=name,
        build=build,
        chunks="two",
        placement="v",
        backward="split",
        peak_in_flight=chunks_in_flight,
        bubble=partial(v_shaped_bubble, idle=idle, text=text, premise=premise),
    )


ZB_V = _family(
    "zb-v",
    WHOLE_BLOCK,
    lambda num_ranks: num_ranks,
    idle=0,
    text="0",
    premise="the formula lets a rank begin the next step before others end this one",
)

V_HALF = _family(
    "v-half",
    HALF_BLOCK,
    lambda num_ranks: (num_ranks + 2) // 2,
    idle=1 / 2,
    text="p / (2m+p)",
    premise="the formula rounds the idle time up, to 3p ticks of a chunk",
)

V_MIN = _family(
    "v-min",
    THIRD_BLOCK,
    lambda num_ranks: (num_ranks + 4) // 3,
    idle=2 / 3,
    text="2p / (3m+2p)",
    premise="the formula rounds the idle time up, to 4p ticks of a chunk",
)
