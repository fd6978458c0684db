"""Causal attention of a context rank's queries to the gathered keys and values of all ranks, in plain XLA.

    keys, values [B, t, K, H] of each rank   --all-gather over context-->   2c chunks of every sequence
    its two chunks of queries stay           2c + 1 pairs of chunks: two on the diagonal, 2c - 1 below it

    c = 2         keys  0  1  2  3        rank 0 has the queries of chunks 0 and 3, rank 1 those of 1 and 2:
    queries 0           \  .  .  .        each computes 5 pairs, \ for one half of which the mask hides a half,
            1           #  \  .  .        and no rank waits for another
            2           #  #  \  .
            3           #  #  #  \

All ranks run one program: a loop over the pairs below the diagonal, in which the rank's number chooses chunks. Results
of pairs are merged by the logarithms of their softmax's sums, as within a kernel (Dao 2023, section 3). The backward
gathers keys and values again, so a rank keeps those of its own tokens alone, and reduce-scatters their gradients. Read
`fused.py` for cuDNN's kernel in the same loop.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ...meshes.device_axes import mark_varying, varying_axes
from ..blockwise import (
    FLASH_OUTPUTS,
    QueryTile,
    Saved,
    Tile,
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
from .pairs import Pair, count_pairs, pair_of


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_gathered(
    q_BtNH: jax.Array,
    k_BtKH: jax.Array,
    v_BtKH: jax.Array,
    segments_Bt: jax.Array | None,
    window: int,
    axes: tuple[str, ...],
) -> jax.Array:
    """Compute causal attention over whole sequences, within the last `window` tokens unless that is 0.

    q[B, T@context, N, H], k and v[B, T@context, K, H], segments[B, T@context] -> mixed[B, T@context, N, H], for use inside
    `shard_map`. Sends an all-gather of k and v over context; backward another, and a reduce-scatter of their gradients.
    """
    return _forward(q_BtNH, k_BtKH, v_BtKH, segments_Bt, window, axes)[0]


class _Keys(NamedTuple):
    """Keys and values of all chunks, [c, 2, B, K, n, H], and their documents [c, 2, B, n]."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


