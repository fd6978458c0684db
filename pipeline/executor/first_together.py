"""Run `first` on all ranks at once, in steps of its own before and after the actions of a turn.

    rank 0: rows 0-3 of the table   --+                     the first stage's rank puts x into a slot,
    rank 1: rows 4-7 of the table   --+-- all-reduce: x     from which its next forward reads it

No rank then holds or computes more of a large vocabulary than another ("Balancing Pipeline Parallelism with Vocabulary
Parallelism", Yeung et al. 2024, section 3). It costs two all-reduces of one activation over `pipe` a microbatch: one
inside `first`, one of dx. Parameters and microbatches of the ends are marked as varying over data alone, so that
autodiff knows which gradients to sum over ranks. `last_together.py` is the other end of the pipeline.
"""

from dataclasses import replace

import jax

from .buffers import vary_like
from .loop_state import LoopState, broadcast_slot, put
from .rank_model import RankModel
from .tables import NONE, Turns


def run_first(model: RankModel, state: LoopState, turn: Turns) -> LoopState:
    """Make x[b, ...] for the forward that the first stage runs in this turn, and put it into its slot."""

    @jax.named_scope("first")
    def first(state: LoopState) -> LoopState:
        x = vary_like(model.run_first(model.at_ends.read(turn.ends.first)), state.activations)
        return replace(state, activations=put(state.activations, x, turn.activations.first))

    return jax.lax.cond(turn.ends.first == NONE, lambda state: state, first, state)


def run_first_back(model: RankModel, state: LoopState, turn: Turns) -> LoopState:
    """Add the gradients of `first`, given the gradient that the first stage has just made of its input."""

    @jax.named_scope("first_back")
    def first_back(state: LoopState) -> LoopState:
        given = model.at_ends.read(turn.ends.first_back)
        # dx is on the rank of the first stage alone, and every rank needs it for its own rows of the table.
        dx = broadcast_slot(state.gradients, turn.gradients.first_back, pipe=model.pipe)
        assert state.grads is not None
        return replace(state, grads=state.grads.add_shared(model.first_grads(given, dx), given.number))

    return jax.lax.cond(turn.ends.first_back == NONE, lambda state: state, first_back, state)
