"""Prompts into the cache, in chunks of one size: chunk i is on rank r at tick i + r, whatever sequence it belongs to.

A chunk is one row of T tokens on each data shard; the chunks of one prompt follow each other, and so do prompts. The
number of chunks is data, so no prompt is too long or too short for the one program. What is on its way through decoding
is not touched. Read `decode.py` for what comes after.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..layers import KVCache, NewTokens
from ..pipeline.executor.buffers import read
from ..pipeline.executor.buffers import vary_among_devices as vary
from .decode import NOTHING
from .sampling import Choice, ends
from .stage import Stage, rows_of
from .state import ServeState, Sizes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Up to I chunks for each data shard: tokens [data, I, T], the rest [data, I].

    Args:
        slot: row of the shard's cache.
        start, count: position of the first token, and how many of T are real; 0 for no chunk.
        is_last: whether the prompt ends here, so that the next token is chosen.
    """

    tokens: Any
    slot: Any
    start: Any
    count: Any
    is_last: Any


def chunk_shapes(sizes: Sizes, *, mesh: Mesh) -> Chunks:
    """Return shapes and shardings of the chunks of one call: the same on all ranks."""

    def leaf(dtype: Any, *inner: int) -> jax.ShapeDtypeStruct:
        shape = (sizes.num_shards, sizes.items, *inner)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))

    number = leaf(jnp.int32)
    return Chunks(tokens=leaf(jnp.int32, sizes.chunk), slot=number, start=number, count=number, is_last=leaf(jnp.bool_))


def prefill(
    state: ServeState, *, stage: Stage, params: Any, choice: Choice, chunks: Chunks, num_chunks: jax.Array
) -> tuple[ServeState, jax.Array]:
    """Return the state with the chunks read, and the first token of each prompt that ends; inside `shard_map`.

    -> tokens and reasons [1, I, 2], NOTHING where no prompt ends. A tick costs one permute of x[1, T, D] over `pipe`,
    a call one all-reduce of [I, 2].
    """
    chunks = jax.tree.map(lambda leaf: leaf[0], chunks)
    num_items, num_tokens = chunks.tokens.shape
    x = vary(jnp.zeros((1, num_tokens, stage.config.hidden_size), state.x.dtype))
    said = vary(jnp.zeros((num_items, 2), jnp.int32))

    def tick(tick: jax.Array, carry: Any) -> Any:
        item = tick - stage.rank
        chunk = read(chunks, jnp.clip(item, 0, num_items - 1))
        is_here = (item >= 0) & (item < num_chunks) & (chunk.count > 0)

        def work(carry: Any) -> Any:
            return _work(carry, stage=stage, params=params, choice=choice, chunk=chunk, item=item)

        state, x, said = jax.lax.cond(vary(is_here), work, lambda carry: carry, carry)
        return state, stage.pass_on(x, shape="line"), said

    state, _, said = jax.lax.fori_loop(0, num_chunks + stage.num_ranks - 1, tick, (state, x, said))
    # Only the last rank has chosen; the others hold zeros.
    said = jax.lax.psum(said, "pipe") if stage.num_ranks > 1 else said
    return _open(state, chunks, said), jnp.where(chunks.is_last[:, None], said, NOTHING)[None]


def _work(carry: Any, *, stage: Stage, params: Any, choice: Choice, chunk: Chunks, item: jax.Array) -> Any:
    """Run one chunk through this rank's layers; the last rank chooses the next token where the prompt ends."""
    state, x, said = carry
    new = NewTokens(row=chunk.slot, starts=chunk.start[None], counts=chunk.count[None])
    tokens_1T = chunk.tokens[None]
    x = stage.on_rank(0, lambda: stage.embed(params, tokens_1T, new.positions(tokens_1T.shape[1])), lambda: x)
    x, cache = stage.run_layers(params, x, cache=_wiped(state.cache, chunk), new=new)

    def finish() -> jax.Array:
        own = jax.tree.map(lambda leaf: rows_of(leaf, chunk.slot, 1), choice)
        x_11D = jax.lax.dynamic_slice_in_dim(x, chunk.count - 1, 1, axis=1)
        length_1 = (chunk.start + chunk.count)[None]
        token_1 = stage.choose(params, x_11D, own, position_B=length_1)
        first = jnp.stack([token_1, ends(token_1, own, length_B=length_1 + 1)], axis=-1)
        return jax.lax.dynamic_update_slice(said, first, (item, 0))

    is_chosen = chunk.is_last & (stage.rank == stage.num_ranks - 1)
    said = jax.lax.cond(vary(is_chosen), finish, lambda: said)
    return replace(state, cache=cache, busy=state.busy + 1), x, said


def _wiped(cache: KVCache, chunk: Chunks) -> KVCache:
    """The cache with the slot of a sequence that begins emptied: zero weights times a NaN of the one before are NaN."""

    def wipe(values: jax.Array) -> jax.Array:
        num_layers, _, *inner = values.shape
        empty = vary(jnp.zeros((num_layers, 1, *inner), values.dtype), tuple(jax.typeof(values).mat.varying))
        return jax.lax.dynamic_update_slice(values, empty, (0, chunk.slot, 0, 0, 0))

    values = jax.lax.cond(
        chunk.start == 0, lambda values: tuple(map(wipe, values)), lambda values: values, cache.values
    )
    return KVCache(keys=cache.keys, values=values, lengths=cache.lengths)


def _open(state: ServeState, chunks: Chunks, said: jax.Array) -> ServeState:
    """Let the sequences whose prompts are read enter the first stage with their first token."""
    num_slots = state.next_token.shape[1]
    slot = jnp.where(chunks.is_last, chunks.slot, num_slots)
    return replace(
        state,
        next_token=state.next_token.at[0, slot].set(said[:, 0], mode="drop"),
        is_open=state.is_open.at[0, slot].set(said[:, 1] == 0, mode="drop"),
    )
