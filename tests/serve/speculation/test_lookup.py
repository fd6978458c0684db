"""Guesses from what a sequence says already."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trellax.serve.speculation.lookup import LONGEST, LookUp


def guess(tokens: list[int], count: int) -> list[int]:
    found = LookUp()
    for token in tokens:
        found.add([token])
    return found.guess(count)


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        ([1, 2, 3], 4, []),
        ([], 4, []),
        ([1, 2, 3, 1], 2, [2, 3]),
        # The longest run counts, and of equal ones the last.
        ([1, 2, 3, 9, 2, 4, 1, 2], 2, [3, 9]),
        ([2, 3, 2, 4, 2], 1, [4]),
        # What repeats itself goes on.
        ([7, 7], 3, [7, 7, 7]),
        ([5, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
    ],
)
def test_guess_is_what_followed(tokens: list[int], count: int, expected: list[int]) -> None:
    assert guess(tokens, count) == expected


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6))
def test_a_guess_follows_the_latest_place_of_the_longest_known_run(tokens: list[int], count: int) -> None:
    for size in range(min(LONGEST, len(tokens)), 0, -1):
        places = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if places:
            whole = tokens[:]
            for place in range(places[-1], places[-1] + count):
                whole.append(whole[place])
            assert guess(tokens, count) == whole[len(tokens) :]
            return
    assert guess(tokens, count) == []
