"""Check guessed tokens: one pass of the model over the last token of each sequence and T - 1 guesses that follow it.

    read        the   cat   sat   on         three guesses, "cat sat on"
    choose      cat   sat   in    the        as in decoding, at each place by itself
    take        cat   sat   in               what was chosen, to the first that is not what was read next

A choice depends on the logits, and where it is drawn on noise of the request's seed and the token's position alone. So
what is taken is what decoding would have chosen one by one, greedy or drawn: the distribution of answers is unchanged
whatever is guessed (Leviathan et al. 2023 accept a guess with a probability instead; for guesses without a probability
of their own, as here, that is the probability with which the model draws the same token). Groups of slots follow each
other through the stages as chunks do in `../prefill.py`. Keys of wrong guesses stay in the cache behind the end of the
sequence, where nobody sees them, until its next tokens take their places.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ...layers import NewTokens
from ...meshes import ShardingRules
from ..sampling.choose import NOTHING, Choice, no_choice
from ..sampling.penalties import count_tokens, is_penalized
from ..slots import SlotInputs
from ..stage import Stage, rows_of
from ..state import ServeState, Sizes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Guesses:
    """Tokens to read for each slot: its last one and guesses [B@data, T], the place of the first, and their number.

    `counts` [B@data] is 0 for a slot that is not decoded.
    """

    tokens: Any
    starts: Any
    counts: Any


def guess_shapes(sizes: Sizes, *, num_tokens: int, mesh: Mesh, rules: ShardingRules) -> Guesses:
    """Return shapes and shardings of guesses, `num_tokens` for each slot, which are the same on all ranks."""
    placed = NamedSharding(mesh, rules.spec(("batch",)))
    tokens, count = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed) for shape in ((sizes.slots, num_tokens), (sizes.slots,))
    )
    return Guesses(tokens=tokens, starts=count, counts=count)


def no_guesses(sizes: Sizes, *, num_tokens: int) -> Guesses:
    """Return arrays on the host for slots that are all not decoded."""
    tokens = np.zeros((sizes.slots, num_tokens), np.int32)
    return Guesses(tokens=tokens, starts=np.zeros(sizes.slots, np.int32), counts=np.zeros(sizes.slots, np.int32))


def verify(
    state: ServeState, *, stage: Stage, sizes: Sizes, params: Any, slots: SlotInputs, guesses: Guesses
) -> tuple[ServeState, Choice]:
    """Read tokens inside `shard_map`; return the state and what is chosen after each of them.

    -> leaves are [1, B, T, ...], NOTHING behind the tokens of a slot. A tick costs one permute of x[b, T, D] over
    `pipe`, and a call one all-reduce of these leaves.
    """
    num_tokens = guesses.tokens.shape[1]
    none = no_choice((sizes.slots_per_shard, num_tokens), vocab_size=stage.config.vocab_size)
    chosen: Choice = jax.tree.map(lambda leaf: stage.vary(jnp.zeros_like(leaf)), none)
    x = stage.vary(jnp.zeros((sizes.group_size, num_tokens, stage.config.hidden_size), state.x.dtype))
    work = _Work(stage, sizes, params, slots, guesses)

    def tick(tick: jax.Array, carry: Any) -> Any:
        group = tick - stage.rank
        # In the first and the last ticks a rank has no group: it takes any one, and does no work.
        row = jnp.clip(group, 0, sizes.groups - 1) * sizes.group_size
        has_work = (rows_of(guesses.counts, row, sizes.group_size) > 0).any()
        is_here = (group >= 0) & (group < sizes.groups) & has_work
        state, x, chosen = jax.lax.cond(
            stage.any_together(stage.vary(is_here)), lambda carry: work.run(carry, row), lambda carry: carry, carry
        )
        return state, stage.pass_on(x, shape="line"), chosen

    state, _, chosen = jax.lax.fori_loop(0, sizes.groups + stage.num_ranks - 1, tick, (state, x, chosen))
    # Only the last rank has chosen tokens; the others hold zeros.
    chosen = jax.lax.psum(chosen, stage.pipe) if stage.num_ranks > 1 else chosen
    is_read_BT = jnp.arange(num_tokens)[None] < guesses.counts[:, None]
    chosen = chosen._replace(token=jnp.where(is_read_BT, chosen.token, NOTHING))
    return state, jax.tree.map(lambda leaf: leaf[None], chosen)


@dataclass(frozen=True)
class _Work:
    """What a rank does with one group."""

    stage: Stage
    sizes: Sizes
    params: Any
    slots: SlotInputs
    guesses: Guesses

    def run(self, carry: Any, row: jax.Array) -> Any:
        """Run this rank's layers; the last rank chooses the tokens after all that were read."""
        state, x, chosen = carry
        stage, size = self.stage, self.sizes.group_size
        own: SlotInputs = jax.tree.map(lambda leaf: rows_of(leaf, row, size), self.slots)
        given: Guesses = jax.tree.map(lambda leaf: rows_of(leaf, row, size), self.guesses)
        num_tokens = given.tokens.shape[1]
        new = NewTokens(row=row, starts=given.starts, counts=given.counts, pages=own.pages, most=own.most_read)
        x = stage.on_rank(0, lambda: stage.embed(self.params, given.tokens, new.positions(num_tokens)), lambda: x)
        x, cache = stage.run_layers(self.params, x, cache=state.cache, new=new)

        def finish() -> Choice:
            choice = self._choose(x, own, new, lambda: rows_of(state.seen[0], row, size))
            return jax.tree.map(
                lambda all_, group: jax.lax.dynamic_update_slice_in_dim(all_, group, row, 0), chosen, choice
            )

        is_last = stage.vary(jnp.asarray(stage.rank == stage.num_ranks - 1))
        chosen = jax.lax.cond(is_last, finish, lambda: chosen)
        # A sequence with a penalty has no guesses: its logits depend on each token before.
        seen = count_tokens(
            state.seen,
            rows_of(chosen.token, row, size)[:, 0],
            row=row,
            is_counted_B=is_last & (given.counts > 0) & is_penalized(own.settings),
            axes=stage.vocab_axes,
        )
        return replace(state, cache=cache, seen=seen, busy=state.busy + (given.counts > 0).any()), x, chosen

    def _choose(self, x: jax.Array, own: SlotInputs, new: NewTokens, read_seen: Any) -> Choice:
        """Return the choice after each of [b, T] tokens, every place as a row of its own."""
        size, num_tokens = x.shape[:2]

        def repeat(leaf: jax.Array) -> jax.Array:
            return jnp.repeat(leaf, num_tokens, axis=0)

        choice = self.stage.choose(
            self.params,
            x.reshape(size * num_tokens, 1, -1),
            jax.tree.map(repeat, own.settings),
            read_seen=lambda: repeat(read_seen()),
            read_allowed=lambda: repeat(rows_of(self.slots.allowed, new.row, size)),
            position_B=new.positions(num_tokens).reshape(-1) + 1,
        )
        return jax.tree.map(lambda leaf: leaf.reshape(size, num_tokens, *leaf.shape[1:]), choice)
