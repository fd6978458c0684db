"""Interleaved 1F1B: v chunks of layers a rank, and a bubble v times smaller (Narayanan et al. 2021, section 2.2)."""

from .action import Action
from .check import check_sizes
from .grid import Schedule
from .place import Vocab, check_vocab


def interleaved_1f1b(*, num_ranks: int, num_microbatches: int, num_chunks: int = 2, vocab: Vocab = "ends") -> Schedule:
    """Return 1F1B over num_ranks x num_chunks stages, stage s on rank s % p; chunks take turns of p microbatches.

    Bubble fraction: (p - 1) / (v m + p - 1) where p divides m; a smaller last group leaves some turns empty. In flight
    on rank r: at most v p + p - 2 - 2r microbatches of a chunk, one more on the last rank, whatever m is. Costs v times
    the point-to-point traffic, and a link from the last rank to the first. With a split vocabulary every backward comes
    a tick later, in the same time.

    Raises:
        ScheduleError: a count is below 1, or a word is no choice.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    check_vocab(vocab)
    turns = turns_of(num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    # The first backward, of the last chunk, comes right after that chunk's first forward on the last rank.
    delay = 1 if vocab == "split" else 0
    first_backward = num_ranks * num_chunks - 1 + delay
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for rank, ticks in enumerate(ticks_of):
        for turn, chunk, microbatch in turns:
            forward, backward = turn + rank, turn + first_backward + num_ranks - 1 - rank
            there, back = chunk * num_ranks + rank, (num_chunks - 1 - chunk) * num_ranks + rank
            ticks.setdefault(forward, []).append(Action(stage=there, kind="F", microbatch=microbatch))
            ticks.setdefault(backward, []).append(Action(stage=back, kind="B", microbatch=microbatch))
        # As in 1F1B: backward first, but on the last rank, where it may need the forward of its own tick.
        order = "FB" if rank == num_ranks - 1 and not delay else "BF"
        for cell in ticks.values():
            cell.sort(key=lambda action, order=order: order.index(action.kind))
    return Schedule.from_ticks(
        ticks_of, name="interleaved-1f1b", num_microbatches=num_microbatches, num_chunks=num_chunks
    )


def turns_of(*, num_ranks: int, num_microbatches: int, num_chunks: int) -> list[tuple[int, int, int]]:
    """Return (turn, chunk, microbatch) of every forward of a rank: p microbatches chunk by chunk, then the next p."""
    turns = []
    # Without a rank there is no turn; the schedule refuses such counts itself.
    for group in range(-(-num_microbatches // max(1, num_ranks))):
        for chunk in range(num_chunks):
            for place in range(num_ranks):
                microbatch = group * num_ranks + place
                if microbatch < num_microbatches:
                    turns.append(((group * num_chunks + chunk) * num_ranks + place, chunk, microbatch))
    return turns
