"""Simulate a schedule: its time, bubble and peak of microbatches in flight, under one of two clocks.

`lockstep` is one jitted program for all ranks, in which a tick lasts as long as its slowest rank. trellax runs this.
`async` is one program per rank, which waits only for the results that it needs. Megatron runs this. With a forward of
1 and a whole backward of 2, a tick in which rank 0 runs 0F1 and rank 1 runs 1B0:

    time          0    1    2    3
    lockstep      |0F1   .  |next        rank 0 waits for the slowest rank of the tick
                  |1B0 - - -|next
    async         |0F1 |0F2 |...         rank 0 goes on at once
                  |1B0 - - -|...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..meshes.arguments import check_choice, check_instance, check_number
from ..meshes.errors import ScheduleError
from .action import Action
from .check import needs
from .schedule import Schedule
from .stage_cost import StageCost

Clock = Literal["lockstep", "async"]
"""How ranks keep time: all in one program, tick by tick, or each in its own program."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """An action with its rank and the times at which it starts and ends."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The simulated times of a schedule, in the unit of the costs given.

    `makespan` is the time from the first start to the last end, `busy` each rank's working time, and `bubble_fraction`
    the idle share of all ranks' time. `peak_in_flight` is, for each rank, the most microbatches of a chunk that it
    holds at once, from a forward to the end of its backward.
    """

    clock: Clock
    makespan: float
    busy: tuple[float, ...]
    bubble_fraction: float
    peak_in_flight: tuple[int, ...]


def simulate(
    schedule: Schedule,
    *,
    clock: Clock = "lockstep",
    forward: float = 1.0,
    input_grad: float = 1.0,
    weight_grad: float = 1.0,
    transfer: float = 0.0,
    stages: Sequence[StageCost] | None = None,
    shared_loss: float = 0.0,
) -> Timing:
    """Simulate a schedule under a clock.

    >>> simulate(build_schedule("gpipe", num_ranks=2, num_microbatches=2)).makespan
    9.0

    Args:
        forward, input_grad, weight_grad: time of all layers of one rank for one microbatch; each of v chunks takes 1/v
            of it, and a whole backward the sum of both gradients.
        transfer: time of one send between neighbours; in lockstep every tick with a send takes this much longer.
        stages: time of every stage for one microbatch, in place of the three times above.
        shared_loss: time that all ranks spend together on the loss of a microbatch, after its last forward. It is for
            a vocabulary that is split over all ranks, under the lockstep clock only.

    Raises:
        ScheduleError: a time, the number of `stages` or the clock is wrong, or an async clock has a `shared_loss`.
    """
    stages = _stage_costs(schedule, stages, StageCost(forward=forward, input_grad=input_grad, weight_grad=weight_grad))
    spans = _run(schedule, clock, stages, transfer, shared_loss)
    busy = [schedule.num_microbatches * shared_loss] * schedule.num_ranks
    for span in spans:
        busy[span.rank] += span.end - span.start
    makespan = max(span.end for span in spans)
    return Timing(
        clock=clock,
        makespan=makespan,
        busy=tuple(busy),
        bubble_fraction=1 - sum(busy) / (schedule.num_ranks * makespan) if makespan else 0.0,
        peak_in_flight=_peak_in_flight(schedule),
    )


def time_actions(
    schedule: Schedule,
    *,
    clock: Clock = "lockstep",
    forward: float = 1.0,
    input_grad: float = 1.0,
    weight_grad: float = 1.0,
    transfer: float = 0.0,
    stages: Sequence[StageCost] | None = None,
    shared_loss: float = 0.0,
) -> tuple[Span, ...]:
    """Return the start and end of every action under a clock, for pictures and traces.

    Arguments and errors are those of `simulate`. A shared loss is not an action: it shows as a gap between spans.
    """
    stages = _stage_costs(schedule, stages, StageCost(forward=forward, input_grad=input_grad, weight_grad=weight_grad))
    return tuple(_run(schedule, clock, stages, transfer, shared_loss))


def _stage_costs(schedule: Schedule, stages: Sequence[StageCost] | None, rank: StageCost) -> Sequence[StageCost]:
    """Return the given times of the stages, or else equal ones: a rank's time divided by its number of chunks."""
    check_instance("schedule", schedule, Schedule, error=ScheduleError, fix="make it with build_schedule(...).")
    if stages is None:
        v = schedule.num_chunks
        chunk = StageCost(forward=rank.forward / v, input_grad=rank.input_grad / v, weight_grad=rank.weight_grad / v)
        return [chunk] * schedule.num_stages
    if len(stages) != schedule.num_stages:
        raise ScheduleError(
            f"schedule {schedule.name!r} of {schedule.num_ranks} ranks x {schedule.num_chunks} chunks has "
            f"{schedule.num_stages} stages, but the times of {len(stages)} are given.",
            fix=f"give {schedule.num_stages} of them, from the first stage to the last.",
        )
    for stage, cost in enumerate(stages):
        fix = "give StageCost(forward=..., input_grad=..., weight_grad=...)."
        check_instance(f"stages[{stage}]", cost, StageCost, error=ScheduleError, fix=fix)
    return stages


