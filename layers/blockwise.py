"""Causal attention in plain XLA, one block of queries at a time, for devices without a fused kernel.

A block of queries is multiplied only with the keys that its mask leaves visible:

    keys     0    1    2    3          # computed    . never computed
    block 0  #    .    .    .
    block 1  #    #    .    .          about half of the [T, T] scores, and those of one block at a time
    block 2  #    #    #    .
    block 3  #    #    #    #

As in Dao 2023 ("FlashAttention-2", section 3) the forward keeps one number for every query, the logarithm of its
softmax's sum, and the backward recomputes the scores.
"""

from collections.abc import Iterator
from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

FLASH_OUTPUTS = "flash_outputs"
"""Checkpoint name of attention's outputs: rematerialization keeps them, so the backward does not recompute them."""

MIN_BLOCK, MAX_BLOCK, NUM_BLOCKS = 64, 1024, 4
"""Bounds on the queries of a block, and the number of blocks within them.

Of four blocks' scores on the diagonal half are masked, an eighth of all [T, T] that is computed for nothing; each block
is code of its own, so more blocks would waste less and compile longer."""

_HIDDEN = -1e30
"""Score of a masked key: its share of the softmax is 0, and unlike -inf it cannot become NaN."""


def attend_blockwise(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, segments_BT: jax.Array | None = None
) -> jax.Array:
    """Compute causal attention, within the last `window` tokens unless that is 0.

    q[B, T, N, H], k and v[B, T, K, H] -> mixed[B, T, N, H]; sharded alike over B and over heads, no communication.
    Softmax and sums are in float32.

    Args:
        segments_BT: the number of each token's document; a token sees those of its own document alone.
    """
    return _attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, window: int
) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)[0]


