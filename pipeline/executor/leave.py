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

from ..model.stage import StageFns
from .buffers import add, read, vary_like, write
from .loop_state import LoopState, Wants, broadcast_slot, put
from .tables import NONE, Turns


@dataclass(frozen=True, kw_only=True)
class LeaveAlone:
    """Run `last` inside the forwards of the last stage.

    shared: parameters that every rank holds whole, marked as varying over pipe and data.
    """

    fns: StageFns
    shared: Any
    wants: Wants

    def leave(self, state: LoopState, y: jax.Array, turn: Turns, microbatch: Any) -> LoopState:
        """Put y[b, ...] into its slot; on the last stage, add the loss and its gradients instead."""
        slot = turn.activations.write
        # `put` and `finish` exclude each other: only the last stage has no slot to write to.
        state = replace(state, activations=put(state.activations, y, slot))
        finish = partial(self._add_loss, y, microbatch)
        if self.wants == "grads":
            finish = partial(self._add_loss_and_grads, y, microbatch, turn)
        return jax.lax.cond(slot == NONE, finish, lambda state: state, state)

    def run_last(self, state: LoopState, _turn: Turns) -> LoopState:
        """Do nothing after an action: `leave` has run `last`."""
        return state

    @jax.named_scope("last")
    def _add_loss(self, y: jax.Array, microbatch: Any, state: LoopState) -> LoopState:
        return replace(state, loss=state.loss + self.fns.last(self.shared, y, microbatch))

    @jax.named_scope("last")
    def _add_loss_and_grads(self, y: jax.Array, microbatch: Any, turn: Turns, state: LoopState) -> LoopState:
        loss, (d_shared, dy) = _loss_and_grads(self.fns, self.shared, y, microbatch)
        return replace(
            state,
            loss=state.loss + loss,
            gradients=write(state.gradients, vary_like(dy, state.gradients), turn.gradients.loss),
            shared_grads=add(state.shared_grads, d_shared),
        )


@dataclass(frozen=True, kw_only=True)
class LeaveTogether:
    """Run `last` on all ranks at once, in a step of its own after the actions of a turn.

    It costs two all-reduces of one activation over `pipe` a microbatch: of y, and of dy inside the gradient of
    `last`. These synchronize the ranks; in schedules built with vocab="split" all actions of such a turn are of one
    kind, so no rank waits for a longer action.

    shared, batch: as in `EnterTogether`.
    """

    fns: StageFns
    shared: Any
    batch: Any
    wants: Wants

    def leave(self, state: LoopState, y: jax.Array, turn: Turns, _microbatch: Any) -> LoopState:
        """Put y[b, ...] into its slot, from which it is sent or `run_last` takes it."""
        return replace(state, activations=put(state.activations, y, turn.activations.write))

    def run_last(self, state: LoopState, turn: Turns) -> LoopState:
        """Add the loss of what the last stage has just made, and its gradients."""
        return jax.lax.cond(turn.ends.last == NONE, lambda state: state, partial(self._add_loss, turn=turn), state)

    @jax.named_scope("last")
    def _add_loss(self, state: LoopState, *, turn: Turns) -> LoopState:
        microbatch = read(self.batch, turn.ends.last)
        # Every rank computes the same loss; it is counted on the last stage's alone.
        is_counted = turn.activations.last != NONE
        y = broadcast_slot(state.activations, turn.activations.last, pipe=self.fns.axes.pipe)
        if self.wants == "loss":
            loss = vary_like(self.fns.last(self.shared, y, microbatch), state.loss)
            return replace(state, loss=state.loss + jnp.where(is_counted, loss, 0))
        loss, (d_shared, dy) = _loss_and_grads(self.fns, self.shared, y, microbatch)
        return replace(
            state,
            loss=state.loss + jnp.where(is_counted, vary_like(loss, state.loss), 0),
            gradients=put(state.gradients, vary_like(dy, state.gradients), turn.gradients.loss),
            shared_grads=add(state.shared_grads, d_shared),
        )


def _loss_and_grads(fns: StageFns, shared: Any, y: jax.Array, microbatch: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    """Return loss[] and (gradients of shared, dy[b, ...])."""
    return jax.value_and_grad(fns.last, argnums=(0, 1), allow_int=True)(shared, y, microbatch)
