"""Read prompts into the cache in chunks of one size, in a pipeline: chunk i is on rank r in tick i + r.

    tick     0   1   2   3   4        prompt a in two chunks, prompt b in one; 3 ranks
    rank 0   a0  a1  b0  .   .
    rank 1   .   a0  a1  b0  .
    rank 2   .   .   a0  a1  b0       chooses the first token after a1, and after b0

A chunk is one row of T tokens on each data shard. The chunks of a prompt follow each other, and so do prompts. The
number of chunks is data, so one program reads prompts of any length. Activations of decoding between two stages stay
where they are. Read `decode.py` next.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..layers import NewTokens
from ..pipeline.executor.buffers import read
from .chunks import Chunks
from .sampling.choose import NOTHING, Choice, no_choice
from .sampling.penalties import count_tokens, is_penalized
from .slots import SlotInputs
from .stage import Stage, rows_of
from .state import ServeState


def prefill(
    state: ServeState, *, stage: Stage, params: Any, slots: SlotInputs, chunks: Chunks, num_chunks: jax.Array
) -> tuple[ServeState, Choice]:
    """Read chunks inside `shard_map`; return the state and the first token after each prompt that ends.

    -> leaves are [1, I, ...], NOTHING for chunks that end no prompt. A tick costs one permute of x[1, T, D] over
    `pipe`, and a call one all-reduce of these leaves.
    """
    chunks = jax.tree.map(lambda leaf: leaf[0], chunks)
    num_items, num_tokens = chunks.tokens.shape
    x = stage.vary(jnp.zeros((1, num_tokens, stage.config.hidden_size), state.x.dtype))
    # Zeros, to be summed over the ranks.
    none = no_choice((num_items,), vocab_size=stage.config.vocab_size)
    chosen: Choice = jax.tree.map(lambda leaf: stage.vary(jnp.zeros_like(leaf)), none)

    def tick(tick: jax.Array, carry: Any) -> Any:
        item = tick - stage.rank
        # In the first and the last ticks a rank has no chunk: it reads any one, and does no work.
        chunk = read(chunks, jnp.clip(item, 0, num_items - 1))
        is_here = (item >= 0) & (item < num_chunks) & (chunk.count > 0)

        def work(carry: Any) -> Any:
            return _work(carry, stage=stage, params=params, slots=slots, chunk=chunk, item=item)

        state, x, chosen = jax.lax.cond(stage.any_together(stage.vary(is_here)), work, lambda carry: carry, carry)
        return state, stage.pass_on(x, shape="line"), chosen

    state, _, chosen = jax.lax.fori_loop(0, num_chunks + stage.num_ranks - 1, tick, (state, x, chosen))
    # Only the last rank has chosen tokens; the others hold zeros.
    chosen = jax.lax.psum(chosen, stage.pipe) if stage.num_ranks > 1 else chosen
    first = chosen._replace(token=jnp.where(chunks.is_last, chosen.token, NOTHING))
    return _open(state, chunks, chosen), jax.tree.map(lambda leaf: leaf[None], first)


def _work(carry: Any, *, stage: Stage, params: Any, slots: SlotInputs, chunk: Chunks, item: jax.Array) -> Any:
    """Run this rank's layers on one chunk; at the end of a prompt the last rank chooses the next token."""
    state, x, chosen = carry
    own: SlotInputs = jax.tree.map(lambda leaf: rows_of(leaf, chunk.slot, 1), slots)
    new = NewTokens(
        row=chunk.slot, starts=chunk.start[None], counts=chunk.count[None], pages=own.pages, most=own.most_read
    )
    tokens_1T = chunk.tokens[None]
    x = stage.on_rank(0, lambda: stage.embed(params, tokens_1T, new.positions(tokens_1T.shape[1])), lambda: x)
    x, cache = stage.run_layers(params, x, cache=state.cache, new=new)

    def finish() -> Choice:
        x_11D = jax.lax.dynamic_slice_in_dim(x, chunk.count - 1, 1, axis=1)
        choice = stage.choose(
            params,
            x_11D,
            own.settings,
            read_seen=lambda: rows_of(state.seen[0], chunk.slot, 1),
            read_allowed=lambda: rows_of(slots.allowed, chunk.slot, 1),
            position_B=(chunk.start + chunk.count)[None],
        )
        return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, item, 0), chosen, choice)

    is_chosen = stage.vary(chunk.is_last & (stage.rank == stage.num_ranks - 1))
    chosen = jax.lax.cond(is_chosen, finish, lambda: chosen)
    seen = count_tokens(
        state.seen,
        rows_of(chosen.token, item, 1),
        row=chunk.slot,
        is_counted_B=is_chosen & is_penalized(own.settings),
        axes=stage.vocab_axes,
    )
    return replace(state, cache=cache, seen=seen, busy=state.busy + (chunk.count > 0)), x, chosen


def _open(state: ServeState, chunks: Chunks, chosen: Choice) -> ServeState:
    """Open the slots of sequences whose prompts are read, with their first token."""
    num_slots = state.next_token.shape[1]
    # An index past the end, which `mode="drop"` leaves out, for chunks that end no prompt.
    slot = jnp.where(chunks.is_last, chunks.slot, num_slots)
    return replace(
        state,
        next_token=state.next_token.at[0, slot].set(chosen.token, mode="drop"),
        is_open=state.is_open.at[0, slot].set(chosen.reason == 0, mode="drop"),
    )