class Saved(NamedTuple):
    """Residuals.

    q [B, K, G, T, H], k and v [B, K, T, H], the documents of tokens [B, T], the output y [B, T, N, H], and for every
    query the logarithm of its softmax's sum [B, K, G, T].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    y: jax.Array
    sums: jax.Array


def _forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, window: int
) -> tuple[jax.Array, Saved]:
    # Batched products want heads before tokens: transposed once here, not in every product.
    q_BKGTH = heads_first(q_BTNH, k_BTKH.shape[2])
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    mixed_BKGTH, sums_BKGT = attend_blocks(q_BKGTH, k_BKTH, v_BKTH, segments_BT, window=window, dtype=q_BTNH.dtype)
    y_BTNH, sums_BKGT = checkpoint_name((tokens_first(mixed_BKGTH), sums_BKGT), FLASH_OUTPUTS)
    return y_BTNH, Saved(q_BKGTH, k_BKTH, v_BKTH, segments_BT, y_BTNH, sums_BKGT)


def _backward(
    window: int, saved: Saved, grad_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    grad_BKGTH, delta_BKGT = heads_first(grad_BTNH, saved.k.shape[1]), softmax_delta(saved, grad_BTNH)
    d_q, d_k, d_v = block_grads(saved, grad_BKGTH, delta_BKGT, window=window)
    scale, dtype = saved.q.shape[-1] ** -0.5, saved.y.dtype
    d_k_BTKH, d_v_BTKH = (jnp.swapaxes(d_BKTH, 1, 2).astype(dtype) for d_BKTH in (d_k * scale, d_v))
    return tokens_first(d_q * scale).astype(dtype), d_k_BTKH, d_v_BTKH, None


_attend.defvjp(_forward, _backward)


def softmax_delta(saved: Saved, grad_BTNH: jax.Array) -> jax.Array:
    """Return for every query what the softmax's backward subtracts, float32 [B, K, G, T].

    It is the sum over keys of share x gradient of the share (D in the paper's algorithm 2). That equals the sum over
    features of output x gradient of the output, so no [T, T] array is needed for it.
    """
    delta_BTN = (grad_BTNH.astype(jnp.float32) * saved.y.astype(jnp.float32)).sum(-1)
    return jnp.swapaxes(delta_BTN, 1, 2).reshape(saved.sums.shape)


def attend_blocks(
    q_BKGTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    window: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Compute causal attention block by block: mixed[B, K, G, T, H] in `dtype`, and sums [B, K, G, T] in float32."""
    mixed, sums = [], []
    for rows, keys in _blocks(q_BKGTH.shape[3], window):
        seen = _seen_in_block(rows, keys, window, segments_BT)
        own = attend_tile(q_BKGTH[..., rows, :], k_BKTH[:, :, keys], v_BKTH[:, :, keys], seen)
        mixed.append(own.mixed.astype(dtype))
        sums.append(own.sums)
    return jnp.concatenate(mixed, axis=3), jnp.concatenate(sums, axis=3)


def block_grads(
    saved: Saved, grad_BKGTH: jax.Array, delta_BKGT: jax.Array, *, window: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return gradients of queries [B, K, G, T, H], keys and values [B, K, T, H], in float32; two of them not scaled."""
    num_tokens = saved.q.shape[3]
    d_q, d_k, d_v = [], [], []
    for rows, keys in _blocks(num_tokens, window):
        seen = _seen_in_block(rows, keys, window, saved.segments)
        given = QueryTile(saved.q[..., rows, :], grad_BKGTH[..., rows, :], delta_BKGT[..., rows], saved.sums[..., rows])
        d_q_BKGtH, d_k_BKsH, d_v_BKsH = tile_grads(given, saved.k[:, :, keys], saved.v[:, :, keys], seen)
        d_q.append(d_q_BKGtH)
        # A block's gradient of keys and values, padded to all of them: sums of whole arrays, no scatter.
        around = [(0, 0), (0, 0), (keys.start, num_tokens - keys.stop), (0, 0)]
        d_k.append(jnp.pad(d_k_BKsH, around))
        d_v.append(jnp.pad(d_v_BKsH, around))
    return jnp.concatenate(d_q, axis=3), reduce(add, d_k), reduce(add, d_v)


class Tile(NamedTuple):
    """Attention to some keys: what they give [B, K, G, t, H], and the logarithm of the softmax's sum [B, K, G, t]."""

    mixed: jax.Array
    sums: jax.Array


class QueryTile(NamedTuple):
    """What the backward reads of some queries.

    Themselves and the gradient of their output [B, K, G, t, H]; what `softmax_delta` returns, and the logarithm of the
    softmax's sum over all keys [B, K, G, t].
    """

    q: jax.Array
    grad: jax.Array
    delta: jax.Array
    sums: jax.Array


def attend_tile(q_BKGtH: jax.Array, k_BKsH: jax.Array, v_BKsH: jax.Array, seen: jax.Array) -> Tile:
    """Return attention of queries to keys, both float32; seen[B or 1, 1, 1, t, s] says which key each sees."""
    scores_BKGts = _scores(q_BKGtH, k_BKsH, seen)
    top_BKGt = scores_BKGts.max(-1)
    exp_BKGts = jnp.exp(scores_BKGts - top_BKGt[..., None])
    sum_BKGt = exp_BKGts.sum(-1)
    mixed_BKGtH = _einsum("bkgts,bksh->bkgth", exp_BKGts.astype(v_BKsH.dtype), v_BKsH)
    return Tile(mixed_BKGtH / sum_BKGt[..., None], top_BKGt + jnp.log(sum_BKGt))


def tile_grads(
    of: QueryTile, k_BKsH: jax.Array, v_BKsH: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return gradients of queries [B, K, G, t, H], keys and values [B, K, s, H] by the scores of a tile, float32.

    Those of queries and keys are still to be scaled by H ** -0.5.
    """
    dtype = of.q.dtype
    share_BKGts = jnp.exp(_scores(of.q, k_BKsH, seen) - of.sums[..., None])
    d_share_BKGts = _einsum("bkgth,bksh->bkgts", of.grad, v_BKsH)
    d_scores_BKGts = (share_BKGts * (d_share_BKGts - of.delta[..., None])).astype(dtype)
    d_q_BKGtH = _einsum("bkgts,bksh->bkgth", d_scores_BKGts, k_BKsH)
    d_k_BKsH = _einsum("bkgts,bkgth->bksh", d_scores_BKGts, of.q)
    return d_q_BKGtH, d_k_BKsH, _einsum("bkgts,bkgth->bksh", share_BKGts.astype(dtype), of.grad)


class _Block(NamedTuple):
    """Positions of a block's queries, and of the keys that any of them sees."""

    rows: slice
    keys: slice


def _blocks(num_tokens: int, window: int) -> Iterator[_Block]:
    for rows in row_blocks(num_tokens):
        yield _Block(rows, slice(max(0, rows.start + 1 - window) if window else 0, rows.stop))


def row_blocks(num_tokens: int) -> Iterator[slice]:
    """Yield the blocks that queries are cut into."""
    size = min(max(-(-num_tokens // NUM_BLOCKS), MIN_BLOCK), MAX_BLOCK)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _seen_in_block(rows: slice, keys: slice, window: int, segments_BT: jax.Array | None) -> jax.Array:
    segments = None if segments_BT is None else (segments_BT[:, rows], segments_BT[:, keys])
    return seen_keys((rows.stop - rows.start, keys.stop - keys.start), rows.start - keys.start, window, segments)


def seen_keys(
    shape: tuple[int, int], ahead: jax.Array | int, window: int, segments: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Return which of s keys each of t queries sees, bool [B or 1, 1, 1, t, s].

    Args:
        ahead: by how many tokens the first query is behind the first key.
        segments: documents of the queries [B, t] and of the keys [B, s].
    """
    at_t, at_s = (jax.lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
    behind = at_t - at_s + ahead
    seen = ((behind >= 0) & (behind < window) if window else behind >= 0)[None]
    if segments is not None:
        seen &= segments[0][:, :, None] == segments[1][:, None, :]
    return seen[:, None, None]


def _scores(q_BKGtH: jax.Array, k_BKsH: jax.Array, seen: jax.Array) -> jax.Array:
    # Scaled in float32: queries in the compute dtype would be rounded once more.
    scores_BKGts = _einsum("bkgth,bksh->bkgts", q_BKGtH, k_BKsH) * q_BKGtH.shape[-1] ** -0.5
    return jnp.where(seen, scores_BKGts, _HIDDEN)


def _einsum(formula: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *arrays, preferred_element_type=jnp.float32)


def heads_first(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Transpose [B, T, N, H] -> [B, K, G, T, H]: query heads in G groups per key/value head."""
    x_BNTH = jnp.swapaxes(x_BTNH, 1, 2)
    return x_BNTH.reshape(x_BNTH.shape[0], num_kv_heads, -1, *x_BNTH.shape[2:])


def tokens_first(x_BKGTH: jax.Array) -> jax.Array:
    """Undo `heads_first`: [B, K, G, T, H] -> [B, T, N, H]."""
    return jnp.swapaxes(x_BKGTH.reshape(x_BKGTH.shape[0], -1, *x_BKGTH.shape[3:]), 1, 2)
