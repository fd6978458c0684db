"""Get the input of a stage, and pass its gradient back: on the first stage by `first`, on others by slots.

    a forward       x  <- `first`, on the first stage       or  <- slot of the activations buffer
    a backward      dx -> the gradients of `first`          or  -> slot of the gradients buffer

Where all ranks run `first` together (`ends_together.py`), the first stage takes x from a slot as well. `leave.py` is
the other end of a stage.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax

from ..lowering.tables import NONE, Turns
from ..model.protocol import Given
from .buffers import read, vary_like
from .loop_state import Grads, LoopState, put
from .rank_model import RankModel


@dataclass(frozen=True, kw_only=True)
class Enter:
    """The start of a stage's forward, and the end of its backward."""

    model: RankModel

    def enter(self, state: LoopState, turn: Turns, given: Given) -> Any:
        """Return x[b, ...] for a forward: made by `first` on the first stage, else read from its slot."""
        slot = turn.activations.read
        if self.model.ends_together:
            return read(state.activations, slot)

        @jax.named_scope("first")
        def first() -> Any:
            return vary_like(self.model.run_first(given), read(state.activations, 0))

        return jax.lax.cond(slot == NONE, first, lambda: read(state.activations, slot))

    def leave_back(self, state: LoopState, dx: list[jax.Array], turn: Turns, given: Given) -> LoopState:
        """Put dx[b, ...] into its slot; on the first stage, add the gradients of `first` instead."""
        slot = turn.gradients.write
        state = replace(state, gradients=put(state.gradients, dx, slot))
        if self.model.ends_together:
            return state

        @jax.named_scope("first_back")
        def through_first(sums: Grads) -> Grads:
            # `first` runs again: it is cheap, and keeping its residuals would take a buffer more.
            return sums.add_shared(self.model.first_grads(given, dx), given.number)

        return replace(state, grads=jax.lax.cond(slot == NONE, through_first, lambda sums: sums, state.grads))
