"""Read and write the kinds of attention that config.json lists layer by layer, as a pattern that is repeated.

layer_types of 6 layers: 2 x (sliding, sliding, full)   ->   ("window", "window", "full")
"""

from collections.abc import Sequence


def shorten_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest pattern that gives these kinds, repeated and cut at the last layer.

    >>> shorten_pattern(["window", "full", "window", "full", "window"])
    ('window', 'full')
    """
    for size in range(1, len(kinds)):
        if all(kind == kinds[layer % size] for layer, kind in enumerate(kinds)):
            return tuple(kinds[:size])
    return tuple(kinds)
