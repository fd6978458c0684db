"""GPipe: all forwards, then all backwards (Huang et al. 2019, section 2.3)."""

from functools import partial

from ..action import Action
from ..check import check_sizes
from ..family import Family
from ..formula import fill_drain_bubble
from ..schedule import Schedule


def gpipe(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the schedule that fills the pipeline with forwards, then drains it with backwards.

    In flight: every microbatch, on every rank. Bubble fraction: (p - 1) / (m + p - 1).

    Raises:
        ScheduleError: a count is below 1.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    # The last rank runs its last forward in tick m + p - 2 and its first backward in the tick after.
    first_backward = num_microbatches + num_ranks - 1
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for rank, ticks in enumerate(ticks_of):
        for microbatch in range(num_microbatches):
            forward, backward = microbatch + rank, first_backward + microbatch + num_ranks - 1 - rank
            ticks[forward] = [Action(stage=rank, kind="F", microbatch=microbatch)]
            ticks[backward] = [Action(stage=rank, kind="B", microbatch=microbatch)]
    return Schedule.from_ticks(ticks_of, name="gpipe", num_microbatches=num_microbatches)


GPIPE = Family(
    name="gpipe",
    build=gpipe,
    peak_in_flight="all",
    bubble=partial(fill_drain_bubble, text="(p-1) / (m+p-1)", source="Huang et al. 2019, section 2.3"),
)
