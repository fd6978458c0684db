"""Take a stage's output: send it to the next rank, or compute the loss of it with `last`.

Loss and gradient are computed at once, in the forward turn of the last stage, so that logits never wait in a buffer;
only dy[b, ...] waits, in the gradients buffer, until that stage's backward. Where all ranks run `last` together
(`ends_together.py`), the last stage puts its output into a slot as well.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from ..lowering.tables import NONE, Turns
from ..model.protocol import Given
from .buffers import vary_like, write
from .loop_state import LoopState, Wants, put
from .rank_model import RankModel


@dataclass(frozen=True, kw_only=True)
class Leave:
    """The end of a stage's forward."""

    model: RankModel
    wants: Wants

    def leave(self, state: LoopState, y: Any, turn: Turns, given: Given) -> LoopState:
        """Put y[b, ...] into its slot; on the last stage, add the loss and its gradients instead."""
        slot = turn.activations.write
        # `put` and `finish` exclude each other: only the last stage has no slot to write to.
        state = replace(state, activations=put(state.activations, y, slot))
        if self.model.ends_together:
            return state
        finish = partial(self._add_loss, y, given)
        if self.wants == "grads":
            finish = partial(self._add_loss_and_grads, y, given, turn)
        return jax.lax.cond(slot == NONE, finish, lambda state: state, state)

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
