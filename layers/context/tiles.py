"""What a kernel computes for a pair of chunks, and how results of pairs are put together. Read `gathered.py` next."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Tile(NamedTuple):
    """Attention of queries to some keys.

    What they give, float32 [B, n, N, H], and the logarithm of the softmax's sum over these keys, float32 [B, N, n].
    """

    mixed: jax.Array
    sums: jax.Array


class Queries(NamedTuple):
    """What the backward reads of a chunk of queries.

    Themselves, the gradient of their output, the output, each [B, n, N, H], and the logarithm of the softmax's sum over
    all keys [B, N, n].
    """

    q: jax.Array
    grad: jax.Array
    y: jax.Array
    sums: jax.Array


class Mask(NamedTuple):
    """Which keys of a chunk the queries of another see.

    ahead: by how many tokens the first query is behind the first key; None on the diagonal, where the chunks are one.
    window: as `ModelConfig.attention_window`.
    segments: documents of the queries and of the keys, each [B, n]; None where a sequence is one document.
    is_real: whether the keys are there, bool [].
    """

    ahead: Any
    window: int
    segments: tuple[jax.Array, jax.Array] | None
    is_real: Any = True


class Kernel(Protocol):
    """Attention of a chunk of queries to a chunk of keys."""

    def attend(self, q_BnNH: jax.Array, k_BnKH: jax.Array, v_BnKH: jax.Array, mask: Mask) -> Tile:
        """Return what these keys alone give."""
        ...

    def grads(
        self, of: Queries, k_BnKH: jax.Array, v_BnKH: jax.Array, mask: Mask
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the part of the gradients of queries, keys and values that comes by these keys."""
        ...


def merge(one: Tile, other: Tile) -> Tile:
    """Return attention to the keys of both tiles."""
    top = jnp.maximum(one.sums, other.sums)
    shares = jnp.exp(one.sums - top), jnp.exp(other.sums - top)
    total = shares[0] + shares[1]
    of_one, of_other = (jnp.swapaxes(share / total, 1, 2)[..., None] for share in shares)
    return Tile(one.mixed * of_one + other.mixed * of_other, top + jnp.log(total))
