"""Take a stage's output: send it to the next rank, or compute the loss of it with `last`.

Loss and gradient are computed at once, in the forward turn of the last stage, so that logits never wait in a buffer;
only dy[b, ...] waits, in the gradients buffer, until that stage's backward. As with `first` (see `enter.py`), `last` is
run by the last stage alone or by all ranks together.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..model.protocol import Given, Output
from .buffers import vary_like, write
from .loop_state import LoopState, Wants, broadcast_slot, put
from .rank_model import RankModel
from .tables import NONE, Turns


@dataclass(frozen=True, kw_only=True)
class LeaveAlone:
    """Run `last` inside the forwards of the last stage."""

    model: RankModel
    wants: Wants

    def leave(self, state: LoopState, y: Any, turn: Turns, given: Given) -> LoopState:
        """Put y[b, ...] into its slot; on the last stage, add the loss and its gradients instead."""
        slot = turn.activations.write
        # `put` and `finish` exclude each other: only the last stage has no slot to write to.
        state = replace(state, activations=put(state.activations, y, slot))
        finish = partial(self._add_loss, y, given)
        if self.wants == "grads":
            finish = partial(self._add_loss_and_grads, y, given, turn)
        return jax.lax.cond(slot == NONE, finish, lambda state: state, state)

    def run_last(self, state: LoopState, _turn: Turns) -> LoopState:
        """Do nothing after an action: `leave` has run `last`."""
        return state

    @jax.named_scope("last")
    def _add_loss(self, y: Any, given: Given, state: LoopState) -> LoopState:
        return replace(state, sums=state.sums.add(self.model.run_last(y, given)))

    @jax.named_scope("last")
    def _add_loss_and_grads(self, y: Any, given: Given, turn: Turns, state: LoopState) -> LoopState:
        out, grads, dy = self.model.last_and_grads(y, given)
        assert state.grads is not None
        return replace(
            state,
            sums=state.sums.add(out),
            gradients=write(state.gradients, vary_like(dy, state.gradients), turn.gradients.loss),
            grads=state.grads.add_shared(grads, given.number),
        )


@dataclass(frozen=True, kw_only=True)
class LeaveTogether:
    """Run `last` on all ranks at once, in a step of its own after the actions of a turn.

    It costs two all-reduces of one activation over `pipe` a microbatch: of y, and of dy inside the gradient of `last`.
    These synchronize the ranks; in schedules built with vocab="split" all actions of such a turn are of one kind, so no
    rank waits for a longer action.
    """

    model: RankModel
    wants: Wants

    def leave(self, state: LoopState, y: Any, turn: Turns, _given: Given) -> LoopState:
        """Put y[b, ...] into its slot, from which it is sent or `run_last` takes it."""
        return replace(state, activations=put(state.activations, y, turn.activations.write))

    def run_last(self, state: LoopState, turn: Turns) -> LoopState:
        """Add the loss of what the last stage has just made, and its gradients."""
        return jax.lax.cond(turn.ends.last == NONE, lambda state: state, partial(self._add_loss, turn=turn), state)

    @jax.named_scope("last")
    def _add_loss(self, state: LoopState, *, turn: Turns) -> LoopState:
        given = self.model.at_ends.read(turn.ends.last)
        # Every rank computes the same loss; it is counted on the last stage's alone.
        is_counted = turn.activations.last != NONE
        y = broadcast_slot(state.activations, turn.activations.last, pipe=self.model.pipe)

        def count(out: Output) -> Output:
            return jax.tree.map(lambda leaf: jnp.where(is_counted, vary_like(leaf, state.sums.loss), 0), out)

        if self.wants == "loss":
            return replace(state, sums=state.sums.add(count(self.model.run_last(y, given))))
        out, grads, dy = self.model.last_and_grads(y, given)
        assert state.grads is not None
        return replace(
            state,
            sums=state.sums.add(count(out)),
            gradients=put(state.gradients, vary_like(dy, state.gradients), turn.gradients.loss),
            grads=state.grads.add_shared(grads, given.number),
        )
