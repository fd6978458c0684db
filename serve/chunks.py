"""Chunks of prompts as the devices get them: up to I of T tokens for each data shard. Read `prefill.py` next."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..meshes import DEFAULT_RULES, ShardingRules
from .requests import Chunk
from .state import Sizes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Up to I chunks for each data shard: tokens [data, I, T], the rest [data, I].

    Args:
        slot: row among those of the shard.
        start, count: position of the first token, and number of real tokens among T; 0 for an unused entry.
        is_last: whether the prompt ends here, so that the next token is chosen.
    """

    tokens: Any
    slot: Any
    start: Any
    count: Any
    is_last: Any


def chunk_shapes(sizes: Sizes, *, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Chunks:
    """Return shapes and shardings of the chunks of one call, which are the same on all ranks."""

    def leaf(dtype: Any, *inner: int) -> jax.ShapeDtypeStruct:
        shape = (sizes.num_shards, sizes.items, *inner)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rules.spec(("batch",))))

    number = leaf(jnp.int32)
    return Chunks(tokens=leaf(jnp.int32, sizes.chunk), slot=number, start=number, count=number, is_last=leaf(jnp.bool_))


def pack_chunks(sizes: Sizes, chunks: list[list[Chunk]]) -> Chunks:
    """Pack chunks into arrays; unused entries have count 0."""
    shape = (sizes.num_shards, sizes.items)
    tokens = np.zeros((*shape, sizes.chunk), np.int32)
    slot, start, count = (np.zeros(shape, np.int32) for _ in range(3))
    is_last = np.zeros(shape, np.bool_)
    for shard, own in enumerate(chunks):
        for item, chunk in enumerate(own):
            place = shard, item
            assert chunk.sequence.slot is not None
            tokens[(*place, slice(len(chunk.tokens)))] = chunk.tokens
            # Slots are numbered over all data shards; a device knows the rows of its own.
            slot[place] = chunk.sequence.slot % sizes.slots_per_shard
            start[place] = chunk.start
            count[place] = len(chunk.tokens)
            is_last[place] = chunk.is_last
    return Chunks(tokens=tokens, slot=slot, start=start, count=count, is_last=is_last)
