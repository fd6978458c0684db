"""Which tokens a context rank has, and in which order a batch arrives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers.context.places import order_chunks, own_positions

from ..sharded import mesh_of


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_rank_has_an_early_and_a_late_chunk(num_ranks: int) -> None:
    ordered = order_chunks(np.arange(16), num_ranks=num_ranks).reshape(num_ranks, -1)
    assert sorted(ordered.ravel()) == list(range(16))
    if num_ranks == 2:
        assert ordered.tolist() == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]


def test_any_dim_may_hold_tokens_and_jax_arrays_are_ordered_alike() -> None:
    array = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    found = order_chunks(array, num_ranks=2, dim=1)
    np.testing.assert_array_equal(found[1, :, 2], order_chunks(array[1, :, 2], num_ranks=2))
    np.testing.assert_array_equal(order_chunks(jnp.asarray(array), num_ranks=2, dim=1), found)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_positions_of_a_rank_are_those_of_the_tokens_it_is_given(num_ranks: int) -> None:
    mesh = mesh_of(f"context={num_ranks}")
    own = partial(own_positions, 32 // num_ranks, ("context",))
    found = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(), out_specs=P("context")))()
    np.testing.assert_array_equal(found, order_chunks(np.arange(32), num_ranks=num_ranks))


def test_without_a_context_axis_positions_are_in_order() -> None:
    assert own_positions(5, ("context",)).tolist() == [0, 1, 2, 3, 4]
