"""1F1B: each microbatch goes backward as soon as it can, so few are in flight (Narayanan et al. 2019, section 3.2).

In one synchronous program a tick lasts as long as its slowest rank, so a rank runs its forward and its backward in one
tick: a forward opposite another rank's backward would make both wait. Separate programs, one a rank, need fewer
microbatches in flight for the same speed; that order is here too, for the other clock.
"""

from typing import get_args

from ...meshes.arguments import check_choice
from ...meshes.errors import ScheduleError
from .action import Action, Kind
from .check import check_sizes
from .grid import Schedule
from .place import Vocab, check_vocab, schedule_from_orders
from .simulate import Clock


def one_f_one_b(*, num_ranks: int, num_microbatches: int, clock: Clock = "lockstep", vocab: Vocab = "ends") -> Schedule:
    """Return the schedule with forward k on rank r at tick k + r and its backward at tick k + 2(p - 1) - r.

    In flight on rank r: min(m, max(1, 2(p - 1 - r))) microbatches, whatever m is. Bubble fraction:
    (p - 1) / (m + p - 1). With a split vocabulary every backward comes a tick later, in the same time, with
    min(m, 2(p - 1 - r) + 1) in flight. For the `async` clock it is Megatron's order, with min(m, p - r) in flight.

    Raises:
        ScheduleError: a count is below 1, or a word is no choice.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    check_vocab(vocab)
    check_choice("clock", clock, get_args(Clock), error=ScheduleError)
    if clock == "async":
        orders = [_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
        return schedule_from_orders(orders, name="1f1b", num_microbatches=num_microbatches)
    delay = 1 if vocab == "split" else 0
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for rank, ticks in enumerate(ticks_of):
        for microbatch in range(num_microbatches):
            forward, backward = microbatch + rank, microbatch + 2 * (num_ranks - 1) - rank + delay
            ticks.setdefault(forward, []).append(Action(stage=rank, kind="F", microbatch=microbatch))
            ticks.setdefault(backward, []).append(Action(stage=rank, kind="B", microbatch=microbatch))
        # Backward first: it frees the buffer that the forward then fills. The last rank cannot where its backward
        # needs the forward of its own tick.
        order = "FB" if rank == num_ranks - 1 and not delay else "BF"
        for cell in ticks.values():
            cell.sort(key=lambda action, order=order: order.index(action.kind))
    return Schedule.from_ticks(ticks_of, name="1f1b", num_microbatches=num_microbatches)


def _order(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    def act(kind: Kind, microbatch: int) -> Action:
        return Action(stage=rank, kind=kind, microbatch=microbatch)

    warm_up = min(num_microbatches, num_ranks - 1 - rank)
    order = [act("F", k) for k in range(warm_up)]
    for k in range(num_microbatches):
        if warm_up + k < num_microbatches:
            order.append(act("F", warm_up + k))
        order.append(act("B", k))
    return order
