"""Pairs of a chunk of queries and one of keys below the diagonal, in the order in which a rank computes them.

    c = 4, rank 1 has the chunks 1 and 6:     number   0     1     2     3     4     5     6
                                              pair    1-0   6-0   6-1   6-2   6-3   6-4   6-5

Every rank has 2c - 1 of them. With an attention window a chunk sees only the chunks just before it; where these are
fewer, a rank has as many numbers for each of its two, and those before the start of a sequence are not real.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .places import own_chunks


class Pair(NamedTuple):
    """A pair of chunks, all int32 [] and different on each rank.

    query: which of the device's own two chunks, 0 or 1; query_chunk, key_chunk: numbers in the sequence.
    rank, half: where the key chunk is: which rank's, and which of its two; own_rank: this device's.
    is_real: whether there is such a key chunk, bool [].
    """

    query: jax.Array
    query_chunk: jax.Array
    key_chunk: jax.Array
    rank: jax.Array
    half: jax.Array
    own_rank: jax.Array
    is_real: jax.Array


def count_pairs(*, size: int, window: int, axes: Sequence[str]) -> int:
    """Return the number of pairs that each rank computes, of chunks of `size` tokens."""
    num_ranks = jax.lax.axis_size(axes)
    before = _chunks_before(size, window)
    return 2 * num_ranks - 1 if before is None else min(2 * before, 2 * num_ranks - 1)


def pair_of(number: jax.Array, *, size: int, window: int, axes: Sequence[str]) -> Pair:
    """Return a pair by its number."""
    num_ranks, (first, second) = jax.lax.axis_size(axes), own_chunks(axes)
    before, all_pairs = _chunks_before(size, window), 2 * num_ranks - 1
    if before is None or 2 * before >= all_pairs:
        query = (number >= first).astype(jnp.int32)
        key_chunk = number - first * query
    else:
        # The mark of axes comes with the rank's number.
        query = number // before + 0 * first
        key_chunk = jnp.where(query == 0, first, second) - (number % before + 1)
    is_real = key_chunk >= 0
    key_chunk = jnp.maximum(key_chunk, 0)
    half = (key_chunk >= num_ranks).astype(jnp.int32)
    rank = jnp.where(half == 0, key_chunk, all_pairs - key_chunk)
    return Pair(query, jnp.where(query == 0, first, second), key_chunk, rank, half, first, is_real)


def _chunks_before(size: int, window: int) -> int | None:
    """Return the number of chunks before its own that a chunk's queries see; None for all."""
    return -(-(window - 1) // size) if window else None
