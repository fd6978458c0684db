"""The KV cache: keys and values of earlier tokens, so that generating a token computes one token and not all of them.

It is kept in pages of a few tokens (Kwon et al. 2023, "PagedAttention", section 4). A sequence has a list of pages,
which is data, so no program changes shape; two sequences that begin with the same tokens may list the same pages:

    page          0    1    2    3    4    5         4 tokens a page
    sequence a    pages 3, 0, 5    9 tokens: 4 in page 3, 4 in page 0, 1 in page 5
    sequence b    pages 3, 0, 1    the same first 8 tokens, then others

`attention.py` reads the cache; `serve/pages.py` gives pages to sequences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ...meshes import DEFAULT_RULES, ModelError, ShardingRules
from ...meshes.arguments import check_choice, check_count
from ...meshes.device_axes import mark_varying, varying_axes
from ..config import ModelConfig
from .blockwise import cap_scores

CacheDtype = Literal["float32", "bfloat16", "fp8"]
"""Dtype in which keys and values are stored; scores are summed in float32 either way. "fp8" is e4m3 with a scale for
each token and head, so that each number is rounded by at most 1/16 of itself, or 2**-18 of the largest of its head."""

Keys = Literal["keys", "keys_and_values"]
"""What queries are multiplied with: stored keys, or these followed by the values, as of latent vectors."""

BLOCK = 256
"""Number of cached tokens that attention reads at a time."""

_ENDLESS = 1 << 30


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Stored numbers in eight bits, the bits of e4m3 in uint8 [..., H], and their scales, float32 [...]."""

    numbers: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        return self.numbers.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer in pages of S tokens, and the number of cached tokens of each row.

    keys, values [L@pipe, pages@data, K@tensor, S, H], or tuples of such; lengths [P@pipe, B@data]. With `latent_size`
    they are shared keys [L@pipe, pages@data, 1, S, R] and latent vectors [L@pipe, pages@data, 1, S, C]. Each pipeline
    stage has its own lengths, since a token reaches the stages one after another. bfloat16 is stored as its bits, in
    uint16: XLA's CPU backend would scatter it in float32, a copy of the whole cache for each token. In fp8 each is a
    `Scaled`. The class also holds the shapes of a cache (`cache_shapes`).
    """

    keys: Any
    values: Any
    lengths: Any

    @property
    def page(self) -> int:
        """Number of tokens of a page, of the cache of one stack of layers."""
        return self.keys.shape[3]

    def append(self, layer: jax.Array | int, new: "NewTokens", k_BTKH: jax.Array, v_BTKH: jax.Array) -> "KVCache":
        """Return the cache with the keys and values of new tokens in one layer; in place where it is donated."""
        num_tokens = k_BTKH.shape[1]
        head_11K = jnp.arange(k_BTKH.shape[2])[None, None]
        place_BT = new.positions(num_tokens)
        page_BT = jnp.take_along_axis(new.pages, place_BT // self.page, axis=1, mode="clip")
        # A page past the last is dropped by the scatter: padding of a chunk and rows that are not in use go there.
        is_real_BT = jnp.arange(num_tokens)[None] < new.counts[:, None]
        page_BT = jnp.where(is_real_BT, page_BT, self.keys.shape[1])

        place = (layer, page_BT[..., None], head_11K, (place_BT % self.page)[..., None])

        def put(stored: Any, own: jax.Array) -> Any:
            coded = _round(own) if isinstance(stored, Scaled) else _encode(own, stored.dtype)
            return jax.tree.map(lambda all_, new: all_.at[place].set(new, mode="drop"), stored, coded)

        return KVCache(keys=put(self.keys, k_BTKH), values=put(self.values, v_BTKH), lengths=self.lengths)

    def read(self, layer: jax.Array | int, page_Bn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of one layer in n pages of each row: two of [B, K, n * S, H]."""

        def take(stored: Any) -> jax.Array:
            # [B, n, K, S, H], of pages that exist.
            own = jax.tree.map(lambda all_: all_.at[layer, page_Bn].get(mode="promise_in_bounds"), stored)
            pages = jnp.swapaxes(_widen(own) if isinstance(own, Scaled) else _decode(own), 1, 2)
            return pages.reshape(*pages.shape[:2], -1, pages.shape[-1])

        return take(self.keys), take(self.values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """The place of T new tokens of each of B rows: rows `row` to `row + B`, from positions `starts` on.

    The first `counts` of a row's T tokens are real; the others are padding, computed but not written to the cache.
    `pages`, [B, pages], are the pages of each row in the order of their tokens; those not in use are any that exist.
    """

    row: Any
    starts: Any
    counts: Any
    pages: Any

    def positions(self, num_tokens: int) -> jax.Array:
        """Return the position of every token in its sequence: [B, T]."""
        return self.starts[:, None] + jnp.arange(num_tokens)[None]


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

    It reads blocks of about `BLOCK` tokens, from the first that a window shows to the last that any row has filled:
    their number is data. The softmax is a running one (Milakov and Gimelshein 2018, section 3), to which a block that
    a row does not see adds exactly nothing: no row depends on the others. Unused places may hold anything.
    """
    num_rows, num_tokens, num_heads, size = q_BTNH.shape
    num_pages = min(max(BLOCK // cache.page, 1), new.pages.shape[1])
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


def cache_shapes(
    config: ModelConfig,
    *,
    mesh: Mesh,
    num_rows: int,
    num_pages: int,
    page: int,
    dtype: CacheDtype,
    stacks: Sequence[int],
    rules: ShardingRules = DEFAULT_RULES,
) -> KVCache:
    """Return shapes and shardings of an empty cache.

    With fewer key/value heads than `tensor` devices, heads are repeated until every device has one.

    Args:
        num_pages, page: number of pages over all data shards, and of tokens of a page.
        stacks: number of layers a stage in each array.

    Raises:
        ShardingError: pages do not split evenly over `data`.
        ModelError: a count is below 1, or keys and values cannot be stored as `dtype`.
    """
    _check_cache(dtype, num_rows=num_rows, num_pages=num_pages, page=page)
    num_ranks, tensor = mesh.shape[rules.mesh_axes.pipe], math.prod(mesh.shape[axis] for axis in rules.axes("heads"))
    heads, key_size, value_size = _row_sizes(config, tensor=tensor)
    dims = ("stage", "batch", None if config.latent_size else "heads", None, None)

    def array(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
        own = rules.sharding(dims[: len(shape)], shape=shape, mesh=mesh, name="the cache")
        return jax.ShapeDtypeStruct(shape, kind, sharding=own)

    def stack(layers: int, size: int) -> Any:
        shape = (layers * num_ranks, num_pages, heads, page)
        numbers = array(_STORED[dtype], *shape, size)
        return Scaled(numbers=numbers, scales=array(jnp.float32, *shape)) if dtype == "fp8" else numbers

    keys, values = (tuple(stack(layers, size) for layers in stacks) for size in (key_size, value_size))
    return KVCache(keys=keys, values=values, lengths=array(jnp.int32, num_ranks, num_rows))


def _check_cache(dtype: str, **counts: int) -> None:
    check_choice("dtype", dtype, get_args(CacheDtype), error=ModelError)
    for name, count in counts.items():
        check_count(name, count, error=ModelError)


def _row_sizes(config: ModelConfig, *, tensor: int) -> tuple[int, int, int]:
    """Return the heads of a cached token on all devices of tensor, and the features of a key and a value."""
    if config.latent_size:
        return 1, config.rope_head_size, config.latent_size
    # One key/value head a device at least: queries never read another device's cache.
    return max(config.num_kv_heads, tensor), config.head_size, config.head_size


def bytes_per_device(shapes: Any) -> int:
    """Return the bytes on each device of a tree of sharded shapes, a cache or parameters."""

    def one(leaf: jax.ShapeDtypeStruct) -> int:
        assert leaf.sharding is not None
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(shapes)))


_STORED = {"float32": jnp.float32, "bfloat16": jnp.uint16, "fp8": jnp.uint8}


def _encode(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    is_bits = dtype == jnp.uint16
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) if is_bits else x.astype(dtype)


def _decode(stored: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored


def _round(x: jax.Array) -> Scaled:
    """Return x[..., H] in eight bits with a scale [...]: the largest number becomes e4m3's, 448."""
    x = x.astype(jnp.float32)
    top = jnp.abs(x).max(-1)
    # A NaN, which XLA's maximum may pass over, stays one in e4m3; an infinity becomes one.
    scales = jnp.where(top == 0, 1.0, top / 448)
    numbers = (x / scales[..., None]).astype(jnp.float8_e4m3fn)
    return Scaled(numbers=jax.lax.bitcast_convert_type(numbers, jnp.uint8), scales=scales)


def _widen(stored: Scaled) -> jax.Array:
    numbers = jax.lax.bitcast_convert_type(stored.numbers, jnp.float8_e4m3fn)
    return numbers.astype(jnp.float32) * stored.scales[..., None]
