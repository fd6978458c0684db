"""ZB-H1: weight gradients fill the bubbles of 1F1B without holding more microbatches (Qi et al. 2024, section 2.1).

The backward is split: the stage before needs the input gradient I, while only the optimizer needs the weight gradient
W, so W can wait for a tick in which the rank would be idle.

    rank 0 | 0F0 0F1 0F2   .   . 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    rank 1 |   . 1F0 1F1   . 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
    rank 2 |   .   . 2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
"""

from functools import partial

from ..action import Action
from ..check import check_sizes
from ..family import Family
from ..formula import split_backward_bubble
from ..orders import schedule_from_orders
from ..schedule import Schedule
from ..vocab import Vocab


def zb_h1(*, num_ranks: int, num_microbatches: int, vocab: Vocab = "ends") -> Schedule:
    """Build 1F1B with split backwards, the weight gradients of rank r delayed by r microbatches.

    In flight: min(m, p) microbatches on every rank. If F = I = W and m >= p it takes 3m + p - 1 ticks of one action
    each, so the bubble fraction is (p - 1) / (3m + p - 1).

    Raises:
        ScheduleError: a count is below 1, or `vocab` is unknown.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    orders = [_order_of_rank(rank, num_ranks=num_ranks, num_microbatches=num_microbatches) for rank in range(num_ranks)]
    return schedule_from_orders(orders, name="zb-h1", num_microbatches=num_microbatches, vocab=vocab)


def _order_of_rank(rank: int, *, num_ranks: int, num_microbatches: int) -> list[Action]:
    warm_up = min(num_microbatches, num_ranks - 1 - rank)
    words = [("F", k) for k in range(warm_up)]
    for k in range(num_microbatches):
        if warm_up + k < num_microbatches:
            words.append(("F", warm_up + k))
        words.append(("I", k))
        # The ranks before wait only for I: the later a rank, the longer its W are delayed.
        if k >= rank:
            words.append(("W", k - rank))
    words += [("W", k) for k in range(max(0, num_microbatches - rank), num_microbatches)]
    return [Action.parse(f"{rank}{kind}{k}") for kind, k in words]


ZB_H1 = Family(
    name="zb-h1",
    build=zb_h1,
    takes=frozenset({"vocab"}),
    backward="split",
    peak_in_flight=lambda num_ranks, _chunks, _vocab: num_ranks,
    bubble=partial(
        split_backward_bubble,
        text="(p-1)(F+I-W) / (m(F+I+W) + (p-1)(F+I-W))",
        source="Qi et al. 2024, Table 2",
    ),
    counterpart="interleaved-zb-h1",
)
