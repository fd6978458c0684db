"""V-Half: half of 1F1B's activations, in a V with split backwards ("Controllable Memory", Qi et al. 2024).

The first sweep and the third move a rank every two ticks, the other two every tick, so a microbatch lives half as long
again as in V-Min. The bubble is half of 1F1B's.
"""

from functools import partial

from ..family import Family
from ..formula import v_shaped_bubble
from ..schedule import Schedule
from .building_block import HALF_BLOCK, build_from_block


def v_half(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the schedule of two chunks a rank, in a V, that holds at most (p + 2) // 2 microbatches on a rank.

    With F = I = W and m >= p >= 2 it takes 6m + 3p - 4 ticks of one chunk, three fewer where p is even and above 2.

    Raises:
        ScheduleError: a count is below 1.
    """
    limit = peak_in_flight(num_ranks)
    return build_from_block(
        HALF_BLOCK, name="v-half", num_ranks=num_ranks, num_microbatches=num_microbatches, limit=limit
    )


def peak_in_flight(num_ranks: int) -> int:
    """Return the most microbatches of a chunk that a rank holds."""
    return 2 * ((num_ranks + 2) // 2)


V_HALF = Family(
    name="v-half",
    build=v_half,
    chunks="two",
    placement="v",
    backward="split",
    peak_in_flight=lambda num_ranks, _chunks, _vocab: peak_in_flight(num_ranks),
    bubble=partial(
        v_shaped_bubble,
        idle=1 / 2,
        text="p / (2m+p)",
        premise="the formula rounds the idle time up, to 3p ticks of a chunk",
    ),
)
