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

FLASH_OUTPUTS = "flash_outputs"
"""Checkpoint name of attention's outputs: rematerialization keeps them, so the backward does not recompute them."""

MIN_BLOCK, MAX_BLOCK, NUM_BLOCKS = 64, 1024, 4
"""Bounds on the queries of a block, and the number of blocks within them.

Of four blocks' scores on the diagonal half are masked, an eighth of all [T, T] that is computed for nothing; each block
is code of its own, so more blocks would waste less and compile longer."""

_HIDDEN = -1e30
"""Score of a masked key: its share of the softmax is 0, and unlike -inf it cannot become NaN."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_blockwise(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int) -> jax.Array:
    """Compute causal attention, within the last `window` tokens unless that is 0.

    q[B, T, N, H], k and v[B, T, K, H] -> mixed[B, T, N, H]; sharded alike over B and over heads, no communication.
    Softmax and sums are in float32.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, window)[0]


_Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""Residuals: queries [B, K, G, T, H], keys and values [B, K, T, H], the output [B, T, N, H], and for every query the
logarithm of its softmax's sum [B, K, G, T]."""


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int) -> tuple[jax.Array, _Saved]:
    # Batched products want heads before tokens: transposed once here, not in every product.
    q_BKGTH = _heads_first(q_BTNH, k_BTKH.shape[2])
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    mixed, sums = [], []
    for block in _blocks(q_BTNH.shape[1], window):
        scores_BKGts = _scores(q_BKGTH, k_BKTH, block, window)
        top_BKGt = scores_BKGts.max(-1)
        exp_BKGts = jnp.exp(scores_BKGts - top_BKGt[..., None])
        sum_BKGt = exp_BKGts.sum(-1)
        mixed_BKGtH = _einsum("bkgts,bksh->bkgth", exp_BKGts.astype(v_BKTH.dtype), v_BKTH[:, :, block.keys])
        mixed.append((mixed_BKGtH / sum_BKGt[..., None]).astype(q_BTNH.dtype))
        sums.append(top_BKGt + jnp.log(sum_BKGt))
    y_BTNH, sums_BKGT = _tokens_first(jnp.concatenate(mixed, axis=3)), jnp.concatenate(sums, axis=3)
    y_BTNH, sums_BKGT = checkpoint_name((y_BTNH, sums_BKGT), FLASH_OUTPUTS)
    return y_BTNH, (q_BKGTH, k_BKTH, v_BKTH, y_BTNH, sums_BKGT)


def _backward(window: int, saved: _Saved, grad_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BKGTH, k_BKTH, v_BKTH, y_BTNH, sums_BKGT = saved
    num_tokens, dtype = y_BTNH.shape[1], y_BTNH.dtype
    grad_BKGTH = _heads_first(grad_BTNH, k_BKTH.shape[1])
    # The softmax's backward needs the sum over keys of share x gradient of the share (D in the paper's algorithm 2). It
    # equals the sum over features of output x gradient of the output, so no [T, T] array is needed for it.
    delta_BTN = (grad_BTNH.astype(jnp.float32) * y_BTNH.astype(jnp.float32)).sum(-1)
    delta_BKGT = jnp.swapaxes(delta_BTN, 1, 2).reshape(sums_BKGT.shape)
    d_q, d_k, d_v = [], [], []
    for block in _blocks(num_tokens, window):
        rows, keys = block
        grad_BKGtH = grad_BKGTH[..., rows, :]
        share_BKGts = jnp.exp(_scores(q_BKGTH, k_BKTH, block, window) - sums_BKGT[..., rows, None])
        d_share_BKGts = _einsum("bkgth,bksh->bkgts", grad_BKGtH, v_BKTH[:, :, keys])
        d_scores_BKGts = (share_BKGts * (d_share_BKGts - delta_BKGT[..., rows, None])).astype(dtype)
        d_q.append(_einsum("bkgts,bksh->bkgth", d_scores_BKGts, k_BKTH[:, :, keys]))
        d_k_BKsH = _einsum("bkgts,bkgth->bksh", d_scores_BKGts, q_BKGTH[..., rows, :])
        d_v_BKsH = _einsum("bkgts,bkgth->bksh", share_BKGts.astype(dtype), grad_BKGtH)
        # A block's gradient of keys and values, padded to all of them: sums of whole arrays, no scatter.
        around = [(0, 0), (0, 0), (keys.start, num_tokens - keys.stop), (0, 0)]
        d_k.append(jnp.pad(d_k_BKsH, around))
        d_v.append(jnp.pad(d_v_BKsH, around))
    scale = q_BKGTH.shape[-1] ** -0.5
    d_q_BKGTH, d_k_BKTH, d_v_BKTH = jnp.concatenate(d_q, axis=3) * scale, reduce(add, d_k) * scale, reduce(add, d_v)
    d_k_BTKH, d_v_BTKH = (jnp.swapaxes(d_BKTH, 1, 2).astype(dtype) for d_BKTH in (d_k_BKTH, d_v_BKTH))
    return _tokens_first(d_q_BKGTH).astype(dtype), d_k_BTKH, d_v_BTKH


attend_blockwise.defvjp(_forward, _backward)


class _Block(NamedTuple):
    """Positions of a block's queries, and of the keys that any of them sees."""

    rows: slice
    keys: slice


def _blocks(num_tokens: int, window: int) -> Iterator[_Block]:
    size = min(max(-(-num_tokens // NUM_BLOCKS), MIN_BLOCK), MAX_BLOCK)
    for start in range(0, num_tokens, size):
        end = min(start + size, num_tokens)
        yield _Block(slice(start, end), slice(max(0, start + 1 - window) if window else 0, end))


def _scores(q_BKGTH: jax.Array, k_BKTH: jax.Array, block: _Block, window: int) -> jax.Array:
    rows, keys = block
    # Scaled in float32: queries in the compute dtype would be rounded once more.
    scores_BKGts = _einsum("bkgth,bksh->bkgts", q_BKGTH[..., rows, :], k_BKTH[:, :, keys]) * q_BKGTH.shape[-1] ** -0.5
    at_t, at_s = (jax.lax.broadcasted_iota(jnp.int32, scores_BKGts.shape, dim) for dim in (3, 4))
    behind = at_t - at_s + (rows.start - keys.start)
    seen = (behind >= 0) & (behind < window) if window else behind >= 0
    return jnp.where(seen, scores_BKGts, _HIDDEN)


def _einsum(formula: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *arrays, preferred_element_type=jnp.float32)


def _heads_first(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Transpose [B, T, N, H] -> [B, K, G, T, H]: query heads in G groups per key/value head."""
    x_BNTH = jnp.swapaxes(x_BTNH, 1, 2)
    return x_BNTH.reshape(x_BNTH.shape[0], num_kv_heads, -1, *x_BNTH.shape[2:])


def _tokens_first(x_BKGTH: jax.Array) -> jax.Array:
    return jnp.swapaxes(x_BKGTH.reshape(x_BKGTH.shape[0], -1, *x_BKGTH.shape[3:]), 1, 2)
