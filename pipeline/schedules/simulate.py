"""How long a schedule takes and how much it holds, from the grid alone.

The clock is `lockstep`: one jitted program, in which a tick lasts as long as its slowest rank.
"""

from dataclasses import dataclass

from .grid import Schedule


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a schedule costs, in units of one rank's forward of one microbatch.

    `busy` is each rank's working time; `bubble_fraction` the share of all ranks' time that is idle;
    `peak_in_flight` the most microbatches that each rank holds between their forward and backward.
    """

    makespan: float
    busy: tuple[float, ...]
    bubble_fraction: float
    peak_in_flight: tuple[int, ...]


def simulate(schedule: Schedule, *, forward: float = 1.0, backward: float = 2.0) -> Timing:
    """Return the timing of a schedule in which a rank's forward and backward of one microbatch cost so much.

    A chunk of v costs 1/v of its rank's whole.
    """
    cost = {"F": forward / schedule.num_chunks, "B": backward / schedule.num_chunks}
    busy = [0.0] * schedule.num_ranks
    makespan = 0.0
    for cells in schedule.ticks:
        work = [sum(cost[action.kind] for action in cell) for cell in cells]
        makespan += max(work)
        busy = [total + share for total, share in zip(busy, work, strict=True)]
    return Timing(
        makespan=makespan,
        busy=tuple(busy),
        bubble_fraction=1 - sum(busy) / (schedule.num_ranks * makespan),
        peak_in_flight=_peak_in_flight(schedule),
    )


def _peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    held, peak = [0] * schedule.num_ranks, [0] * schedule.num_ranks
    for _, rank, action in schedule.placed():
        held[rank] += 1 if action.kind == "F" else -1
        peak[rank] = max(peak[rank], held[rank])
    return tuple(peak)
