"""ZB-V: no bubble between a rank's first action and its last, with 1F1B's activations, in a V (Qi et al. 2024).

Separate programs may go on to the next step at once. In one synchronous program the step ends with its last rank, which
starts p - 1 ticks late: a bubble of p - 1 ticks of one chunk remains, as in interleaved ZB-H1, which holds half as much
again. ("Zero Bubble Pipeline Parallelism", section 6; V-ZB of "Controllable Memory".)
"""

from functools import partial

from ..family import Family
from ..formula import v_shaped_bubble
from ..schedule import Schedule
from .building_block import WHOLE_BLOCK, build_from_block


def zb_v(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the schedule of two chunks a rank, in a V, that holds at most p microbatches on a rank.

    With F = I = W and m >= p it takes 6m + p - 1 ticks of one chunk.

    Raises:
        ScheduleError: a count is below 1.
    """
    return build_from_block(
        WHOLE_BLOCK,
        name="zb-v",
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        limit=2 * num_ranks,
    )


ZB_V = Family(
    name="zb-v",
    build=zb_v,
    chunks="two",
    placement="v",
    backward="split",
    peak_in_flight=lambda num_ranks, _chunks, _vocab: 2 * num_ranks,
    bubble=partial(
        v_shaped_bubble,
        idle=0,
        text="0",
        premise="the formula lets a rank begin the next step before others end this one",
    ),
)
