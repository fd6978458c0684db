"""Time a schedule in lockstep for many costs of its stages: ticks that cost the same are counted once.

`simulate` walks every action of a schedule, and a search asks for the time of one schedule with the costs of hundreds
of layouts. A tick lasts as long as its slowest rank, so all that counts of it is which actions it has, and stages of
equal cost are one kind:

    rank 0 | 0F2 0F3 0B0 ...         middle ticks: {F of a stage, B of a stage}  x 27, and so on
    rank 1 | 1F1 1B0 1F2 ...

Read `pipeline_time.py` next.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...schedules import Kind, Schedule, StageCost

Cell = tuple[tuple[int, Kind], ...]
"""Actions of one rank in a tick, one after another: a stage of that cost, and the kind of action."""


@dataclass(frozen=True)
class Tick:
    """Different cells of a tick, the places in them after which the loss of a microbatch follows, and if it sends."""

    cells: frozenset[Cell]
    losses: tuple[int, ...]
    sends: bool


TickCounts = tuple[tuple[Tick, int], ...]
"""The different ticks of a schedule, each with how often it occurs."""


def count_ticks(schedule: Schedule, *, alike: Sequence[int]) -> TickCounts:
    """Return the different ticks of a schedule and how often each occurs.

    Args:
        alike: for each stage the first stage with the same cost.
    """
    senders = {message.tick for message in schedule.messages()}
    last = schedule.num_stages - 1
    found: Counter[Tick] = Counter()
    for number, ranks in enumerate(schedule.ticks):
        cells = frozenset(tuple((alike[action.stage], action.kind) for action in cell) for cell in ranks)
        losses = {
            place for cell in ranks for place, action in enumerate(cell) if action.kind == "F" and action.stage == last
        }
        found[Tick(cells, tuple(sorted(losses)), number in senders)] += 1
    return tuple(found.items())


def lockstep_time_s(
    ticks: TickCounts, *, stages: Sequence[StageCost], transfer: float = 0.0, shared_loss: float = 0.0
) -> float:
    """Return the makespan that `simulate` has by the lockstep clock; arguments are those of `simulate`."""
    return sum(count * _tick_s(tick, stages, transfer, shared_loss) for tick, count in ticks)


def _tick_s(tick: Tick, stages: Sequence[StageCost], transfer: float, shared_loss: float) -> float:
    """Return how long a tick lasts: its slowest rank, the losses at which all ranks meet, and one send."""
    ends = dict.fromkeys(tick.cells, 0.0)
    for place in range(max(map(len, tick.cells))):
        for cell in ends:
            if place < len(cell):
                stage, kind = cell[place]
                ends[cell] += stages[stage].time_of(kind)
        if shared_loss and place in tick.losses:
            ends = dict.fromkeys(ends, max(ends.values()) + shared_loss)
    return max(ends.values()) + (transfer if tick.sends else 0.0)
