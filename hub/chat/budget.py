"""Bound the memory of a chat template: before it makes a text or a list, an upper bound of its bytes must be left.

`Budget.require` is asked before, and `Budget.spend` after with what was made, so that all that one rendering makes is
at most `MAX_BYTES`, however little of it is kept. Read `sandbox.py` for who asks.
"""

import sys
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

MAX_BYTES = 256 << 20
"""Most bytes of the texts and lists of one rendering; those of usual templates are some times the messages."""

_ITEM, _LETTER = 64, 4
"""Bytes of an element of a list with a small object, and of the widest letter."""

_BATCH, _MOST_ELEMENTS = 4096, 1 << 17

_SEQUENCES = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooMuchError(Exception):
    """A template takes too long, or makes too much."""


class Budget:
    """The bytes that are left."""

    def __init__(self, num_bytes: int = MAX_BYTES) -> None:
        self.left = num_bytes

    def require(self, num_bytes: int) -> None:
        """Raise if so many bytes are not left."""
        if num_bytes > self.left:
            raise TooMuchError(f"it makes more than {MAX_BYTES >> 20} MiB of texts and lists")

    def spend(self, num_bytes: int) -> None:
        """Take so many bytes away."""
        self.require(num_bytes)
        self.left -= num_bytes


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)
begin, end = _budget.set, _budget.reset


def current() -> Budget:
    """Return the budget of the rendering that runs; that of nothing is whole."""
    return _budget.get() or Budget()


def own_bytes(value: Any) -> int:
    """Return the bytes of a value by itself, without those of its elements."""
    if isinstance(value, str | bytes):
        return sys.getsizeof(value)
    if isinstance(value, (dict, *_SEQUENCES)):
        return _ITEM * (len(value) + 1)
    return _ITEM + (value.bit_length() // 8 if isinstance(value, int) else 0)


def whole_bytes(*values: Any) -> int:
    """Return the bytes of values with their elements, those in several places as often; no more than are left count."""
    left, total, num_read = [*values], 0, 0
    most = current().left
    while left and total <= most:
        num_read += 1
        if num_read > _MOST_ELEMENTS:
            raise TooMuchError(f"it reads lists of more than {_MOST_ELEMENTS} elements as a whole")
        value = left.pop()
        if isinstance(value, Namespace):
            # It has no public way to its values.
            value = object.__getattribute__(value, "_Namespace__attrs")
        # By hand as `own_bytes` does: each call of a function is traced.
        if isinstance(value, str):
            total += _ITEM + _LETTER * len(value)
        elif not isinstance(value, (dict, *_SEQUENCES)):
            total += _ITEM
        else:
            total += _ITEM * (len(value) + 1)
            if total <= most:
                left += value
                left += value.values() if isinstance(value, dict) else ()
    return total


def bytes_of_replaced(text: Any, old: Any, new: Any) -> int:
    """Return an upper bound of a text with a part replaced by another."""
    text, old, new = map(str, (text, old, new))
    return own_bytes(text) + (text.count(old) + 1) * len(new) * _LETTER


def bytes_of_joined(items: Any, separator: Any) -> int:
    """Return an upper bound of joined texts."""
    return _LETTER * whole_bytes(items) + len(items) * own_bytes(separator)


def bytes_of_parts(text: str, separator: Any = None) -> int:
    """Return an upper bound of the list of a text's parts, or of its letters with an empty separator."""
    count = text.count(separator) if isinstance(separator, str) else len(text) // 2
    return own_bytes(text) + (_ITEM + _LETTER) * (count + 1)


def take(values: Iterable[Any]) -> list[Any]:
    """Return the list of what an iterator gives, as long as there is room for it; others ask for what they make."""
    taken: list[Any] = []
    for number, value in enumerate(values):
        if number % _BATCH == 0:
            current().require((_ITEM + _LETTER) * number)
        taken.append(value)
    return taken
