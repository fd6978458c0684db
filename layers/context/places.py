"""Where tokens stand: which of a sequence a context rank has, and which document of a packed sequence each is of.

A sequence is cut into 2c equal chunks for c context ranks, and rank i has chunks i and 2c - 1 - i, so that causal
attention is as much work for each (Llama Team 2024, "The Llama 3 Herd of Models", section 3.3.2). 16 tokens, c = 2:

    tokens             0  1  2  3  |  4  5  6  7  |  8  9 10 11  | 12 13 14 15
    rank               0           |  1           |  1           |  0
    batch arrives as   0  1  2  3   12 13 14 15      4  5  6  7    8  9 10 11
    products q k       rank 0: 1 + 4 chunks of keys  rank 1: 2 + 3

Labels are shifted and positions given before the batch is put into this order. Read `gathered.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...meshes import ShardingError
from ...meshes.device_axes import manual_axes, mark_varying
from ...meshes.divisibility import check_divides


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the tokens of a microbatch stand.

    positions: int32 [B, t] or [1, t], in the token's document, for the tokens of this device.
    segments: int32 [B, t], the number of each token's document in its sequence; None where that is one document.
    """

    positions: Any
    segments: Any = None


def order_chunks(array: Any, *, num_ranks: int, dim: int = -1) -> Any:
    """Return an array whose dim of tokens is in the order in which context ranks have them; with one rank, the array.

    >>> order_chunks(np.arange(8), num_ranks=2)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    if num_ranks == 1:
        return array
    dim %= array.ndim
    xp = np if isinstance(array, np.ndarray) else jnp
    early, late = xp.split(array.reshape(*array.shape[:dim], 2 * num_ranks, -1, *array.shape[dim + 1 :]), 2, axis=dim)
    return xp.stack([early, xp.flip(late, dim)], axis=dim + 1).reshape(array.shape)


def restore_order(array: jax.Array, *, num_ranks: int, dim: int) -> jax.Array:
    """Undo `order_chunks`."""
    shape = (*array.shape[:dim], num_ranks, 2, -1, *array.shape[dim + 1 :])
    early, late = (jnp.take(array.reshape(shape), half, axis=dim + 1) for half in (0, 1))
    return jnp.concatenate([early, jnp.flip(late, dim)], axis=dim).reshape(array.shape)


def own_chunks(axes: Sequence[str]) -> tuple[Any, Any]:
    """Return the numbers of the two chunks of this device, int32 [], inside `shard_map`."""
    manual = manual_axes(axes)
    rank, num_ranks = jax.lax.axis_index(manual), jax.lax.axis_size(manual)
    return rank, 2 * num_ranks - 1 - rank


def own_positions(num_tokens: int, axes: Sequence[str]) -> jax.Array:
    """Return the place in their sequence of this device's tokens, int32 [t]; 0 to t - 1 where they are all."""
    if not manual_axes(axes):
        return jnp.arange(num_tokens, dtype=jnp.int32)
    first, second = own_chunks(axes)
    size = num_tokens // 2
    within = jnp.arange(size, dtype=jnp.int32)
    return jnp.concatenate([first * size + within, second * size + within])


def own_part(array: jax.Array, axes: Sequence[str], *, dim: int) -> jax.Array:
    """Return the two chunks of this device of an array that has all tokens: [B, T, ...] -> [B, t, ...].

    Raises:
        ShardingError: the tokens are no multiple of the chunks of all ranks.
    """
    manual = manual_axes(axes)
    if not manual:
        return array
    num_chunks = 2 * jax.lax.axis_size(manual)
    check_divides("tokens", array.shape[dim], over="chunks of context ranks", parts=num_chunks, error=ShardingError)
    size, whole = array.shape[dim] // num_chunks, mark_varying(array, manual)
    chunks = [jax.lax.dynamic_slice_in_dim(whole, chunk * size, size, axis=dim) for chunk in own_chunks(axes)]
    return jnp.concatenate(chunks, axis=dim)
