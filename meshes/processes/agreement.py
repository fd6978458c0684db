"""Compare the settings of the processes of one program before they compute together.

Processes with different settings do not fail: each trains another model, or they wait for each other without end. A
fact is a name and a text; `rendezvous.py` compares the facts that are known at the start.
"""

from collections.abc import Iterable, Mapping
from itertools import zip_longest

Facts = Mapping[str, str]
"""Settings and versions of one process, such as `{"train.steps": "100", "jax": "0.10.2"}`."""

_MOST_NAMES, _MOST_CHARACTERS = 4, 80
_NOTHING = "nothing"


def describe_differences(facts: Mapping[int, Facts]) -> str:
    """Describe in one line the facts in which processes differ from process 0; "" where all agree.

    >>> describe_differences({0: {"train.steps": "10"}, 1: {"train.steps": "20"}})
    'process 1 has train.steps=20, process 0 has 10'

    Args:
        facts: the facts of each process by its index; process 0 is among them.
    """
    first = facts[0]
    names = dict.fromkeys(name for each in facts.values() for name in each)
    told = [text for name in names if (text := _describe_one(name, facts, expected=first.get(name, _NOTHING)))]
    more = len(told) - _MOST_NAMES
    return "; ".join([*told[:_MOST_NAMES], *([f"and {more} more differ"] if more > 0 else [])])


def name_processes(indices: Iterable[int]) -> str:
    """Return "process 3", "processes 1, 2 and 5", or the first few and how many more."""
    names = [str(index) for index in sorted(indices)]
    if len(names) == 1:
        return f"process {names[0]}"
    shown = names if len(names) <= _MOST_NAMES else [*names[:_MOST_NAMES], f"{len(names) - _MOST_NAMES} more"]
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"


def _describe_one(name: str, facts: Mapping[int, Facts], *, expected: str) -> str:
    others: dict[str, list[int]] = {}
    for index, each in facts.items():
        if (value := each.get(name, _NOTHING)) != expected:
            others.setdefault(value, []).append(index)
    if not others:
        return ""
    value, indices = next(iter(others.items()))
    # Long texts, such as XLA_FLAGS, are quoted around their first difference.
    start = max(0, _first_difference(value, expected) - _MOST_CHARACTERS // 2)
    verb = "has" if len(indices) == 1 else "have"
    return f"{name_processes(indices)} {verb} {name}={_cut(value, start)}, process 0 has {_cut(expected, start)}"


def _first_difference(one: str, other: str) -> int:
    return next(index for index, (a, b) in enumerate(zip_longest(one, other)) if a != b)


def _cut(text: str, start: int) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text or "''"
    return ("..." if start else "") + text[start : start + _MOST_CHARACTERS] + "..."
