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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ..options.by_layer import choose_window
from ..options.sinks import add_sinks, sink_grads

FLASH_OUTPUTS = "flash_outputs"
"""Checkpoint name of attention's outputs: rematerialization keeps them, so the backward does not recompute them."""

MIN_BLOCK, MAX_BLOCK, NUM_BLOCKS = 64, 1024, 4
"""Bounds on the queries of a block, and the number of blocks within them.

Of four blocks' scores on the diagonal half are masked, an eighth of all [T, T] that is computed for nothing; each block
is code of its own, so more blocks would waste less and compile longer."""

_HIDDEN = -1e30
"""Score of a masked key: its share of the softmax is 0, and unlike -inf it cannot become NaN."""


def attend_blockwise(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    window: int,
    segments_BT: jax.Array | None = None,
    *,
    is_windowed: jax.Array | None = None,
    cap: float = 0.0,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Compute causal attention, within the last `window` tokens unless that is 0.

    q[B, T, N, H], k and v[B, T, K, H] -> mixed[B, T, N, H]; sharded alike over B and over heads, no communication.
    Softmax and sums are in float32.

    Args:
        segments_BT: the number of each token's document; a token sees those of its own document alone.
        is_windowed: whether the window counts, bool []; it does if left out.
        cap: the soft cap of scores, 0 for none.
        sinks_N: a score of each head that has no key, see `../options/sinks.py`.
    """
    return _attend(q_BTNH, k_BTKH, v_BTKH, Limits(segments_BT, is_windowed, sinks_N), Scoring(window, cap))


class Scoring(NamedTuple):
    """The window of a query, and the cap c of scores s, c tanh(s / c); 0 for none."""

    window: int = 0
    cap: float = 0.0


class Limits(NamedTuple):
    """What limits the shares of the keys of a sequence in a query's softmax.

    Documents [B, T], whether the window counts, bool [], and scores of the heads without a key [N].
    """

    segments: jax.Array | None = None
    is_windowed: jax.Array | None = None
    sinks: jax.Array | None = None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, limits: Limits, how: Scoring) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, limits, how)[0]


class Saved(NamedTuple):
    """Residuals.

    q [B, K, G, T, H], k and v [B, K, T, H], the documents of tokens [B, T], the output y [B, T, N, H], and for every
    query the logarithm of its softmax's sum [B, K, G, T], sinks included.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    y: jax.Array
    sums: jax.Array
    is_windowed: jax.Array | None = None
    sinks: jax.Array | None = None


def _forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, limits: Limits, how: Scoring
) -> tuple[jax.Array, Saved]:
    # Batched products want heads before tokens: transposed once here, not in every product.
    q_BKGTH = heads_first(q_BTNH, k_BTKH.shape[2])
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)

    def run(window: int, *given: Any) -> tuple[jax.Array, jax.Array]:
        return attend_blocks(*given, how=how._replace(window=window), dtype=q_BTNH.dtype)

    given = (q_BKGTH, k_BKTH, v_BKTH, limits.segments)
    mixed_BKGTH, sums_BKGT = choose_window(limits.is_windowed, how.window, run, *given)
    y_BTNH = tokens_first(mixed_BKGTH)
    if limits.sinks is not None:
        y_BTNH, sums_BNT = add_sinks(y_BTNH, _all_heads(sums_BKGT), limits.sinks)
        sums_BKGT = sums_BNT.reshape(sums_BKGT.shape)
    y_BTNH, sums_BKGT = checkpoint_name((y_BTNH, sums_BKGT), FLASH_OUTPUTS)
    return y_BTNH, Saved(*given, y_BTNH, sums_BKGT, limits.is_windowed, limits.sinks)


