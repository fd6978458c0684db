"""The KV cache: keys and values of earlier tokens, so that generating a token computes one token and not all of them.

A cache has a fixed number of rows (sequences) and of tokens a row, so that no program changes shape. Every row has its
own length, and new tokens are written behind it. `attention.py` reads the cache.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from ..meshes import DEFAULT_RULES, ModelError, ShardingRules
from ..meshes.arguments import check_choice, check_count
from .config import ModelConfig

CacheDtype = Literal["float32", "bfloat16"]
"""Dtype in which keys and values are stored; scores are summed in float32 either way."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer, and the number of cached tokens of each row.

    keys, values [L@pipe, B@data, K@tensor, S, H], or tuples of such; lengths [P@pipe, B@data]. With `latent_size` they
    are shared keys [L@pipe, B@data, 1, S, R] and latent vectors [L@pipe, B@data, 1, S, C]. Each pipeline stage has its
    own lengths, since a token reaches the stages one after another. bfloat16 is stored as its bits, in uint16:
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

    def read(self, layer: jax.Array | int, new: "NewTokens") -> tuple[jax.Array, jax.Array]:
        """Return keys and values of one layer in the rows of the new tokens: two of [B, K, S, H]."""

        def take(stored: jax.Array) -> jax.Array:
            _, _, *inner = stored.shape
            # This layer's [K, S, H] of the rows of the new tokens.
            start = (layer, new.row, 0, 0, 0)
            return _decode(jax.lax.dynamic_slice(stored, start, (1, new.starts.shape[0], *inner))[0])

        return take(self.keys), take(self.values)


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


def attend(
    q_BTNH: jax.Array, keys_BKSH: jax.Array, values_BKSH: jax.Array, positions_BT: jax.Array, *, window: int = 0
) -> jax.Array:
    """Compute attention of new tokens to the cache: cached token s is visible from position s on.

    q[B@data, T, N@tensor, H], keys and values [B@data, K@tensor, S, H] -> y[B@data, T, N@tensor, H]; no communication.
    Scores are float32. Unused places of `keys` may hold anything, those of `values` any finite number.

    Args:
        window: number of visible tokens, the token itself included; 0 is all.
    """
    num_rows, num_tokens, _, size = q_BTNH.shape
    num_kv, num_cached = keys_BKSH.shape[1:3]
    # Queries of one key/value head side by side: then both products are plain ones for each row and head.
    q_BKGTH = q_BTNH.reshape(num_rows, num_tokens, num_kv, -1, size).transpose(0, 2, 3, 1, 4)
    keys_BKSH, values_BKSH = (stored.astype(q_BTNH.dtype) for stored in (keys_BKSH, values_BKSH))
    scores_BKGTS = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, keys_BKSH, preferred_element_type=jnp.float32)
    is_seen_BTS = visible(positions_BT, num_cached=num_cached, window=window)
    # A real token sees at least itself, so its row is never -inf throughout, which would make the softmax NaN.
    scores_BKGTS = jnp.where(is_seen_BTS[:, None, None], scores_BKGTS / math.sqrt(size), -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    mixed_BKGTH = jnp.einsum("bkgts,bksh->bkgth", weights_BKGTS, values_BKSH)
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def visible(positions_BT: jax.Array, *, num_cached: int, window: int = 0) -> jax.Array:
    """Return which of S cached tokens the tokens at some positions see, bool [B, T, S]."""
    place_S = jnp.arange(num_cached)[None, None]
    is_seen_BTS = place_S <= positions_BT[..., None]
    return is_seen_BTS & (place_S > positions_BT[..., None] - window) if window else is_seen_BTS


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
    heads, key_size, value_size = _row_sizes(config, tensor=math.prod(sizes[axis] for axis in rules.axes("heads")))

    def stack(layers: int, size: int) -> jax.ShapeDtypeStruct:
        shape = (layers * num_ranks, num_rows, heads, max_tokens, size)
        dims = ("stage", "batch", None if config.latent_size else "heads", None, None)
        own = rules.sharding(dims, shape=shape, mesh=mesh, name="the cache")
        return jax.ShapeDtypeStruct(shape, _STORED[dtype], sharding=own)

    keys, values = (tuple(stack(layers, size) for layers in stacks) for size in (key_size, value_size))
    placed = NamedSharding(mesh, rules.spec(("stage", "batch")))
    lengths = jax.ShapeDtypeStruct((num_ranks, num_rows), jnp.int32, sharding=placed)
    return KVCache(keys=keys, values=values, lengths=lengths)


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


_STORED = {"float32": jnp.float32, "bfloat16": jnp.uint16}


def _encode(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    is_bits = dtype == jnp.uint16
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) if is_bits else x.astype(dtype)


def _decode(stored: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored
