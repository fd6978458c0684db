"""Read prompts into the cache in chunks of one size, in a pipeline: chunk i is on rank r in tick i + r.

    tick     0   1   2   3   4        prompt a in two chunks, prompt b in one; 3 ranks
    rank 0   a0  a1  b0  .   .
    rank 1   .   a0  a1  b0  .
    rank 2   .   .   a0  a1  b0       chooses the first token after a1, and after b0

A chunk is one row of T tokens on each data shard. The chunks of a prompt follow each other, and so do prompts. The
number of chunks is data, so one program reads prompts of any length. Activations of decoding between two stages stay
where they are. Read `decode.py` next.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ..layers import NewTokens
from ..meshes import DEFAULT_RULES, ShardingRules
from ..pipeline.executor.buffers import read
from .decode import NOTHING
from .sampling import finish_reasons
from .slots import SlotInputs
from .stage import Stage, rows_of
from .state import ServeState, Sizes


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


def prefill(
    state: ServeState, *, stage: Stage, params: Any, slots: SlotInputs, chunks: Chunks, num_chunks: jax.Array
) -> tuple[ServeState, jax.Array]:
    """Read chunks inside `shard_map`; return the state and the first token after each prompt that ends.

    -> tokens and finish reasons [1, I, 2], NOTHING for chunks that end no prompt. A tick costs one permute of
    x[1, T, D] over `pipe`, and a call one all-reduce of [I, 2].
    """
    chunks = jax.tree.map(lambda leaf: leaf[0], chunks)
    num_items, num_tokens = chunks.tokens.shape
    x = stage.vary(jnp.zeros((1, num_tokens, stage.config.hidden_size), state.x.dtype))
    chosen_tokens = stage.vary(jnp.zeros((num_items, 2), jnp.int32))

    def tick(tick: jax.Array, carry: Any) -> Any:
        item = tick - stage.rank
        # In the first and the last ticks a rank has no chunk: it reads any one, and does no work.
        chunk = read(chunks, jnp.clip(item, 0, num_items - 1))
        is_here = (item >= 0) & (item < num_chunks) & (chunk.count > 0)

        def work(carry: Any) -> Any:
            return _work(carry, stage=stage, params=params, slots=slots, chunk=chunk, item=item)

        state, x, chosen_tokens = jax.lax.cond(stage.vary(is_here), work, lambda carry: carry, carry)
        return state, stage.pass_on(x, shape="line"), chosen_tokens

    state, _, chosen_tokens = jax.lax.fori_loop(0, num_chunks + stage.num_ranks - 1, tick, (state, x, chosen_tokens))
    # Only the last rank has chosen tokens; the others hold zeros.
    chosen_tokens = jax.lax.psum(chosen_tokens, stage.pipe) if stage.num_ranks > 1 else chosen_tokens
    return _open(state, chunks, chosen_tokens), jnp.where(chunks.is_last[:, None], chosen_tokens, NOTHING)[None]


def _work(carry: Any, *, stage: Stage, params: Any, slots: SlotInputs, chunk: Chunks, item: jax.Array) -> Any:
    """Run this rank's layers on one chunk; at the end of a prompt the last rank chooses the next token."""
    state, x, chosen_tokens = carry
    own: SlotInputs = jax.tree.map(lambda leaf: rows_of(leaf, chunk.slot, 1), slots)
    new = NewTokens(row=chunk.slot, starts=chunk.start[None], counts=chunk.count[None], pages=own.pages)
    tokens_1T = chunk.tokens[None]
    x = stage.on_rank(0, lambda: stage.embed(params, tokens_1T, new.positions(tokens_1T.shape[1])), lambda: x)
    x, cache = stage.run_layers(params, x, cache=state.cache, new=new)

    def finish() -> jax.Array:
        x_11D = jax.lax.dynamic_slice_in_dim(x, chunk.count - 1, 1, axis=1)
        length_1 = (chunk.start + chunk.count)[None]
        token_1 = stage.choose(params, x_11D, own.settings, position_B=length_1)
        first = jnp.stack([token_1, finish_reasons(token_1, own.settings, length_B=length_1 + 1)], axis=-1)
        return jax.lax.dynamic_update_slice(chosen_tokens, first, (item, 0))

    is_chosen = chunk.is_last & (stage.rank == stage.num_ranks - 1)
    chosen_tokens = jax.lax.cond(stage.vary(is_chosen), finish, lambda: chosen_tokens)
    return replace(state, cache=cache, busy=state.busy + 1), x, chosen_tokens


def _open(state: ServeState, chunks: Chunks, chosen_tokens: jax.Array) -> ServeState:
    """Open the slots of sequences whose prompts are read, with their first token."""
    num_slots = state.next_token.shape[1]
    # An index past the end, which `mode="drop"` leaves out, for chunks that end no prompt.
    slot = jnp.where(chunks.is_last, chunks.slot, num_slots)
    return replace(
        state,
        next_token=state.next_token.at[0, slot].set(chosen_tokens[:, 0], mode="drop"),
        is_open=state.is_open.at[0, slot].set(chosen_tokens[:, 1] == 0, mode="drop"),
    )
