"""Choose the residuals that wait in the memory of the host, and the turns in which they are copied there and back.

    turn             |  0  |  1  |  2  |  3  |  4  |  5  |
    action           |  F  |           ...         |  B  |
    copied out             |==>                              at the end of the turn of the forward
    on the host            |----------------------|
    copied back                              |==>|           in the turn before the backward, beside its action
    slots on device  |xxxxx|                    |xxxxxxxx|

A rank copies one microbatch of a chunk out and one back in a turn at most: all ranks do both copies in every turn.
In the steady state a pair of turns is one body, which copies in its first turn: that of the forward. What is read soon
stays (PipeOffload, arXiv 2503.01328, chooses by lifetime too). Read `lower.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_SHORTEST = 3
"""Least turns between the two copies: with fewer, a slot is free for too short a time to be used."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Residuals of one action: the rank, the turn that makes them, and those that read them."""

    rank: int
    made: int
    used: tuple[int, ...]


def choose_copies(waits: Sequence[Wait], *, paired: range) -> dict[Wait, tuple[int, int]]:
    """Return the turns of the copies to the host and back, of residuals that wait long enough."""
    copies: dict[Wait, tuple[int, int]] = {}
    taken: set[tuple[int, int]] = set()
    # The last deadline first: its copy takes the turn right before it, and others are early rather than late.
    for wait in sorted(waits, key=lambda wait: (-min(wait.used), wait.rank)):
        turns = range(min(wait.used) - 1, wait.made + _SHORTEST - 1, -1)
        free = (turn for turn in turns if _may_copy(turn, paired) and (wait.rank, turn) not in taken)
        back = next(free, None)
        if back is not None and _may_copy(wait.made, paired):
            taken.add((wait.rank, back))
            copies[wait] = (wait.made, back)
    return copies


def _may_copy(turn: int, paired: range) -> bool:
    return turn not in paired or (turn - paired.start) % 2 == 0
