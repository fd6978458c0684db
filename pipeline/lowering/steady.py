"""Find the steady state in a schedule's tables: pairs of turns that differ in numbers alone.

    1F1B, 3 ranks      tick   0    1    2      3      4      5      6      7    8    9
    rank 0                    F0   F1   F2     F3     F4+B0  F5+B1  F6+B2  B3   B4   B5 ...
    rank 1                    .    F0   F1     F2+B0  F3+B1  F4+B2  F5+B3  ...
    rank 2                    .    .    F0+B0  F1+B1  F2+B2  F3+B3  F4+B4  ...
                                                      |------------------|  all ranks run a forward and a backward

`loop.py` runs such turns in one body. What else a pair does, transfers and ends that run together, must be the same in
all of them, so that the body need not ask.
"""

from collections.abc import Sequence
from typing import Literal

from .tables import NONE, Ends, Steady, Transfer, Turns

_MIN_PAIRS = 2
"""A shorter steady state is not worth a loop of its own."""

Offsets = tuple[int, ...]


def find_steady(turns: Turns, paired: range, ends: Ends) -> Steady | None:
    """Return the longest part of the paired turns in which every pair has the same steps; None if it is short."""
    starts = list(paired[::2])
    if ends == "together":
        # In the first pair nothing has been made early, and in the last nothing is taken late.
        inner = starts[1:-1]
        is_same = all(_has_all_ends(turns, start) and not _feeds_itself(turns, start) for start in inner)
        if is_same and (found := _same_transfers(turns, inner)):
            return _steady(turns, found, "always")
    found = _same_transfers(turns, starts)
    return _steady(turns, found, "sometimes" if ends == "together" else "never") if found else None


def longest_run(is_in: Sequence[bool]) -> range:
    """Return the positions of the longest run of True, the first of equals."""
    runs, start = [range(0)], 0
    for position, flag in enumerate([*is_in, False]):
        if not flag:
            runs.append(range(start, position))
            start = position + 1
    return max(runs, key=len)


def _has_all_ends(turns: Turns, start: int) -> bool:
    """Return whether a pair takes dx and makes a loss in its forward turn, and x in its backward turn, and no more."""
    columns = (turns.ends.first, turns.ends.last, turns.ends.first_back)
    found = [[int(column[turn]) != NONE for column in columns] for turn in (start, start + 1)]
    return found == [[False, True, True], [True, False, False]]


def _feeds_itself(turns: Turns, start: int) -> bool:
    """Return whether a backward reads the gradient of the loss that the forward of its own pair makes."""
    made, used = turns.gradients.loss[start], turns.gradients.read[start + 1]
    return bool(((made == used) & (made != NONE)).any())


def _same_transfers(turns: Turns, starts: list[int]) -> list[int]:
    """Return the longest run of pairs that transfer to the same sides; none if it is short."""
    sides = [_sides(turns, start) for start in starts]
    runs = [longest_run([own == side for own in sides]) for side in set(sides)]
    found = max(runs, key=len, default=range(0))
    return [starts[position] for position in found] if len(found) >= _MIN_PAIRS else []


def _sides(turns: Turns, start: int) -> tuple[Offsets, Offsets]:
    """Return the offsets of the transfers of activations and of gradients at the end of a pair."""

    def active(transfers: dict[int, Transfer]) -> Offsets:
        return tuple(offset for offset, transfer in transfers.items() if transfer.is_active[start + 1])

    return active(turns.forward), active(turns.backward)


def _steady(turns: Turns, starts: list[int], ends: Literal["always", "sometimes", "never"]) -> Steady:
    forward, backward = _sides(turns, starts[0])
    return Steady(
        start=starts[0],
        stop=starts[-1] + 2,
        ends=ends,
        forward=forward,
        backward=backward,
    )
