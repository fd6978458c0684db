"""Interleaved 1F1B: v chunks of layers per rank, and a bubble v times smaller (Narayanan et al. 2021, section 2.2).

With 3 ranks x 2 chunks rank 0 holds stages 0 and 3, and p = 3 microbatches pass through one chunk before the next:

    rank 0 | 0F0 0F1 0F2 3F0 3F1     3F2     0F3     3B0     3B1 3B2+3F3     0B0     0B1 0B2 3B3   .   . 0B3
    rank 1 |   . 1F0 1F1 1F2 4F0     4F1 4B0+4F2 4B1+1F3     4B2     1B0 1B1+4F3     1B2 4B3   .   . 1B3   .
    rank 2 |   .   . 2F0 2F1 2F2 5F0+5B0 5F1+5B1 5F2+5B2 2F3+2B0     2B1     2B2 5F3+5B3   .   . 2B3   .   .

This grid pairs a forward with a backward in each tick, which suits one lockstep program. Separate programs do better to
run ahead while results travel; that is Megatron's order, `interleaved_run_ahead`.
"""

from functools import partial

from ..action import Action
from ..check import check_sizes
from ..family import Family
from ..formula import fill_drain_bubble
from ..orders import schedule_from_orders
from ..schedule import Schedule
from ..vocab import Vocab, backward_delay, check_vocab


def interleaved_1f1b(*, num_ranks: int, num_microbatches: int, num_chunks: int = 2, vocab: Vocab = "ends") -> Schedule:
    """Build 1F1B over num_ranks x num_chunks stages, stage s on rank s % p, p microbatches per chunk in turn.

    Bubble fraction: (p - 1) / (v m + p - 1) where p divides m; a smaller last group leaves some ticks idle. In flight
    on rank r: at most v p + p - 2 - 2r microbatches of a chunk, one more on the last rank. Communication: v times the
    point-to-point traffic of 1F1B, and a link from the last rank to the first. With a split vocabulary every backward
    comes one tick later, in the same total time.

    Raises:
        ScheduleError: a count is below 1, or `vocab` is unknown.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    check_vocab(vocab)
    turns = turns_of(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    # The first backward, of the last chunk, comes right after that chunk's first forward on the last rank.
    delay = backward_delay(vocab)
    first_backward = num_ranks * num_chunks - 1 + delay
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for rank, ticks in enumerate(ticks_of):
        for turn, chunk, microbatch in turns:
            forward, backward = turn + rank, turn + first_backward + num_ranks - 1 - rank
            stage, mirrored = chunk * num_ranks + rank, (num_chunks - 1 - chunk) * num_ranks + rank
            ticks.setdefault(forward, []).append(Action(stage=stage, kind="F", microbatch=microbatch))
            ticks.setdefault(backward, []).append(Action(stage=mirrored, kind="B", microbatch=microbatch))
        # As in 1F1B: backward first, except on the last rank, where it may need the forward of its own tick.
        order = "FB" if rank == num_ranks - 1 and not delay else "BF"
        for cell in ticks.values():
            cell.sort(key=lambda action, order=order: order.index(action.kind))
    return Schedule.from_ticks(
        ticks_of, name="interleaved-1f1b", num_microbatches=num_microbatches, num_chunks=num_chunks
    )


def interleaved_run_ahead(*, num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """Build interleaved 1F1B in Megatron's order, with 2(p - r - 1) + (v - 1) p forwards before the first backward.

    Raises:
        ScheduleError: a count is below 1.
    """
    turns = turns_of(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    orders = []
    for rank in range(num_ranks):
        forwards = [Action(stage=chunk * num_ranks + rank, kind="F", microbatch=k) for _, chunk, k in turns]
        backwards = [
            Action(stage=(num_chunks - 1 - chunk) * num_ranks + rank, kind="B", microbatch=k) for _, chunk, k in turns
        ]
        warm_up = min(len(turns), 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks)
        order = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            order += [forward, backward]
        orders.append([*order, *backwards[len(turns) - warm_up :]])
    return schedule_from_orders(
        orders, name="interleaved-1f1b", num_microbatches=num_microbatches, num_chunks=num_chunks
    )


def turns_of(*, num_ranks: int, num_microbatches: int, num_chunks: int) -> list[tuple[int, int, int]]:
    """Return (turn, chunk, microbatch) of every forward of a rank.

    A group of p microbatches runs chunk by chunk, then the next group; the last may be smaller.
    """
    turns = []
    # With num_ranks=0 there are no turns; the schedule refuses that count itself.
    for group in range(-(-num_microbatches // max(1, num_ranks))):
        for chunk in range(num_chunks):
            for place in range(num_ranks):
                microbatch = group * num_ranks + place
                if microbatch < num_microbatches:
                    turns.append(((group * num_chunks + chunk) * num_ranks + place, chunk, microbatch))
    return turns


def _peak_in_flight(num_ranks: int, num_chunks: int, vocab: Vocab) -> int:
    return (num_chunks + 1) * num_ranks - 2 + backward_delay(vocab)


INTERLEAVED_1F1B = Family(
    name="interleaved-1f1b",
    build=interleaved_1f1b,
    takes=frozenset({"num_chunks", "vocab"}),
    chunks="several",
    is_paired=True,
    peak_in_flight=_peak_in_flight,
    bubble=partial(fill_drain_bubble, text="(p-1) / (v m+p-1)", source="Narayanan et al. 2021, section 2.2"),
    counterpart="1f1b",
    run_ahead=interleaved_run_ahead,
)
