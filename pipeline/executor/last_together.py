"""Run `last` on all ranks at once, in a step of its own after the actions of a turn.

It costs two all-reduces of one activation over `pipe` a microbatch: of y, and of dy inside the gradient of `last`.
These synchronize the ranks; in schedules built with vocab="split" all actions of such a turn are of one kind, so no
rank waits for a longer action. As with `first` (see `first_together.py`), each rank has its part of the vocabulary.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from ..model.protocol import Output
from .buffers import vary_like
from .loop_state import LoopState, Wants, broadcast_slot, put
from .rank_model import RankModel
from .tables import NONE, Turns


def run_last(model: RankModel, state: LoopState, turn: Turns, *, wants: Wants) -> LoopState:
    """Add the loss of what the last stage has just made, and its gradients."""

    @jax.named_scope("last")
    def last(state: LoopState) -> LoopState:
        given = model.at_ends.read(turn.ends.last)
        # Every rank computes the same loss; it is counted on the last stage's alone.
        is_counted = turn.activations.last != NONE
        y = broadcast_slot(state.activations, turn.activations.last, pipe=model.pipe)

        def count(out: Output) -> Output:
            return jax.tree.map(lambda leaf: jnp.where(is_counted, vary_like(leaf, state.sums.loss), 0), out)

        if wants == "loss":
            return replace(state, sums=state.sums.add(count(model.run_last(y, given))))
        out, grads, dy = model.last_and_grads(y, given)
        assert state.grads is not None
        return replace(
            state,
            sums=state.sums.add(count(out)),
            gradients=put(state.gradients, vary_like(dy, state.gradients), turn.gradients.loss),
            grads=state.grads.add_shared(grads, given.number),
        )

    return jax.lax.cond(turn.ends.last == NONE, lambda state: state, last, state)
