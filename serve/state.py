"""State on the devices between two calls: the cache, the next tokens, and activations between stages."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ..layers import KVCache, ModelConfig
from ..layers.attention.cache import CacheDtype, cache_shapes
from ..layers.vocabulary import stored_words
from ..meshes import MeshAxes, ServeError, ShardingRules
from ..meshes.arguments import check_count, check_fields
from ..meshes.axes import DEFAULT_AXES
from .stacks import LayerLoop, stage_stacks

MAX_STOPS = 8
"""Default for the most stop tokens of a request."""

PAGE = 16
"""Default for the number of tokens of a page of the cache."""

Fill = Literal["zeros", "nan"]
"""Content of an unused cache; "nan" proves that it does not affect results."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ServeState:
    """The state of an engine, which every call donates and returns; also the tree of its shapes.

    A slot is a row, [B@data], with a list of pages of the cache; a group is the slots of a data shard that pass through
    the stages together.

    Args:
        next_token, is_open: [P@pipe, B@data]: the next token of each slot for the first stage, and whether its sequence
            continues. Only the first rank's entries are valid.
        x, is_full: [P@pipe, b@data, 1, D] and [P@pipe, b@data]: activations that have arrived at each rank, for b slots
            of one group, and which of these hold a token. They stay between calls, so that the pipeline does not drain.
        seen: [P@pipe, B@data, V@tensor]: how often each sequence has each token, as `penalties.py` counts; valid on the
            last rank for sequences that have a penalty.
        busy: [P@pipe, data]: number of ticks in which each rank had work.
    """

    cache: KVCache
    next_token: Any
    is_open: Any
    x: Any
    is_full: Any
    seen: Any
    busy: Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The static sizes of an engine.

    There are `slots` rows of at most `max_tokens` tokens over all data shards, and each data shard's rows form `groups`
    groups. Their keys and values are in pages of `page` tokens, `cache_tokens` in all; None is as many as fill every
    slot. A call reads at most `items` chunks of `chunk` prompt tokens, or decodes at most `rounds` tokens per slot. A
    request has at most `stops` stop tokens.

    Raises:
        ServeError: the sizes do not divide, or are not positive; or the cache has no room for one full row.
    """

    slots: int
    max_tokens: int
    groups: int
    num_shards: int
    chunk: int
    items: int
    rounds: int
    stops: int = MAX_STOPS
    page: int = PAGE
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        # The default number of slots is computed from groups.
        check_count("groups", self.groups, error=ServeError)
        check_fields(self, error=ServeError)
        parts = self.num_shards * self.groups
        if self.slots % parts:
            raise ServeError(
                f"slots={self.slots} do not split into groups={self.groups} on each of data={self.num_shards}: "
                f"{self.slots} / {parts} = {self.slots / parts:.2f}.",
                fix=f"set slots={-(-self.slots // parts) * parts}.",
            )
        if self.pages_per_shard < self.pages_per_row:
            least = self.pages_per_row * self.page * self.num_shards
            raise ServeError(
                f"cache_tokens={self.cache_tokens} are {self.pages_per_shard} pages of {self.page} tokens on each of "
                f"data={self.num_shards}, and one sequence of max_tokens={self.max_tokens} takes {self.pages_per_row}.",
                fix=f"set cache_tokens={least} or more, or a smaller max_tokens.",
            )

    @property
    def slots_per_shard(self) -> int:
        """Number of slots of one data shard."""
        return self.slots // self.num_shards

    @property
    def group_size(self) -> int:
        """Number of slots that pass through the stages together."""
        return self.slots_per_shard // self.groups

    @property
    def pages_per_row(self) -> int:
        """Number of pages of a sequence of `max_tokens` tokens."""
        return -(-self.max_tokens // self.page)

    @property
    def pages_per_shard(self) -> int:
        """Number of pages of one data shard."""
        if self.cache_tokens is None:
            return self.slots_per_shard * self.pages_per_row
        return self.cache_tokens // self.page // self.num_shards

    @property
    def cached_tokens(self) -> int:
        """Number of tokens for which the cache has pages, over all data shards."""
        return self.pages_per_shard * self.page * self.num_shards


def state_shapes(
    config: ModelConfig,
    sizes: Sizes,
    *,
    mesh: Mesh,
    cache_dtype: CacheDtype,
    layers: LayerLoop = "loop",
    axes: MeshAxes = DEFAULT_AXES,
) -> ServeState:
    """Return shapes and shardings of the state."""
    rules = ShardingRules.of(axes)
    num_ranks, vocab_parts = mesh.shape[rules.mesh_axes.pipe], rules.num_parts("vocab", mesh.shape)

    def leaf(shape: tuple[int, ...], dtype: Any, *dims: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, rules.spec(("stage", "batch", *dims)))
        return jax.ShapeDtypeStruct((num_ranks, *shape), dtype, sharding=sharding)

    moving = sizes.group_size * sizes.num_shards
    return ServeState(
        cache=cache_shapes(
            config,
            mesh=mesh,
            num_rows=sizes.slots,
            num_pages=sizes.pages_per_shard * sizes.num_shards,
            page=sizes.page,
            dtype=cache_dtype,
            stacks=tuple(own.size for own in stage_stacks(config, num_ranks=num_ranks, layers=layers)),
            rules=rules,
        ),
        next_token=leaf((sizes.slots,), jnp.int32),
        is_open=leaf((sizes.slots,), jnp.bool_),
        x=leaf((moving, 1, config.hidden_size), config.dtype),
        is_full=leaf((moving,), jnp.bool_),
        seen=leaf((sizes.slots, stored_words(config.vocab_size, parts=vocab_parts)), jnp.int32, "vocab"),
        busy=leaf((sizes.num_shards,), jnp.int32),
    )


# Cache dtype -> a NaN; uint16 holds the bits of bfloat16, uint8 those of e4m3.
_NAN = {"float32": jnp.nan, "bfloat16": jnp.nan, "uint16": 0x7FC0, "uint8": 0x7F}


def empty_state(shapes: Any, *, fill: Fill = "zeros") -> Any:
    """Return a state in which no slot is in use; every device makes its own part."""

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.full(leaf.shape, _NAN.get(str(leaf.dtype), 0) if fill == "nan" else 0, leaf.dtype)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(lambda: jax.tree.map(make, shapes), out_shardings=shardings)()
