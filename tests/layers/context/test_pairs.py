"""Every rank computes as many pairs of chunks, and every pair that causal attention needs is computed once."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers.context.pairs import count_pairs, pair_of

from ..sharded import mesh_of

SIZE = 4


def pairs_of_ranks(num_ranks: int, window: int) -> Any:
    """Return (query chunk, key chunk, rank and half of the keys, whether real) of every number, [ranks, pairs]."""

    def region() -> Any:
        own = {"size": SIZE, "window": window, "axes": ("context",)}
        pairs = [pair_of(jnp.int32(number), **own) for number in range(count_pairs(**own))]
        columns = zip(*((p.query_chunk, p.key_chunk, p.rank, p.half, p.is_real) for p in pairs), strict=True)
        return tuple(jnp.stack(column)[None] for column in columns)

    run = jax.shard_map(region, mesh=mesh_of(f"context={num_ranks}"), in_specs=(), out_specs=P("context"))
    return [np.asarray(column) for column in jax.jit(run)()]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("window", [0, 2, 3, 4, 5, 6, 9, 13, 100])
def test_pairs_of_all_ranks_are_those_below_the_diagonal_that_the_window_sees(num_ranks: int, window: int) -> None:
    queries, keys, ranks, halves, is_real = pairs_of_ranks(num_ranks, window)
    chunks = range(2 * num_ranks)
    found = Counter(
        (int(query), int(key)) for query, key, real in zip(queries.flat, keys.flat, is_real.flat, strict=True) if real
    )
    needed = {
        (query, key) for query in chunks for key in range(query) if not window or (query - key - 1) * SIZE + 1 < window
    }
    assert set(found) >= needed
    assert set(found.values()) <= {1}
    # The window may leave out some of the pairs that all ranks compute alike.
    if not window:
        assert set(found) == needed
    # As many for each rank: with both halves of the diagonal 2c + 1 products of chunks.
    assert queries.shape[1] <= 2 * num_ranks - 1
    # Keys lie where their chunk is: that of rank r and half h is r, or 2c - 1 - r.
    where = np.where(halves == 0, ranks, 2 * num_ranks - 1 - ranks)
    np.testing.assert_array_equal(where[is_real], keys[is_real])
