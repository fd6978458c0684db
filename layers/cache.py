"""The keys and values of tokens already read, kept in place: what makes the next token cost one token.

A cache has a fixed number of rows (sequences) and of tokens for each, so that no program ever changes its shapes. Rows
know their own lengths, and new tokens are written behind them. `attention.py` reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ..meshes import DEFAULT_RULES, ShardingRules
from .config import ModelConfig

CacheDtype = Literal["float32", "bfloat16"]
"""What keys and values are stored as; scores are summed in float32 either way."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer, and how many tokens of each row are there.

    keys, values [L@pipe, B@data, S, K@tensor, H]; lengths [P@pipe, B@data]: in a pipeline each stage has its own, since
    a token reaches the stages one after another. Also used as the tree of their shapes.
    """

    keys: Any
    values: Any
    lengths: Any

    def append(self, layer: jax.Array, new: "NewTokens", k_BTKH: jax.Array, v_BTKH: jax.Array) -> "KVCache":
        """Return the cache with the keys and values of new tokens in one layer; in place where it is donated."""
        num_tokens = k_BTKH.shape[1]
        row_BT = (new.row + jnp.arange(k_BTKH.shape[0]))[:, None]
        # One past the end is dropped: so are the tokens that only fill a chunk, and those of rows that are not in use.
        is_real_BT = jnp.arange(num_tokens)[None] < new.counts_B[:, None]
        place_BT = jnp.where(is_real_BT, new.positions(num_tokens), self.keys.shape[2])

        def put(stored: jax.Array, own: jax.Array) -> jax.Array:
            return stored.at[layer, row_BT, place_BT].set(own.astype(stored.dtype), mode="drop", unique_indices=False)

        return KVCache(keys=put(self.keys, k_BTKH), values=put(self.values, v_BTKH), lengths=self.lengths)

    def read(self, layer: jax.Array, new: "NewTokens") -> tuple[jax.Array, jax.Array]:
        """Return keys and values of one layer in the rows of the new tokens: two of [B, S, K, H]."""

        def take(stored: jax.Array) -> jax.Array:
            _, _, *inner = stored.shape
            start = (layer, new.row, 0, 0, 0)
            return jax.lax.dynamic_slice(stored, start, (1, new.starts_B.shape[0], *inner))[0]

        return take(self.keys), take(self.values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Where T new tokens of each of B rows belong: rows `row` to `row + B`, positions `starts_B` on.

    Of the T tokens of a row `counts_B` are real; the others are computed, but leave no trace in the cache.
    """

    row: Any
    starts_B: Any
    counts_B: Any

    def positions(self, num_tokens: int) -> jax.Array:
        """Return the position of every token in its sequence: [B, T]."""
        return self.starts_B[:, None] + jnp.arange(num_tokens)[None]


def attend(
    q_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, positions_BT: jax.Array, *, window: int = 0
) -> jax.Array:
    """Return what each new token reads of the cache: cached token s is seen from positions s on.

    q[B@data, T, N@tensor, H], keys and values [B@data, S, K@tensor, H] -> y[B@data, T, N@tensor, H]; no communication.
    Scores are float32. Unused places of `keys` may hold anything, those of `values` any finite number.

    Args:
        window: how many tokens a token sees, itself and those before it; 0 is all.
    """
    num_rows, num_tokens, _, size = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(num_rows, num_tokens, keys_BSKH.shape[2], -1, size)
    keys_BSKH, values_BSKH = (stored.astype(q_BTNH.dtype) for stored in (keys_BSKH, values_BSKH))
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, keys_BSKH, preferred_element_type=jnp.float32)
    place_S = jnp.arange(keys_BSKH.shape[1])
    is_seen_BTS = place_S[None, None] <= positions_BT[..., None]
    if window:
        is_seen_BTS &= place_S[None, None] > positions_BT[..., None] - window
    scores_BKGTS = jnp.where(is_seen_BTS[:, None, None], scores_BKGTS / math.sqrt(size), -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, values_BSKH).reshape(q_BTNH.shape)


def cache_shapes(
    config: ModelConfig,
    *,
    mesh: Mesh,
    num_rows: int,
    max_tokens: int,
    dtype: CacheDtype,
    layers_per_stage: int | None = None,
    rules: ShardingRules = DEFAULT_RULES,
) -> KVCache:
    """Return shapes and shardings of an empty cache.

    Where there are fewer key/value heads than `tensor` devices, each is kept as often as makes one a device.

    Args:
        layers_per_stage: layers that every stage has room for; an even share if left out.

    Raises:
        ShardingError: rows do not split over `data`.
    """
    sizes: Mapping[str, int] = mesh.shape
    room = layers_per_stage or -(-config.num_layers // sizes["pipe"])
    heads = max(config.num_kv_heads, math.prod(sizes[axis] for axis in rules.axes("heads")))
    shape = (room * sizes["pipe"], num_rows, max_tokens, heads, config.head_size)
    own = rules.sharding(("stage", "batch", None, "heads", None), shape=shape, mesh=mesh, name="the cache")
    lengths = NamedSharding(mesh, rules.spec(("stage", "batch")))
    stored = jax.ShapeDtypeStruct(shape, dtype, sharding=own)
    return KVCache(
        keys=stored,
        values=stored,
        lengths=jax.ShapeDtypeStruct((sizes["pipe"], num_rows), jnp.int32, sharding=lengths),
    )


def bytes_per_device(shapes: Any) -> int:
    """Return the bytes that each device holds of a tree of sharded shapes, a cache or parameters."""

    def one(leaf: jax.ShapeDtypeStruct) -> int:
        assert leaf.sharding is not None
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(shapes)))
