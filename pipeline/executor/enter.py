"""Give a stage its input: the activation from the rank before, or the output of `first` for the first stage.

The backward of this is here too: the gradient of a stage's input goes to the rank before, or through `first` to the
shared parameters. There are two ways to run `first` (see `tables.Ends`):

    alone       rank 0   first + layers    rank 1   layers       `first` is part of the first stage's own action
    together    rank 0   first             rank 1   first        a step of its own, before the actions of a turn,
                         layers                     layers       with parameters split over pipe

Together no rank holds or computes more of a large vocabulary than another ("Balancing Pipeline Parallelism with
Vocabulary Parallelism", Yeung et al. 2024, section 3). `leave.py` is the other end of the pipeline.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from ..model.protocol import Given
from .buffers import read, vary_like
from .loop_state import Grads, LoopState, broadcast_slot, put
from .rank_model import RankModel
from .tables import NONE, Turns


@dataclass(frozen=True, kw_only=True)
class EnterAlone:
    """Run `first` inside the actions of the first stage."""

    model: RankModel

    def run_first(self, state: LoopState, _turn: Turns) -> LoopState:
        """Do nothing before an action: `enter` runs `first`."""
        return state

    def enter(self, state: LoopState, turn: Turns, given: Given) -> Any:
        """Return x[b, ...] for a forward: made by `first` on the first stage, else read from its slot."""

        @jax.named_scope("first")
        def first() -> Any:
            return vary_like(self.model.run_first(given), read(state.activations, 0))

        slot = turn.activations.read
        return jax.lax.cond(slot == NONE, first, lambda: read(state.activations, slot))

    def leave_back(self, state: LoopState, dx: list[jax.Array], turn: Turns, given: Given) -> LoopState:
        """Put dx[b, ...] into its slot; on the first stage, add the gradients of `first` instead."""

        @jax.named_scope("first_back")
        def through_first(sums: Grads) -> Grads:
            # `first` runs again: it is cheap, and keeping its residuals would take a buffer more.
            return sums.add_shared(self.model.first_grads(given, dx), given.number)

        slot = turn.gradients.write
        grads = jax.lax.cond(slot == NONE, through_first, lambda sums: sums, state.grads)
        return replace(state, grads=grads, gradients=put(state.gradients, dx, slot))

    def run_first_back(self, state: LoopState, _turn: Turns) -> LoopState:
        """Do nothing after an action: `leave_back` has run the backward of `first`."""
        return state


@dataclass(frozen=True, kw_only=True)
class EnterTogether:
    """Run `first` on all ranks at once, in steps of its own before and after the actions of a turn.

    It costs two all-reduces of one activation over `pipe` a microbatch: one inside `first`, one of dx. Parameters and
    microbatches of the ends are marked as varying over data alone, so that autodiff knows which gradients to sum over
    ranks.
    """

    model: RankModel

    def run_first(self, state: LoopState, turn: Turns) -> LoopState:
        """Make x[b, ...] for the forward that the first stage runs in this turn, and put it into its slot."""

        @jax.named_scope("first")
        def first(state: LoopState) -> LoopState:
            x = self.model.run_first(self.model.at_ends.read(turn.ends.first))
            x = vary_like(x, state.activations)
            return replace(state, activations=put(state.activations, x, turn.activations.first))

        return jax.lax.cond(turn.ends.first == NONE, lambda state: state, first, state)

    def enter(self, state: LoopState, turn: Turns, _given: Given) -> Any:
        """Return x[b, ...] for a forward, read from its slot."""
        return read(state.activations, turn.activations.read)

    def leave_back(self, state: LoopState, dx: list[jax.Array], turn: Turns, _given: Given) -> LoopState:
        """Put dx[b, ...] into its slot, from which it is sent or `run_first_back` takes it."""
        return replace(state, gradients=put(state.gradients, dx, turn.gradients.write))

    def run_first_back(self, state: LoopState, turn: Turns) -> LoopState:
        """Add the gradients of `first`, given the gradient that the first stage has just made of its input."""
        return jax.lax.cond(
            turn.ends.first_back == NONE, lambda state: state, partial(self._add_first_grads, turn=turn), state
        )

    @jax.named_scope("first_back")
    def _add_first_grads(self, state: LoopState, *, turn: Turns) -> LoopState:
        given = self.model.at_ends.read(turn.ends.first_back)
        # dx is on the rank of the first stage alone, and every rank needs it for its own rows of the table.
        dx = broadcast_slot(state.gradients, turn.gradients.first_back, pipe=self.model.pipe)
        assert state.grads is not None
        return replace(state, grads=state.grads.add_shared(self.model.first_grads(given, dx), given.number))
