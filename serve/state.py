"""What the devices keep between two calls: the cache, what enters the first stage next, and what is between stages."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..layers import KVCache, ModelConfig
from ..layers.cache import CacheDtype, cache_shapes
from ..meshes import ServeError
from ..meshes.arguments import check_count, check_fields
from .params import Layers, stack_sizes
from .sampling import Choice

MAX_STOPS = 8
"""Stop tokens that a request may have, unless an engine is made for more."""

Fill = Literal["zeros", "nan"]
"""What a cache holds before use; "nan" proves that none of it reaches a result."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ServeState:
    """Donated to every call and given back changed, in place. Also used as the tree of its shapes.

    A slot is a row of the cache, [B@data]; a group is the slots of a data shard that pass through the stages together.

    Args:
        next_token, is_open: [P@pipe, B@data]: the token of each slot that enters the first stage next, and whether its
            sequence goes on. True on the first rank alone.
        x, is_full: [P@pipe, b@data, 1, D] and [P@pipe, b@data]: what has just arrived at each rank, b slots of one
            group, and which of them hold a token. Kept between calls, so that no stage runs dry.
        busy: [P@pipe, data]: ticks in which each rank had work.
    """

    cache: KVCache
    next_token: Any
    is_open: Any
    x: Any
    is_full: Any
    busy: Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The static sizes of an engine.

    `slots` rows of `max_tokens` over all data shards, in `groups` a data shard; prompts in chunks of `chunk` tokens, at
    most `items` chunks a call; at most `rounds` tokens of each slot a call. A request has at most `stops` stop tokens.

    Raises:
        ServeError: the sizes do not divide, or are not positive.
    """

    slots: int
    max_tokens: int
    groups: int
    num_shards: int
    chunk: int
    items: int
    rounds: int
    stops: int = MAX_STOPS

    def __post_init__(self) -> None:
        # Slots that are left out are made of groups.
        check_count("groups", self.groups, error=ServeError)
        check_fields(self, error=ServeError)
        parts = self.num_shards * self.groups
        if self.slots % parts:
            raise ServeError(
                f"slots={self.slots} do not split into groups={self.groups} on each of data={self.num_shards}: "
                f"{self.slots} / {parts} = {self.slots / parts:.2f}.",
                fix=f"set slots={-(-self.slots // parts) * parts}.",
            )

    @property
    def slots_per_shard(self) -> int:
        """Rows of one data shard."""
        return self.slots // self.num_shards

    @property
    def group_size(self) -> int:
        """Slots that pass through the stages together."""
        return self.slots_per_shard // self.groups


def state_shapes(
    config: ModelConfig, sizes: Sizes, *, mesh: Mesh, cache_dtype: CacheDtype, layers: Layers = "loop"
) -> ServeState:
    """Return shapes and shardings of the state."""
    num_ranks = mesh.shape["pipe"]

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (num_ranks, *shape), dtype, sharding=NamedSharding(mesh, PartitionSpec("pipe", "data"))
        )

    moving = sizes.group_size * sizes.num_shards
    return ServeState(
        cache=cache_shapes(
            config,
            mesh=mesh,
            num_rows=sizes.slots,
            max_tokens=sizes.max_tokens,
            dtype=cache_dtype,
            stacks=stack_sizes(config, num_ranks=num_ranks, layers=layers),
        ),
        next_token=leaf((sizes.slots,), jnp.int32),
        is_open=leaf((sizes.slots,), jnp.bool_),
        x=leaf((moving, 1, config.hidden_size), config.dtype),
        is_full=leaf((moving,), jnp.bool_),
        busy=leaf((sizes.num_shards,), jnp.int32),
    )


def choice_shapes(sizes: Sizes, *, mesh: Mesh) -> Choice:
    """Return shapes and shardings of how every slot chooses its tokens: the same on all ranks."""

    def leaf(dtype: Any, *inner: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.slots, *inner), dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))

    return Choice(
        temperature=leaf(jnp.float32),
        top_k=leaf(jnp.int32),
        top_p=leaf(jnp.float32),
        seed=leaf(jnp.uint32),
        limit=leaf(jnp.int32),
        stops=leaf(jnp.int32, sizes.stops),
    )


_NAN = {"float32": jnp.nan, "bfloat16": jnp.nan, "uint16": 0x7FC0}


def empty_state(shapes: Any, *, fill: Fill = "zeros") -> Any:
    """Return a state in which no slot is in use, every device making its own part."""

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.full(leaf.shape, _NAN.get(str(leaf.dtype), 0) if fill == "nan" else 0, leaf.dtype)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(lambda: jax.tree.map(make, shapes), out_shardings=shardings)()
