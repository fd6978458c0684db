"""Pairs of tokens and experts are ordered as a stable sort by expert would."""

import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers.experts.slots import order_pairs


@pytest.mark.parametrize(
    ("tokens", "choices", "experts"), [(1, 1, 1), (5, 2, 3), (64, 2, 8), (100, 3, 7), (513, 4, 32)]
)
def test_pairs_are_in_the_order_of_a_stable_sort(tokens: int, choices: int, experts: int) -> None:
    rng = np.random.default_rng(tokens)
    chosen = rng.integers(0, experts, (tokens, choices)).astype(np.int32)
    chosen[: tokens // 2] = chosen[0]  # an uneven load
    order = order_pairs(jnp.asarray(chosen), num_experts=experts)
    pairs = chosen.reshape(-1)
    by_expert = np.argsort(pairs, kind="stable")
    counts = np.bincount(pairs, minlength=experts)
    starts = np.cumsum(counts) - counts
    rank = np.empty(pairs.size, np.int32)
    rank[by_expert] = np.arange(pairs.size) - starts[pairs[by_expert]]
    np.testing.assert_array_equal(order.by_expert, by_expert)
    np.testing.assert_array_equal(order.counts, counts)
    np.testing.assert_array_equal(order.starts, starts)
    np.testing.assert_array_equal(order.rank, rank.reshape(chosen.shape))