def _forward(
    q_BtNH: jax.Array,
    k_BtKH: jax.Array,
    v_BtKH: jax.Array,
    segments_Bt: jax.Array | None,
    window: int,
    axes: tuple[str, ...],
) -> tuple[jax.Array, Saved]:
    q = heads_first(q_BtNH, k_BtKH.shape[2])
    k, v = jnp.swapaxes(k_BtKH, 1, 2), jnp.swapaxes(v_BtKH, 1, 2)
    # Both chunks at once: on the diagonal they are alike.
    mixed, sums = attend_blocks(
        _join_chunks(q), _join_chunks(k), _join_chunks(v), _join_segments(segments_Bt), window=window, dtype=jnp.float32
    )
    start = jnp.stack(jnp.split(mixed, 2)), jnp.stack(jnp.split(sums, 2))
    keys, queries = _gather_keys(k, v, segments_Bt, axes), _chunks_of(q)

    def add(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        pair = pair_of(number, size=queries.shape[-2], window=window, axes=axes)
        own_k, own_v = _take(keys.k, pair), _take(keys.v, pair)
        own_q, (mixed, sums) = _read(queries, pair.query), (_read(leaf, pair.query) for leaf in carry)
        tiles = [attend_tile(own_q[..., rows, :], own_k, own_v, seen) for rows, seen in _masks(pair, keys, window)]
        new = Tile(*(jnp.concatenate(leaves, axis=3) for leaves in zip(*tiles, strict=True)))
        merged = merge(Tile(mixed, sums), new)
        return tuple(_write(leaf, own, pair.query) for leaf, own in zip(carry, merged, strict=True))  # type: ignore[return-value]

    count = count_pairs(size=queries.shape[-2], window=window, axes=axes)
    mixed, sums = jax.lax.fori_loop(0, count, add, _vary(start, queries, keys.k, keys.v))
    y_BtNH = tokens_first(_chunks_back(mixed)).astype(q_BtNH.dtype)
    y_BtNH, sums = checkpoint_name((y_BtNH, jnp.concatenate([sums[0], sums[1]], axis=3)), FLASH_OUTPUTS)
    return y_BtNH, Saved(q, k, v, segments_Bt, y_BtNH, sums)


def _backward(
    window: int, axes: tuple[str, ...], saved: Saved, grad_BtNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    grad, delta = heads_first(grad_BtNH, saved.k.shape[1]), softmax_delta(saved, grad_BtNH)
    joined = saved._replace(
        q=_join_chunks(saved.q),
        k=_join_chunks(saved.k),
        v=_join_chunks(saved.v),
        segments=_join_segments(saved.segments),
        sums=_join_chunks(saved.sums, dim=3),
    )
    d_q, d_k, d_v = block_grads(joined, _join_chunks(grad), _join_chunks(delta, dim=3), window=window)
    keys = _gather_keys(saved.k, saved.v, saved.segments, axes)
    of = QueryTile(_chunks_of(saved.q), _chunks_of(grad), _chunks_of(delta, dim=3), _chunks_of(saved.sums, dim=3))
    zeros = jnp.zeros(keys.k.shape, jnp.float32)

    def add(number: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        d_q, d_k, d_v = carry
        pair = pair_of(number, size=of.q.shape[-2], window=window, axes=axes)
        own_k, own_v = _take(keys.k, pair), _take(keys.v, pair)
        own = QueryTile(*(_read(leaf, pair.query) for leaf in of))
        rows_of_q, sum_k, sum_v = [], jnp.float32(0), jnp.float32(0)
        for rows, seen in _masks(pair, keys, window):
            tile = QueryTile(own.q[..., rows, :], own.grad[..., rows, :], own.delta[..., rows], own.sums[..., rows])
            d_q_rows, d_k_rows, d_v_rows = tile_grads(tile, own_k, own_v, seen)
            rows_of_q.append(d_q_rows)
            sum_k, sum_v = sum_k + d_k_rows, sum_v + d_v_rows
        d_q = _write(d_q, _read(d_q, pair.query) + jnp.concatenate(rows_of_q, axis=3), pair.query)
        return d_q, _add_at(d_k, sum_k, pair), _add_at(d_v, sum_v, pair)

    count = count_pairs(size=of.q.shape[-2], window=window, axes=axes)
    start = _vary((jnp.stack(jnp.split(d_q, 2)), zeros, zeros), of.q, keys.k, keys.v, grad)
    d_q, *others = jax.lax.fori_loop(0, count, add, start)
    scale, dtype = saved.q.shape[-1] ** -0.5, saved.y.dtype
    d_k, d_v = (
        _chunks_back(_scatter((scale_of * leaf).astype(dtype), axes) + jnp.stack(jnp.split(scale_of * own, 2)).astype(dtype))
        for leaf, own, scale_of in zip(others, (d_k, d_v), (scale, 1.0), strict=True)
    )
    d_q_BtNH = tokens_first(_chunks_back(d_q) * scale).astype(dtype)
    return d_q_BtNH, jnp.swapaxes(d_k, 1, 2), jnp.swapaxes(d_v, 1, 2), None


attend_gathered.defvjp(_forward, _backward)


def merge(one: Tile, other: Tile) -> Tile:
    """Return attention to the keys of both tiles."""
    top = jnp.maximum(one.sums, other.sums)
    of_one, of_other = jnp.exp(one.sums - top), jnp.exp(other.sums - top)
    total = of_one + of_other
    mixed = (one.mixed * of_one[..., None] + other.mixed * of_other[..., None]) / total[..., None]
    return Tile(mixed, top + jnp.log(total))


def _masks(pair: Pair, keys: _Keys, window: int) -> Any:
    """Yield the blocks of a chunk's queries, each with the keys of the pair that its queries see."""
    size = keys.k.shape[-2]
    for rows in row_blocks(size):
        segments = None
        if keys.segments is not None:
            of_queries = _read(_read(keys.segments, pair.own_rank), pair.query)
            segments = of_queries[:, rows], _take(keys.segments, pair)
        ahead = (pair.query_chunk - pair.key_chunk) * size + rows.start
        seen = seen_keys((rows.stop - rows.start, size), ahead, window, segments)
        yield rows, seen & pair.is_real


def _chunks_of(leaf: jax.Array, *, dim: int = -2) -> jax.Array:
    """Cut the two chunks of a device apart: [..., t, H] -> [2, ..., n, H]."""
    return jnp.stack(jnp.split(leaf, 2, axis=dim))


def _chunks_back(leaf: jax.Array) -> jax.Array:
    """Undo `_chunks_of`: [2, ..., n, H] -> [..., t, H]."""
    return jnp.concatenate([leaf[0], leaf[1]], axis=-2)


def _join_chunks(leaf: jax.Array, *, dim: int = -2) -> jax.Array:
    """Put the two chunks of a device behind one another in the batch: [B, ..., t, H] -> [2 B, ..., n, H]."""
    return jnp.concatenate(jnp.split(leaf, 2, axis=dim))


def _join_segments(segments_Bt: jax.Array | None) -> jax.Array | None:
    return None if segments_Bt is None else _join_chunks(segments_Bt, dim=1)


def _gather_keys(
    k_BKtH: jax.Array, v_BKtH: jax.Array, segments_Bt: jax.Array | None, axes: tuple[str, ...]
) -> _Keys:
    segments = None if segments_Bt is None else jax.lax.all_gather(_chunks_of(segments_Bt, dim=1), axes)
    return _Keys(_gather(k_BKtH, axes), _gather(v_BKtH, axes), segments)


def _gather(leaf_BKtH: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Gather keys or values over context: [B, K, t, H] -> [c, 2, B, K, n, H]."""
    return jax.lax.all_gather(_chunks_of(leaf_BKtH), axes)


def _scatter(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sum gradients over context, and keep those of the own tokens: [c, 2, B, K, n, H] -> [2, B, K, n, H]."""
    return jax.lax.psum_scatter(leaf, axes, scatter_dimension=0)


def _take(leaf: jax.Array, pair: Pair) -> jax.Array:
    """Return the chunk of keys or values of a pair: [c, 2, B, K, n, H] -> [B, K, n, H]."""
    return _read(_read(leaf, pair.rank), pair.half)


def _add_at(leaf: jax.Array, own: jax.Array, pair: Pair) -> jax.Array:
    of_rank = _read(leaf, pair.rank)
    return _write(leaf, _write(of_rank, _read(of_rank, pair.half) + own, pair.half), pair.rank)


def _read(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _write(leaf: jax.Array, own: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, own, index, 0)


def _vary(tree: Any, *like: jax.Array) -> Any:
    """Mark the start of a loop as its results will be."""
    axes: Sequence[str] = varying_axes(*jax.tree.leaves(tree), *like)
    return jax.tree.map(lambda leaf: mark_varying(leaf, axes), tree)
