"""Time a jitted call: the median of several, and how far they spread. Read `measure.py` next."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import jax

_MOST_CALLS = 9
_LEAST_CALLS = 3


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Median seconds of a call, the number of calls, and their range over the median."""

    time_s: float
    calls: int
    spread: float


def time_call(call: Callable[[], jax.Array], *, budget_s: float) -> Timed:
    """Return how long a call takes once it is compiled: up to nine calls, and three even past the budget."""
    jax.block_until_ready(call())
    start, times = time.perf_counter(), list[float]()
    while len(times) < _LEAST_CALLS or (len(times) < _MOST_CALLS and time.perf_counter() - start < budget_s):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    middle = median(times)
    return Timed(time_s=middle, calls=len(times), spread=(max(times) - min(times)) / middle)
