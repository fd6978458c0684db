"""V-Min: a third of 1F1B's activations, in a V with split backwards ("Controllable Memory", Qi et al. 2024).

Every sweep of the building block moves a rank a tick, the fastest that there is, so microbatches live shortest and a
rank holds fewest. The price is a bubble of about 4p ticks, a third more than V-Half's.
"""

from functools import partial

from ..family import Family
from ..formula import v_shaped_bubble
from ..schedule import Schedule
from .building_block import THIRD_BLOCK, build_from_block


def v_min(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the schedule of two chunks a rank, in a V, that holds at most (p + 4) // 3 microbatches on a rank.

    With F = I = W and m >= p >= 2 it takes 6m + 4p - 7 ticks of one chunk, two more where p = 3n + 1.

    Raises:
        ScheduleError: a count is below 1.
    """
    limit = peak_in_flight(num_ranks)
    return build_from_block(
        THIRD_BLOCK, name="v-min", num_ranks=num_ranks, num_microbatches=num_microbatches, limit=limit
    )


def peak_in_flight(num_ranks: int) -> int:
    """Return the most microbatches of a chunk that a rank holds."""
    return 2 * ((num_ranks + 4) // 3)


V_MIN = Family(
    name="v-min",
    build=v_min,
    chunks="two",
    placement="v",
    backward="split",
    peak_in_flight=lambda num_ranks, _chunks, _vocab: peak_in_flight(num_ranks),
    bubble=partial(
        v_shaped_bubble,
        idle=2 / 3,
        text="2p / (3m+2p)",
        premise="the formula rounds the idle time up, to 4p ticks of a chunk",
    ),
)
