"""Attention of new tokens to a cache in pages: blocks of it one after another, with a running softmax.

The number of blocks is data, so one program serves sequences of any length and reads what they have. Read `cache.py`
for the pages.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ...meshes.device_axes import mark_varying, varying_axes
from .blockwise import cap_scores
from .cache import KVCache, NewTokens

Keys = Literal["keys", "keys_and_values"]
"""What queries are multiplied with: stored keys, or these followed by the values, as of latent vectors."""

BLOCK, MOST_BLOCK, BLOCK_ROWS = 256, 1024, 4096
"""Number of cached tokens of a row that attention reads at a time: 256; when it decodes few rows up to 1,024, 4,096 of
all rows together, since a block is a dozen kernels, which on a GPU take longer than what few rows read in them."""

_ENDLESS = 1 << 30


class CacheScoring(NamedTuple):
    """How new tokens attend to cached ones.

    window: number of visible tokens, the token itself included; 0 is all.
    is_windowed: whether the window counts in this layer, bool []; it does if left out.
    keys: what queries are multiplied with.
    scale: what scores are multiplied with; 1 / sqrt(H) if left out.
    cap: the soft cap of scores, 0 for none.
    sinks: a score of each head that has no key, [N@tensor], see `../options/sinks.py`.
    """

    window: int = 0
    is_windowed: jax.Array | None = None
    keys: Keys = "keys"
    scale: float | None = None
    cap: float = 0.0
    sinks: jax.Array | None = None


@jax.named_scope("attend")
def attend(
    q_BTNH: jax.Array, *, cache: KVCache, layer: jax.Array | int, new: NewTokens, scoring: CacheScoring
) -> jax.Array:
    """Compute attention of new tokens to the cache: cached token s is visible from position s on.

    q[B@data, T, N@tensor, H] -> y[B@data, T, N@tensor, features of a value]; no communication. Scores and sums are
    float32.

    It reads blocks of `block_tokens` tokens, from the first that a window shows to the last that any row has filled:
    their number is data. The softmax is a running one (Milakov and Gimelshein 2018, section 3), to which a block that
    a row does not see adds exactly nothing: no row depends on the others. Unused places may hold anything.
    """
    num_rows, num_tokens, num_heads, size = q_BTNH.shape
    sizes = {"num_rows": num_rows, "num_tokens": num_tokens, "window": scoring.window}
    num_pages = min(max(block_tokens(**sizes) // cache.page, 1), new.pages.shape[1])
    new = replace(new, pages=jnp.pad(new.pages, ((0, 0), (0, -new.pages.shape[1] % num_pages))))
    # Queries of one key/value head side by side: then both products are plain ones for each row and head.
    q_BKGTH = q_BTNH.reshape(num_rows, num_tokens, cache.keys.shape[2], -1, size).transpose(0, 2, 3, 1, 4)
    scale = size**-0.5 if scoring.scale is None else scoring.scale
    # A window that does not count is longer than any sequence.
    window: Any = scoring.window
    if scoring.is_windowed is not None:
        window = jnp.where(scoring.is_windowed, window, _ENDLESS)
    how: dict[str, Any] = {"num_pages": num_pages, "num_tokens": num_tokens, "window": window, "keys": scoring.keys}

    def add_block(number: jax.Array, so_far: _Softmax) -> _Softmax:
        block = _read_block(number, cache, layer, new, **how)
        return _add_block(so_far, q_BKGTH, block, scale=scale, cap=scoring.cap)

    first, last = _blocks_in_use(new, size=num_pages * cache.page, window=window)
    total = jax.lax.fori_loop(first, last, add_block, _nothing_seen(q_BKGTH, cache.values, scoring.sinks))
    # The largest score adds 1 to the sum; rows that are not in use have seen nothing.
    mixed_BKGTU = (total.mixed / jnp.maximum(total.sum, 1.0)).astype(q_BTNH.dtype)
    return mixed_BKGTU.transpose(0, 3, 1, 2, 4).reshape(num_rows, num_tokens, num_heads, -1)


def block_tokens(*, num_rows: int, num_tokens: int, window: int = 0) -> int:
    """Return the cached tokens of a row that attention of `num_tokens` new tokens in each row reads at a time."""
    most = min(MOST_BLOCK, window or MOST_BLOCK, BLOCK_ROWS // (num_rows * num_tokens))
    return max(BLOCK, 1 << most.bit_length() - 1 if most else 0)


def _blocks_in_use(new: NewTokens, *, size: int, window: int | jax.Array) -> tuple[jax.Array | int, jax.Array]:
    """Return the first block of `size` tokens that any row sees, and the end of the last."""
    is_real_B, end_B = new.counts > 0, new.starts + new.counts
    last = (jnp.where(is_real_B, end_B, 0).max() + size - 1) // size
    if isinstance(window, int) and not window:
        return 0, last
    return jnp.maximum(jnp.where(is_real_B, new.starts + 1 - window, end_B).min(), 0) // size, last


class _Block(NamedTuple):
    """Cached tokens: keys [B, K, S, H], values [B, K, S, U], and which of them new tokens see, [B, T, S]."""

    keys: jax.Array
    values: jax.Array
    is_seen: jax.Array


def _read_block(
    number: jax.Array,
    cache: KVCache,
    layer: jax.Array | int,
    new: NewTokens,
    *,
    num_pages: int,
    num_tokens: int,
    window: int | jax.Array,
    keys: Keys,
) -> _Block:
    """Return a block of `num_pages` pages of each row, as `num_tokens` new tokens see it."""
    own = jax.lax.dynamic_slice_in_dim(new.pages, number * num_pages, num_pages, axis=1)
    keys_BKSH, values_BKSU = cache.read(layer, own)
    if keys == "keys_and_values":
        keys_BKSH = jnp.concatenate([keys_BKSH, values_BKSU], axis=-1)
    place_1S = (number * num_pages * cache.page + jnp.arange(num_pages * cache.page))[None]
    positions_BT1 = new.positions(num_tokens)[..., None]
    is_used_BS = place_1S < (new.starts + new.counts)[:, None]
    is_seen_BTS = is_used_BS[:, None] & (place_1S[None] <= positions_BT1)
    if not isinstance(window, int) or window:
        is_seen_BTS &= place_1S[None] > positions_BT1 - window
    # A weight of 0 does not hide a NaN of an unused place.
    return _Block(keys_BKSH, jnp.where(is_used_BS[:, None, :, None], values_BKSU, 0), is_seen_BTS)


class _Softmax(NamedTuple):
    """A softmax over some keys: largest score and sum of exponentials [B, K, G, T, 1], mixed values [B, K, G, T, U]."""

    top: jax.Array
    sum: jax.Array
    mixed: jax.Array


def _nothing_seen(q_BKGTH: jax.Array, values: Any, sinks_N: jax.Array | None) -> _Softmax:
    """Return the softmax over no keys, or over sinks alone, varying over the axes of the queries and of the cache."""
    *outer, _ = q_BKGTH.shape
    top, sum_, mixed = (jnp.full((*outer, n), x) for n, x in ((1, -jnp.inf), (1, 0.0), (values.shape[-1], 0.0)))
    if sinks_N is not None:
        # A score like any other, of the value 0.
        sinks_1KG11 = sinks_N.astype(jnp.float32).reshape(1, *q_BKGTH.shape[1:3], 1, 1)
        top, sum_ = jnp.broadcast_to(sinks_1KG11, top.shape), jnp.ones_like(sum_)
    both = tuple({*varying_axes(jax.tree.leaves(values)[0]), *varying_axes(q_BKGTH)})
    return _Softmax(*(mark_varying(x, both) for x in (top, sum_, mixed)))


def _add_block(so_far: _Softmax, q_BKGTH: jax.Array, block: _Block, *, scale: float, cap: float) -> _Softmax:
    keys_BKSH, values_BKSU = (stored.astype(q_BKGTH.dtype) for stored in (block.keys, block.values))
    scores_BKGTS = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, keys_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(block.is_seen[:, None, None], cap_scores(scores_BKGTS * scale, cap), -jnp.inf)
    top = jnp.maximum(so_far.top, scores_BKGTS.max(-1, keepdims=True))
    # Of a row that has seen nothing yet the largest is -inf, and -inf - -inf is NaN.
    finite_top = jnp.where(top == -jnp.inf, 0.0, top)
    old, weights_BKGTS = jnp.exp(so_far.top - finite_top), jnp.exp(scores_BKGTS - finite_top)
    mixed_BKGTU = jnp.einsum(
        "bkgts,bksu->bkgtu", weights_BKGTS.astype(q_BKGTH.dtype), values_BKSU, preferred_element_type=jnp.float32
    )
    return _Softmax(top, so_far.sum * old + weights_BKGTS.sum(-1, keepdims=True), so_far.mixed * old + mixed_BKGTU)
