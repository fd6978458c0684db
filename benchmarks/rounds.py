"""Measure several ways to do the same work in turns, so that other load on the machine slows all of them alike."""

import sys
from collections.abc import Callable, Mapping
from typing import Literal

Times = dict[str, float]
"""Seconds by clock: `wall_s` and `cpu_s`."""

Ways = Mapping[str, Callable[[], Times]]
"""Name -> a function that does the work once and returns its times."""


def take_turns(
    ways: Ways, *, rounds: int, what: str, warm_up: Literal["every turn", "first round"]
) -> dict[str, list[Times]]:
    """Measure every way once per round, and return the times of each, in order of the rounds.

    Each round begins with another way. One more round comes first and is not counted.

    Args:
        what: text for the progress on stderr.
        warm_up: "every turn" runs a way once without counting it before it is measured. A process is idle while the
            others run, and the system needs time to bring back memory that was not touched for seconds (0.2 to 0.6 s of
            a step here, more for more memory).
    """
    names, times = list(ways), {way: [] for way in ways}
    for turn in range(-1, rounds):
        tell(f"{what}, round {turn + 1} of {rounds}")
        start = turn % len(names)
        for name in (*names[start:], *names[:start]):
            if warm_up == "every turn":
                ways[name]()
            measured = ways[name]()
            if turn >= 0:
                times[name].append(measured)
    return times


def tell(progress: str) -> None:
    """Print progress to stderr."""
    print(progress, file=sys.stderr, flush=True)