def _run(
    schedule: Schedule, clock: Clock, stages: Sequence[StageCost], transfer: float, shared_loss: float
) -> list[Span]:
    check_choice("clock", clock, get_args(Clock), error=ScheduleError)
    check_number("transfer", transfer, error=ScheduleError)
    check_number("shared_loss", shared_loss, error=ScheduleError)
    if clock == "lockstep":
        return _run_lockstep(schedule, stages, transfer, shared_loss)
    if shared_loss:
        raise ScheduleError(
            f"shared_loss={shared_loss:g} by the async clock: only one program for all ranks computes a loss together.",
            fix="use clock='lockstep', or leave shared_loss out.",
        )
    return _run_async(schedule, stages, transfer)


def count_messages(schedule: Schedule) -> int:
    """Return the number of activations and gradients that are sent between ranks in a step."""
    return len(schedule.messages())


def _run_lockstep(schedule: Schedule, stages: Sequence[StageCost], transfer: float, shared_loss: float) -> list[Span]:
    spans: list[Span] = []
    now = 0.0
    sends = {message.tick for message in schedule.messages()} if transfer else set()
    for tick, cells in enumerate(schedule.ticks):
        ends = [now] * schedule.num_ranks
        # The executor runs the first action of every rank's cell, then the second; only a shared loss makes them meet.
        for position in range(max(map(len, cells))):
            actions = [(rank, cell[position]) for rank, cell in enumerate(cells) if position < len(cell)]
            for rank, action in actions:
                end = ends[rank] + stages[action.stage].time_of(action.kind)
                spans.append(Span(rank=rank, action=action, start=ends[rank], end=end))
                ends[rank] = end
            if shared_loss and any(_is_last_forward(schedule, action) for _, action in actions):
                # The loss is a collective over all ranks, so ranks with a shorter action wait.
                ends = [max(ends) + shared_loss] * schedule.num_ranks
        # One collective permute ends the tick for all ranks, whether one or all of them send.
        now = max(ends) + (transfer if tick in sends else 0.0)
    return spans


def _is_last_forward(schedule: Schedule, action: Action) -> bool:
    return action.kind == "F" and action.stage == schedule.num_stages - 1


def _run_async(schedule: Schedule, stages: Sequence[StageCost], transfer: float) -> list[Span]:
    has_halves = any(action.kind == "I" for _, _, action in schedule.placed())
    # Each rank runs its actions in order, each as soon as it is free and the results of others have arrived.
    end_of: dict[Action, float] = {}
    free_at = [0.0] * schedule.num_ranks
    spans: list[Span] = []
    # In the order of the grid an action comes after everything it needs, so its end is known here.
    for _, rank, action in schedule.placed():
        start = free_at[rank]
        for needed in needs(action, num_stages=schedule.num_stages, has_halves=has_halves):
            hop = transfer if schedule.placement.rank_of(needed.stage) != rank else 0.0
            start = max(start, end_of[needed] + hop)
        free_at[rank] = end_of[action] = start + stages[action.stage].time_of(action.kind)
        spans.append(Span(rank=rank, action=action, start=start, end=free_at[rank]))
    return spans


def _peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    held, peak = [0] * schedule.num_ranks, [0] * schedule.num_ranks
    for _, rank, action in schedule.placed():
        # Held until the whole backward or the weight gradient: both halves read the residuals.
        held[rank] += {"F": 1, "I": 0, "W": -1, "B": -1}[action.kind]
        peak[rank] = max(peak[rank], held[rank])
    return tuple(peak)
