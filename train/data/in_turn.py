"""Start computations one after another without waiting for each, but never so many that they wait for one another.

A runtime queues what is started before the devices are done. On CPUs XLA starts at most 32 computations a device; from
then on the start of one on the first device waits, while those before it wait for the other devices' part of their
collectives: fake devices stand still, and XLA ends the process after 40 seconds.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import jax

MOST_IN_FLIGHT = 8
"""Computations that are started and not finished; a device needs one to work on and one to follow."""


def in_turn(started: Iterable[Any]) -> list[Any]:
    """Return the results, trees of arrays, of computations that an iterator starts one by one.

    >>> in_turn(jnp.sqrt(number) for number in (1.0, 4.0))
    [Array(1., dtype=float32, weak_type=True), Array(2., dtype=float32, weak_type=True)]
    """
    results: list[Any] = []
    waiting: deque[Any] = deque()
    for result in started:
        results.append(result)
        waiting.append(result)
        if len(waiting) == MOST_IN_FLIGHT:
            jax.block_until_ready(waiting.popleft())
    return results