def _backward(how: Scoring, saved: Saved, grad_BTNH: jax.Array) -> tuple[Any, ...]:
    grad_BKGTH, delta_BKGT = heads_first(grad_BTNH, saved.k.shape[1]), softmax_delta(saved, grad_BTNH)

    def run(window: int, *given: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        *saved, grad_BKGTH, delta_BKGT = given
        return block_grads(Saved(*saved), grad_BKGTH, delta_BKGT, how=how._replace(window=window))

    given = (*saved[:6], grad_BKGTH, delta_BKGT)
    d_q, d_k, d_v = choose_window(saved.is_windowed, how.window, run, *given)
    scale, dtype = saved.q.shape[-1] ** -0.5, saved.y.dtype
    d_k_BTKH, d_v_BTKH = (jnp.swapaxes(d_BKTH, 1, 2).astype(dtype) for d_BKTH in (d_k * scale, d_v))
    d_sinks_N = None
    if saved.sinks is not None:
        d_sinks_N = sink_grads(grad_BTNH, saved.y, _all_heads(saved.sums), saved.sinks)
    return tokens_first(d_q * scale).astype(dtype), d_k_BTKH, d_v_BTKH, Limits(sinks=d_sinks_N)


_attend.defvjp(_forward, _backward)


def _all_heads(sums_BKGT: jax.Array) -> jax.Array:
    return sums_BKGT.reshape(sums_BKGT.shape[0], -1, sums_BKGT.shape[-1])


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
    how: Scoring,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Compute causal attention block by block: mixed[B, K, G, T, H] in `dtype`, and sums [B, K, G, T] in float32."""
    mixed, sums = [], []
    for rows, keys in _blocks(q_BKGTH.shape[3], how.window):
        seen = _seen_in_block(rows, keys, how.window, segments_BT)
        own = attend_tile(q_BKGTH[..., rows, :], k_BKTH[:, :, keys], v_BKTH[:, :, keys], seen, cap=how.cap)
        mixed.append(own.mixed.astype(dtype))
        sums.append(own.sums)
    return jnp.concatenate(mixed, axis=3), jnp.concatenate(sums, axis=3)


def block_grads(
    saved: Saved, grad_BKGTH: jax.Array, delta_BKGT: jax.Array, *, how: Scoring
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return gradients of queries [B, K, G, T, H], keys and values [B, K, T, H], in float32; two of them not scaled."""
    num_tokens = saved.q.shape[3]
    d_q, d_k, d_v = [], [], []
    for rows, keys in _blocks(num_tokens, how.window):
        seen = _seen_in_block(rows, keys, how.window, saved.segments)
        given = QueryTile(saved.q[..., rows, :], grad_BKGTH[..., rows, :], delta_BKGT[..., rows], saved.sums[..., rows])
        d_q_BKGtH, d_k_BKsH, d_v_BKsH = tile_grads(given, saved.k[:, :, keys], saved.v[:, :, keys], seen, cap=how.cap)
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


def attend_tile(q_BKGtH: jax.Array, k_BKsH: jax.Array, v_BKsH: jax.Array, seen: jax.Array, *, cap: float = 0.0) -> Tile:
    """Return attention of queries to keys, both float32; seen[B or 1, 1, 1, t, s] says which key each sees."""
    scores_BKGts = jnp.where(seen, cap_scores(_scores(q_BKGtH, k_BKsH), cap), _HIDDEN)
    top_BKGt = scores_BKGts.max(-1)
    exp_BKGts = jnp.exp(scores_BKGts - top_BKGt[..., None])
    sum_BKGt = exp_BKGts.sum(-1)
    mixed_BKGtH = _einsum("bkgts,bksh->bkgth", exp_BKGts.astype(v_BKsH.dtype), v_BKsH)
    return Tile(mixed_BKGtH / sum_BKGt[..., None], top_BKGt + jnp.log(sum_BKGt))


def tile_grads(
    of: QueryTile, k_BKsH: jax.Array, v_BKsH: jax.Array, seen: jax.Array, *, cap: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return gradients of queries [B, K, G, t, H], keys and values [B, K, s, H] by the scores of a tile, float32.

    Those of queries and keys are still to be scaled by H ** -0.5.
    """
    dtype = of.q.dtype
    scores_BKGts = cap_scores(_scores(of.q, k_BKsH), cap)
    share_BKGts = jnp.exp(jnp.where(seen, scores_BKGts, _HIDDEN) - of.sums[..., None])
    d_share_BKGts = _einsum("bkgth,bksh->bkgts", of.grad, v_BKsH)
    d_scores_BKGts = share_BKGts * (d_share_BKGts - of.delta[..., None])
    if cap:
        # The derivative of c tanh(s / c) is 1 - tanh(s / c)^2.
        d_scores_BKGts *= 1 - jnp.square(scores_BKGts / cap)
    d_scores_BKGts = d_scores_BKGts.astype(dtype)
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


def _scores(q_BKGtH: jax.Array, k_BKsH: jax.Array) -> jax.Array:
    # Scaled in float32: queries in the compute dtype would be rounded once more.
    return _einsum("bkgth,bksh->bkgts", q_BKGtH, k_BKsH) * q_BKGtH.shape[-1] ** -0.5


def cap_scores(scores: jax.Array, cap: float) -> jax.Array:
    """Return c tanh(s / c) of scores or logits in float32, or themselves without a cap (Gemma Team 2024, section 2)."""
    return jnp.tanh(scores / cap) * cap if cap else scores


def _einsum(formula: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *arrays, preferred_element_type=jnp.float32)


def heads_first(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Transpose [B, T, N, H] -> [B, K, G, T, H]: query heads in G groups per key/value head."""
    x_BNTH = jnp.swapaxes(x_BTNH, 1, 2)
    return x_BNTH.reshape(x_BNTH.shape[0], num_kv_heads, -1, *x_BNTH.shape[2:])


def tokens_first(x_BKGTH: jax.Array) -> jax.Array:
    """Undo `heads_first`: [B, K, G, T, H] -> [B, T, N, H]."""
    return jnp.swapaxes(x_BKGTH.reshape(x_BKGTH.shape[0], -1, *x_BKGTH.shape[3:]), 1, 2)
