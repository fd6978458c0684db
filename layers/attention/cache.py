"""The KV cache: keys and values of earlier tokens, so that generating a token computes one token and not all of them.

It is kept in pages of a few tokens (Kwon et al. 2023, "PagedAttention", section 4). A sequence has a list of pages,
which is data, so no program changes shape; two sequences that begin with the same tokens may list the same pages:

    page          0    1    2    3    4    5         4 tokens a page
    sequence a    pages 3, 0, 5    9 tokens: 4 in page 3, 4 in page 0, 1 in page 5
    sequence b    pages 3, 0, 1    the same first 8 tokens, then others

`cached.py` attends to the cache; `serve/pages.py` gives pages to sequences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ...meshes import DEFAULT_RULES, ModelError, ShardingRules
from ...meshes.arguments import check_choice, check_count
from ..config import ModelConfig

CacheDtype = Literal["float32", "bfloat16", "fp8"]
"""Dtype in which keys and values are stored; scores are summed in float32 either way. "fp8" is e4m3 with a scale for
each token and head, so that each number is rounded by at most 1/16 of itself, or 2**-18 of the largest of its head."""


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
    `most`, [B], are the most tokens that a row can have; those of the model if left out.
    """

    row: Any
    starts: Any
    counts: Any
    pages: Any
    most: Any = None

    def positions(self, num_tokens: int) -> jax.Array:
        """Return the position of every token in its sequence: [B, T]."""
        return self.starts[:, None] + jnp.arange(num_tokens)[None]


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
