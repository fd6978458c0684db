"""The KV cache: keys and values of earlier tokens, so that generating a token computes one token and not all of them.

A cache has a fixed number of rows (sequences) and of tokens a row, so that no program changes shape. Every row has its
own length, and new tokens are written behind it. `attention.py` reads the cache.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from ..meshes import DEFAULT_RULES, ModelError, ShardingRules
from ..meshes.arguments import check_choice, check_count
from ..meshes.device_axes import mark_varying, varying_axes
from .config import ModelConfig

CacheDtype = Literal["float32", "bfloat16"]
"""Dtype in which keys and values are stored; scores are summed in float32 either way."""

BLOCK = 256
"""Number of cached tokens that attention reads at a time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer, and the number of cached tokens of each row.

    keys, values [L@pipe, B@data, K@tensor, S, H], or tuples of such; lengths [P@pipe, B@data]. Each pipeline stage has
    its own lengths, since a token reaches the stages one after another. bfloat16 is stored as its bits, in uint16:
    XLA's CPU backend would scatter it in float32, a copy of the whole cache for each token. The class also holds the
    shapes of a cache (`cache_shapes`).
    """

    keys: Any
    values: Any
    lengths: Any

    def append(self, layer: jax.Array | int, new: "NewTokens", k_BTKH: jax.Array, v_BTKH: jax.Array) -> "KVCache":
        """Return the cache with the keys and values of new tokens in one layer; in place where it is donated."""
        num_tokens = k_BTKH.shape[1]
        row_BT1 = (new.row + jnp.arange(k_BTKH.shape[0]))[:, None, None]
        head_11K = jnp.arange(k_BTKH.shape[2])[None, None]
        # An index one past the end is dropped by the scatter: padding of a chunk and rows that are not in use go there.
        is_real_BT = jnp.arange(num_tokens)[None] < new.counts[:, None]
        place_BT = jnp.where(is_real_BT, new.positions(num_tokens), self.keys.shape[3])

        def put(stored: jax.Array, own: jax.Array) -> jax.Array:
            place = (layer, row_BT1, head_11K, place_BT[..., None])
            return stored.at[place].set(_encode(own, stored.dtype), mode="drop")

        return KVCache(keys=put(self.keys, k_BTKH), values=put(self.values, v_BTKH), lengths=self.lengths)

    def read_block(
        self, layer: jax.Array | int, new: "NewTokens", block: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return a block of one layer in the rows of the new tokens: its places [1, S], keys and values, two [B, K, S, H].

        Places that an earlier block has, since the last one ends at the end of the cache, are -1.
        """
        size = min(BLOCK, self.keys.shape[3])
        begin = jnp.minimum(block * size, self.keys.shape[3] - size)
        place_1S = begin + jnp.arange(size)[None]

        def take(stored: jax.Array) -> jax.Array:
            _, _, heads, _, width = stored.shape
            start, shape = (layer, new.row, 0, begin, 0), (1, new.starts.shape[0], heads, size, width)
            return _decode(jax.lax.dynamic_slice(stored, start, shape)[0])

        return jnp.where(place_1S >= block * size, place_1S, -1), take(self.keys), take(self.values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """The place of T new tokens of each of B rows: rows `row` to `row + B`, from positions `starts` on.

    The first `counts` of a row's T tokens are real; the others are padding, computed but not written to the cache.
    """

    row: Any
    starts: Any
    counts: Any

    def positions(self, num_tokens: int) -> jax.Array:
        """Return the position of every token in its sequence: [B, T]."""
        return self.starts[:, None] + jnp.arange(num_tokens)[None]


def attend(q_BTNH: jax.Array, *, cache: KVCache, layer: jax.Array | int, new: NewTokens, window: int = 0) -> jax.Array:
    """Compute attention of new tokens to the cache: cached token s is visible from position s on.

    q[B@data, T, N@tensor, H] -> y[B@data, T, N@tensor, H]; no communication. Scores and sums are float32.

    It reads blocks of `BLOCK` tokens, from the first that a window shows to the last that any row has filled: their
    number is data. The softmax is a running one (Milakov and Gimelshein 2018, section 3), to which a block that a row
    does not see adds exactly nothing: a row's result does not depend on the others. Unused places may hold anything.

    Args:
        window: number of visible tokens, the token itself included; 0 is all.
    """
    num_rows, num_tokens, _, size = q_BTNH.shape
    num_kv, block_size = cache.keys.shape[2], min(BLOCK, cache.keys.shape[3])
    # Queries of one key/value head side by side: then both products are plain ones for each row and head.
    q_BKGTH = q_BTNH.reshape(num_rows, num_tokens, num_kv, -1, size).transpose(0, 2, 3, 1, 4)
    positions_BT1, end_B = new.positions(num_tokens)[..., None], new.starts + new.counts

    def add_block(block: jax.Array, so_far: _Softmax) -> _Softmax:
        place_1S, keys_BKSH, values_BKSH = cache.read_block(layer, new, block)
        is_used_BS = (place_1S >= 0) & (place_1S < end_B[:, None])
        is_seen_BTS = is_used_BS[:, None] & (place_1S[None] <= positions_BT1)
        if window:
            is_seen_BTS &= place_1S[None] > positions_BT1 - window
        # A weight of 0 does not hide a NaN of an unused place.
        values_BKSH = jnp.where(is_used_BS[:, None, :, None], values_BKSH, 0)
        return _add_block(so_far, q_BKGTH, keys_BKSH, values_BKSH, is_seen_BTS)

    is_real_B = new.counts > 0
    last = (jnp.where(is_real_B, end_B, 0).max() + block_size - 1) // block_size
    first = jnp.maximum(jnp.where(is_real_B, new.starts + 1 - window, end_B).min(), 0) // block_size if window else 0
    total = jax.lax.fori_loop(first, last, add_block, _nothing_seen(q_BKGTH, varying_axes(cache.keys)))
    # The largest score adds 1 to the sum; rows that are not in use have seen nothing.
    mixed_BKGTH = (total.mixed / jnp.maximum(total.sum, 1.0)).astype(q_BTNH.dtype)
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


class _Softmax(NamedTuple):
    """A softmax over some keys: largest score and sum of exponentials [B, K, G, T, 1], mixed values [B, K, G, T, H]."""

    top: jax.Array
    sum: jax.Array
    mixed: jax.Array


def _nothing_seen(q_BKGTH: jax.Array, axes: Sequence[str]) -> _Softmax:
    """Return the softmax over no keys, varying over the axes of the queries and of the cache."""
    *outer, _ = q_BKGTH.shape
    top, sum_, mixed = jnp.full((*outer, 1), -jnp.inf), jnp.zeros((*outer, 1)), jnp.zeros(q_BKGTH.shape)
    both = tuple({*axes, *varying_axes(q_BKGTH)})
    return _Softmax(*(mark_varying(x, both) for x in (top, sum_, mixed)))


def _add_block(
    so_far: _Softmax, q_BKGTH: jax.Array, keys_BKSH: jax.Array, values_BKSH: jax.Array, is_seen_BTS: jax.Array
) -> _Softmax:
    keys_BKSH, values_BKSH = (stored.astype(q_BKGTH.dtype) for stored in (keys_BKSH, values_BKSH))
    scores_BKGTS = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, keys_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(is_seen_BTS[:, None, None], scores_BKGTS / math.sqrt(q_BKGTH.shape[-1]), -jnp.inf)
    top = jnp.maximum(so_far.top, scores_BKGTS.max(-1, keepdims=True))
    # Of a row that has seen nothing yet the largest is -inf, and -inf - -inf is NaN.
    finite_top = jnp.where(top == -jnp.inf, 0.0, top)
    old, weights_BKGTS = jnp.exp(so_far.top - finite_top), jnp.exp(scores_BKGTS - finite_top)
    mixed_BKGTH = jnp.einsum(
        "bkgts,bksh->bkgth", weights_BKGTS.astype(q_BKGTH.dtype), values_BKSH, preferred_element_type=jnp.float32
    )
    return _Softmax(top, so_far.sum * old + weights_BKGTS.sum(-1, keepdims=True), so_far.mixed * old + mixed_BKGTH)


def cache_shapes(
    config: ModelConfig,
    *,
    mesh: Mesh,
    num_rows: int,
    max_tokens: int,
    dtype: CacheDtype,
    stacks: Sequence[int],
    rules: ShardingRules = DEFAULT_RULES,
) -> KVCache:
    """Return shapes and shardings of an empty cache.

    With fewer key/value heads than `tensor` devices, heads are repeated until every device has one.

    Args:
        stacks: number of layers a stage in each array of keys, and of values.

    Raises:
        ShardingError: rows do not split evenly over `data`.
        ModelError: a count is below 1, or keys and values cannot be stored as `dtype`.
    """
    check_choice("dtype", dtype, get_args(CacheDtype), error=ModelError)
    for name, count in {"num_rows": num_rows, "max_tokens": max_tokens}.items():
        check_count(name, count, error=ModelError)
    sizes: Mapping[str, int] = mesh.shape
    num_ranks = sizes[rules.mesh_axes.pipe]
    # One key/value head a device at least: queries never read another device's cache.
    heads = max(config.num_kv_heads, math.prod(sizes[axis] for axis in rules.axes("heads")))

    def stack(layers: int) -> jax.ShapeDtypeStruct:
        shape = (layers * num_ranks, num_rows, heads, max_tokens, config.head_size)
        own = rules.sharding(("stage", "batch", "heads", None, None), shape=shape, mesh=mesh, name="the cache")
        return jax.ShapeDtypeStruct(shape, _STORED[dtype], sharding=own)

    placed, stored = NamedSharding(mesh, rules.spec(("stage", "batch"))), tuple(map(stack, stacks))
    lengths = jax.ShapeDtypeStruct((num_ranks, num_rows), jnp.int32, sharding=placed)
    return KVCache(keys=stored, values=stored, lengths=lengths)


def bytes_per_device(shapes: Any) -> int:
    """Return the bytes on each device of a tree of sharded shapes, a cache or parameters."""

    def one(leaf: jax.ShapeDtypeStruct) -> int:
        assert leaf.sharding is not None
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(shapes)))


_STORED = {"float32": jnp.float32, "bfloat16": jnp.uint16}


def _encode(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    is_bits = dtype == jnp.uint16
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) if is_bits else x.astype(dtype)


def _decode(stored: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored
