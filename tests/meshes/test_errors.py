"""Errors quote what others wrote without being taken over by it: escaped, and never long."""

import pytest
from trellax.meshes import TrellaxError
from trellax.meshes.errors import printable, shown, suggest

FOREIGN = {
    "terminal escape": "\x1b[31mred\x1b]0;title\x07",
    "right to left": "abc\u202edcba",
    "lone surrogate": "file-\udcff",
    "null": "a\0b",
    "long": "x" * 1_000_000,
    "long and wide": "💥" * 1_000_000,
    "long and bad": "\x1b" * 1_000_000,
}


VALUES = FOREIGN | {
    "long list": [1] * 10**6,
    "nested": {"a": {"b": {"c": {"d": {}}}}},
    "huge": 2**100_000,
    "bytes": b"\x1b",
}


@pytest.mark.parametrize("name", VALUES)
def test_foreign_value_is_shown_escaped_and_short(name: str) -> None:
    text = shown(VALUES[name], limit=60)
    assert text.isprintable()
    assert len(text) <= 60


def test_plain_value_is_shown_as_it_is() -> None:
    assert [shown(value) for value in ("it's", 2**70, [1, "a"], -0.0)] == ['"it\'s"', str(2**70), "[1, 'a']", "-0.0"]


def test_nested_value_is_shown_whatever_its_depth() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    assert shown(value) == "[[[[[...]]]]]"


@pytest.mark.parametrize("name", FOREIGN)
def test_message_is_printable_and_below_two_kilobytes(name: str) -> None:
    error = TrellaxError(f"no {FOREIGN[name]}.\nSecond line.", fix=f"find {FOREIGN[name]}.")
    assert str(error).replace("\n", "").isprintable()
    assert len(str(error).encode()) < 2_000
    assert str(error) == f"{error.problem}\n  Fix: {error.fix}"


def test_letters_of_any_language_are_printed_as_they_are() -> None:
    assert printable("größe 大きさ 💥\nnext", limit=80) == "größe 大きさ 💥\nnext"


def test_nothing_is_suggested_for_a_huge_name() -> None:
    assert suggest("tensor" * 10_000, ["tensor" * 10_000]) == ""
