"""Guess the next tokens of a sequence from what it says already: prompt look-up (Saxena 2023). Plain Python, no jax.

the cat sat on the mat and the cat          the last three tokens, or two, or one, were here before:
^^^ ^^^ what followed there is the guess        "and the cat" no, "the cat" yes -> "sat on the mat"
"""

from collections.abc import Sequence

LONGEST = 3
"""Number of last tokens that are looked up at first; then fewer."""


class LookUp:
    """The places of all short runs of tokens of one sequence, the latest of each.

    >>> found = LookUp()
    >>> found.add((1, 2, 3, 4, 9, 2, 3))
    >>> found.guess(3)
    [4, 9, 2]
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # Run of tokens -> place behind it; those that end with the last token have no token behind them yet.
        self._places: dict[tuple[int, ...], int] = {}

    @property
    def num_tokens(self) -> int:
        """Number of tokens that were added."""
        return len(self._tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Add tokens to the end of the sequence."""
        for token in tokens:
            end = len(self._tokens)
            for size in range(1, min(LONGEST, end) + 1):
                self._places[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """Return guesses for the next tokens, at most `count`; none if the last token was not there before."""
        for size in range(min(LONGEST, len(self._tokens)), 0, -1):
            place = self._places.get(tuple(self._tokens[-size:]))
            if place is not None:
                whole = self._tokens[:] if place + count > len(self._tokens) else self._tokens
                if whole is self._tokens:
                    return whole[place : place + count]
                # What repeats itself goes on to do so: the guess reads its own beginning.
                for _ in range(count):
                    whole.append(whole[place])
                    place += 1
                return whole[len(self._tokens) :]
        return []
