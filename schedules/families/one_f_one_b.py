"""1F1B: each microbatch runs backward as soon as it can, so few are in flight (Narayanan et al. 2019, section 3.2).

    rank 0 | 0F0 0F1     0F2     0F3     0B0     0B1 0B2 0B3
    rank 1 |   . 1F0     1F1 1B0+1F2 1B1+1F3     1B2 1B3   .
    rank 2 |   .   . 2F0+2B0 2F1+2B1 2F2+2B2 2F3+2B3   .   .

In one synchronous program a tick lasts as long as its slowest rank. With a forward on one rank and a backward on
another the first would wait, so here a rank runs a forward and a backward in the same tick. Separate programs, one per
rank, reach the same speed with fewer microbatches in flight; the `async` clock selects that order.
"""

from functools import partial
from typing import get_args

from ...meshes.arguments import check_choice
from ...meshes.errors import ScheduleError
from ..action import Action, Kind
from ..check import check_sizes
from ..family import Family
from ..formula import fill_drain_bubble
from ..orders import schedule_from_orders
from ..schedule import Schedule
from ..simulate import Clock
from ..vocab import Vocab, backward_delay, check_vocab


def one_f_one_b(*, num_ranks: int, num_microbatches: int, clock: Clock = "lockstep", vocab: Vocab = "ends") -> Schedule:
    """Build the schedule with forward k on rank r at tick k + r and its backward at tick k + 2(p - 1) - r.

    In flight on rank r: min(m, max(1, 2(p - 1 - r))) microbatches. Bubble fraction: (p - 1) / (m + p - 1). With a split
    vocabulary every backward comes one tick later, in the same total time, with min(m, 2(p - 1 - r) + 1) in flight.
    For the `async` clock the order is Megatron's, with min(m, p - r) in flight.

    Raises:
        ScheduleError: a count is below 1, or `clock` or `vocab` is unknown.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    check_vocab(vocab)
    check_choice("clock", clock, get_args(Clock), error=ScheduleError)
    if clock == "async":
        orders = [_order_of_rank(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
        return schedule_from_orders(orders, name="1f1b", num_microbatches=num_microbatches)
    delay = backward_delay(vocab)
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for rank, ticks in enumerate(ticks_of):
        for microbatch in range(num_microbatches):
            forward, backward = microbatch + rank, microbatch + 2 * (num_ranks - 1) - rank + delay
            ticks.setdefault(forward, []).append(Action(stage=rank, kind="F", microbatch=microbatch))
            ticks.setdefault(backward, []).append(Action(stage=rank, kind="B", microbatch=microbatch))
        # Backward first: it frees the buffer that the forward then fills. On the last rank the backward needs the
        # forward of its own tick, unless it is delayed.
        order = "FB" if rank == num_ranks - 1 and not delay else "BF"
        for cell in ticks.values():
            cell.sort(key=lambda action, order=order: order.index(action.kind))
    return Schedule.from_ticks(ticks_of, name="1f1b", num_microbatches=num_microbatches)


def _order_of_rank(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    def act(kind: Kind, microbatch: int) -> Action:
        return Action(stage=rank, kind=kind, microbatch=microbatch)

    warm_up = min(num_microbatches, num_ranks - 1 - rank)
    order = [act("F", k) for k in range(warm_up)]
    for k in range(num_microbatches):
        if warm_up + k < num_microbatches:
            order.append(act("F", warm_up + k))
        order.append(act("B", k))
    return order


def _peak_in_flight(num_ranks: int, _: int, vocab: Vocab) -> int:
    return max(1, 2 * (num_ranks - 1) + backward_delay(vocab))


ONE_F_ONE_B = Family(
    name="1f1b",
    build=one_f_one_b,
    takes=frozenset({"clock", "vocab"}),
    is_paired=True,
    peak_in_flight=_peak_in_flight,
    bubble=partial(fill_drain_bubble, text="(p-1) / (m+p-1)", source="Narayanan et al. 2021, section 2.2"),
    counterpart="interleaved-1f1b",
)
