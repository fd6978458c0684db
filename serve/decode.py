"""Decode tokens in a pipeline: groups of sequences follow each other through the stages.

In each tick, every rank runs its stage for one group. Then activations move to the next rank, and the tokens that the
last rank has chosen move around the ring to the first. With 3 ranks and groups a, b, c:

    tick     0   1   2   3   4   5
    rank 0   a0  b0  c0  a1  b1  c1     a1: group a with the token that rank 2 chose in tick 2
    rank 1   .   a0  b0  c0  a1  b1
    rank 2   .   .   a0  b0  c0  a1

A round, one token of every sequence, has max(groups, ranks) ticks, so no stage waits if there are as many groups as
ranks. Between two calls, activations stay between the stages. One rank runs the same program. Read `prefill.py` for how
a sequence starts.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..layers import NewTokens
from .sampling.choose import NOTHING, Choice, no_choice
from .sampling.penalties import count_tokens, is_penalized
from .slots import SlotInputs
from .stage import Stage, rows_of
from .state import ServeState, Sizes

_LAST = -2
"""A message to the first rank, in place of a token: the sequence has ended."""


def decode(
    state: ServeState, *, stage: Stage, sizes: Sizes, params: Any, slots: SlotInputs, num_rounds: jax.Array
) -> tuple[ServeState, Choice]:
    """Run `num_rounds` rounds inside `shard_map` over all axes; return the state and the chosen tokens.

    -> leaves are [1, rounds, slots of this shard, ...], valid on the last rank; NOTHING for slots that are not in use.
    A tick costs one permute of x[b, 1, D] and one of [b] over `pipe`.
    """
    chosen = no_choice((1, sizes.rounds, sizes.slots_per_shard), vocab_size=stage.config.vocab_size)
    loop = _DecodeLoop(stage, sizes, params, slots)
    return jax.lax.fori_loop(0, num_rounds * loop.ticks, loop.tick, (state, jax.tree.map(stage.vary, chosen)))


def ticks_of_round(sizes: Sizes, num_ranks: int) -> int:
    """Return the number of ticks in which every group passes every rank once."""
    return max(sizes.groups, num_ranks)


class _DecodeLoop:
    """The body of the loop over ticks on one rank."""

    def __init__(self, stage: Stage, sizes: Sizes, params: Any, slots: SlotInputs) -> None:
        self.stage, self.sizes, self.params, self.slots = stage, sizes, params, slots
        self.ticks, self.last = ticks_of_round(sizes, stage.num_ranks), stage.num_ranks - 1

    def tick(self, tick: jax.Array, carry: tuple[ServeState, Choice]) -> tuple[ServeState, Choice]:
        """Run this rank's stage for the group that has arrived, if a slot of it is in use, then pass on."""
        state, chosen = carry
        size = self.sizes.group_size
        # Rank r runs group g in the ticks g + r, g + r + ticks, ...; with fewer groups than ranks some ticks have none.
        group = jnp.remainder(tick - self.stage.rank, self.ticks)
        # Without a group any row will do: none of its slots counts as full.
        row = jnp.minimum(group, self.sizes.groups - 1) * size
        has_group = group < self.sizes.groups
        # The first rank starts a token for each open sequence; the others continue what has arrived.
        is_full_B = self.stage.on_rank(0, lambda: rows_of(state.is_open[0], row, size), lambda: state.is_full[0])
        is_full_B = self.stage.vary(is_full_B & has_group)
        idle = (state.x, self.stage.vary(jnp.full(size, NOTHING, jnp.int32)), chosen)

        def work(state: ServeState) -> tuple[ServeState, Any]:
            return self._work(state, chosen, is_full_B, row, tick // self.ticks)

        has_work = self.stage.any_together(is_full_B.any())
        state, (x, message_B, chosen) = jax.lax.cond(has_work, work, lambda state: (state, idle), state)
        return self._exchange(state, x, message_B, tick), chosen

    def _work(
        self, state: ServeState, chosen: Choice, is_full_B: jax.Array, row: jax.Array, turn: jax.Array
    ) -> tuple[ServeState, Any]:
        """Run the stage for one group; return x and a message per slot: in use, or (last rank) the next token."""
        size = self.sizes.group_size
        slots: SlotInputs = jax.tree.map(lambda leaf: rows_of(leaf, row, size), self.slots)
        starts_B = rows_of(state.cache.lengths[0], row, size)
        new = NewTokens(
            row=row, starts=starts_B, counts=is_full_B.astype(jnp.int32), pages=slots.pages, most=slots.most_read
        )
        tokens_B1 = rows_of(state.next_token[0], row, size)[:, None]
        x = self.stage.on_rank(
            0, lambda: self.stage.embed(self.params, tokens_B1, starts_B[:, None]), lambda: state.x[0]
        )
        x, cache = self.stage.run_layers(self.params, x, cache=state.cache, new=new)

        def finish() -> tuple[Choice, jax.Array]:
            # The token just read is at position `starts`.
            choice = self.stage.choose(
                self.params,
                x,
                slots.settings,
                read_seen=lambda: rows_of(state.seen[0], row, size),
                read_allowed=lambda: rows_of(self.slots.allowed, row, size),
                position_B=starts_B + 1,
            )
            message_B = jnp.where(choice.reason > 0, _LAST, choice.token)
            return _store(chosen, choice, is_full_B, turn=turn, row=row), self.stage.vary(message_B)

        chosen, message_B = self.stage.on_rank(
            self.last, finish, lambda: (chosen, self.stage.vary(jnp.zeros(size, jnp.int32)))
        )
        is_counted_B = is_full_B & (self.stage.rank == self.last) & is_penalized(slots.settings)
        seen = count_tokens(state.seen, message_B, row=row, is_counted_B=is_counted_B, axes=self.stage.vocab_axes)
        state = replace(state, cache=cache, seen=seen, busy=state.busy + is_full_B.any())
        return state, (x[None], jnp.where(is_full_B, message_B, NOTHING), chosen)

    @jax.named_scope("exchange")
    def _exchange(self, state: ServeState, x: jax.Array, message_B: jax.Array, tick: jax.Array) -> ServeState:
        """Pass x to the next rank, and store on the first rank the tokens that arrive from the last."""
        size = self.sizes.group_size
        message_B = self.stage.pass_on(message_B, shape="ring")
        state = replace(state, x=self.stage.pass_on(x, shape="line"), is_full=(message_B != NOTHING)[None])
        # The message that the first rank has received is of the group that the last rank ran in this tick.
        group = jnp.remainder(tick - self.last, self.ticks)
        row = jnp.minimum(group, self.sizes.groups - 1) * size

        def store(state: ServeState) -> ServeState:
            token_B = rows_of(state.next_token[0], row, size)
            is_open_B = rows_of(state.is_open[0], row, size)
            token_B = jnp.where(message_B >= 0, message_B, token_B)
            # A new sequence may have taken a slot that was not in use when its group passed: keep its entry.
            is_open_B = jnp.where(message_B == NOTHING, is_open_B, message_B >= 0)
            place = (0, row)
            return replace(
                state,
                next_token=jax.lax.dynamic_update_slice(state.next_token, token_B[None], place),
                is_open=jax.lax.dynamic_update_slice(state.is_open, is_open_B[None], place),
            )

        return self.stage.on_rank(0, lambda: store(state), lambda: state)


def _store(chosen: Choice, choice: Choice, is_full_B: jax.Array, *, turn: jax.Array, row: jax.Array) -> Choice:
    """Write the choice of one group into that of all rounds and slots."""

    def put(whole: jax.Array, own: jax.Array) -> jax.Array:
        place = (0, turn, row, *[0] * (own.ndim - 1))
        return jax.lax.dynamic_update_slice(whole, own[None, None], place)

    choice = choice._replace(token=jnp.where(is_full_B, choice.token, NOTHING))
    return jax.tree.map(put, chosen, choice)
