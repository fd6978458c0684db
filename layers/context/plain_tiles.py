"""A pair of chunks in plain XLA, a block of queries at a time: any mask, no [n, n] array of scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..attention.blockwise import (
    QueryTile,
    Saved,
    Scoring,
    attend_blocks,
    attend_tile,
    block_grads,
    heads_first,
    row_blocks,
    seen_keys,
    softmax_delta,
    tile_grads,
    tokens_first,
)
from .tiles import Mask, Queries, Tile


@dataclass(frozen=True)
class PlainKernel:
    """The kernel of `blockwise.py` for a pair of chunks; softmax and sums in float32.

    cap: the soft cap of scores, 0 for none.
    """

    cap: float = 0.0

    def attend(self, q_BnNH: jax.Array, k_BnKH: jax.Array, v_BnKH: jax.Array, mask: Mask) -> Tile:
        """Return what these keys alone give."""
        q, k, v = heads_first(q_BnNH, k_BnKH.shape[2]), jnp.swapaxes(k_BnKH, 1, 2), jnp.swapaxes(v_BnKH, 1, 2)
        if mask.ahead is None:
            segments = None if mask.segments is None else mask.segments[0]
            mixed, sums = attend_blocks(q, k, v, segments, how=Scoring(mask.window, self.cap), dtype=jnp.float32)
        else:
            tiles = [
                attend_tile(q[..., rows, :], k, v, seen, cap=self.cap) for rows, seen in _masked_rows(mask, q.shape[3])
            ]
            mixed, sums = (jnp.concatenate(leaves, axis=3) for leaves in zip(*tiles, strict=True))
        return Tile(tokens_first(mixed), sums.reshape(sums.shape[0], -1, sums.shape[-1]))

    def grads(
        self, of: Queries, k_BnKH: jax.Array, v_BnKH: jax.Array, mask: Mask
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the part of the gradients of queries, keys and values that comes by these keys, in float32."""
        num_kv_heads = k_BnKH.shape[2]
        k, v = jnp.swapaxes(k_BnKH, 1, 2), jnp.swapaxes(v_BnKH, 1, 2)
        q, grad = heads_first(of.q, num_kv_heads), heads_first(of.grad, num_kv_heads)
        sums = of.sums.reshape(q.shape[:-1])
        saved = Saved(q, k, v, None if mask.segments is None else mask.segments[0], of.y, sums)
        delta = softmax_delta(saved, of.grad)
        if mask.ahead is None:
            d_q, d_k, d_v = block_grads(saved, grad, delta, how=Scoring(mask.window, self.cap))
        else:
            parts, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
            for rows, seen in _masked_rows(mask, q.shape[3]):
                tile = QueryTile(q[..., rows, :], grad[..., rows, :], delta[..., rows], sums[..., rows])
                part, of_k, of_v = tile_grads(tile, k, v, seen, cap=self.cap)
                parts, d_k, d_v = [*parts, part], d_k + of_k, d_v + of_v
            d_q = jnp.concatenate(parts, axis=3)
        scale = q.shape[-1] ** -0.5
        return tokens_first(d_q) * scale, jnp.swapaxes(d_k, 1, 2) * scale, jnp.swapaxes(d_v, 1, 2)


def _masked_rows(mask: Mask, size: int) -> Iterator[tuple[slice, jax.Array]]:
    """Yield the blocks of a chunk's queries, each with the keys that its queries see, bool [B or 1, 1, 1, t, n]."""
    for rows in row_blocks(size):
        segments = mask.segments and (mask.segments[0][:, rows], mask.segments[1])
        seen = seen_keys((rows.stop - rows.start, size), mask.ahead + rows.start, mask.window, segments)
        yield rows, seen & mask.is_real
