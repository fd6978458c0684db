"""ZB-H1: weight gradients fill the bubbles of 1F1B without holding more microbatches (Qi et al. 2024, section 2.1)."""

from .action import Action
from .check import check_sizes
from .grid import Schedule
from .place import Vocab, schedule_from_orders


def zb_h1(*, num_ranks: int, num_microbatches: int, vocab: Vocab = "ends") -> Schedule:
    """Return 1F1B with its backwards in halves, the weight gradients of rank r put off by r microbatches.

    In flight: min(m, p) microbatches on every rank. With halves as long as a forward and m >= p it takes 3m + p - 1
    ticks of one action, so the bubble fraction is (p - 1) / (3m + p - 1).

    Raises:
        ScheduleError: a count is below 1, or a word is no choice.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    orders = [_order(rank, num_ranks=num_ranks, num_microbatches=num_microbatches) for rank in range(num_ranks)]
    return schedule_from_orders(orders, name="zb-h1", num_microbatches=num_microbatches, vocab=vocab)


def _order(rank: int, *, num_ranks: int, num_microbatches: int) -> list[Action]:
    warm_up = min(num_microbatches, num_ranks - 1 - rank)
    words = [("F", k) for k in range(warm_up)]
    for k in range(num_microbatches):
        if warm_up + k < num_microbatches:
            words.append(("F", warm_up + k))
        words.append(("I", k))
        if k >= rank:
            words.append(("W", k - rank))
    words += [("W", k) for k in range(max(0, num_microbatches - rank), num_microbatches)]
    return [Action.parse(f"{rank}{kind}{k}") for kind, k in words]
