"""Run `first` and `last` on all ranks at once, in steps of their own before and after the actions of a turn.

    rank 0: rows 0-3 of the table   --+                     the first stage's rank puts x into a slot,
    rank 1: rows 4-7 of the table   --+-- all-reduce: x     from which its next forward reads it

No rank then holds or computes more of a large vocabulary than another ("Balancing Pipeline Parallelism with Vocabulary
Parallelism", Yeung et al. 2024, section 3). `first` costs two all-reduces of an activation over `pipe` a microbatch,
one inside `first` and one of dx. `last` costs two as well, of y, and of dy inside its gradient. They synchronize ranks,
and in schedules built with vocab="split" all actions of such a turn are of one kind, so no rank waits for a longer one.
Parameters and microbatches of the ends are marked as varying over data alone, so that autodiff knows which gradients to
sum over ranks.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...layers.in_order import after, next_mark
from ..lowering.tables import NONE, Turns
from ..model.protocol import Output
from .buffers import vary_like
from .loop_state import LoopState, Wants, broadcast_slot, put
from .rank_model import RankModel


@jax.named_scope("first")
def make_first(model: RankModel, state: LoopState, turn: Turns) -> LoopState:
    """Make x[b, ...] for a forward of the first stage, and put it into its slot."""
    x = vary_like(model.run_first(model.at_ends.read(turn.ends.first)), state.activations)
    activations = put(state.activations, x, turn.activations.first)
    return replace(state, activations=activations, mark=next_mark(state.mark))


def run_first(model: RankModel, state: LoopState, turn: Turns) -> LoopState:
    """Make x for the forward that the tables name, if they name one in this turn."""
    is_named = after(state.mark, turn.ends.first != NONE)
    return jax.lax.cond(is_named, lambda state: make_first(model, state, turn), lambda state: state, state)


@jax.named_scope("first_back")
def share_dx(model: RankModel, state: LoopState, turn: Turns) -> list[jax.Array]:
    """Return to all ranks the gradient that the first stage has made of its input."""
    # dx is on the rank of the first stage alone, and every rank needs it for its own rows of the table.
    return broadcast_slot(state.gradients, turn.gradients.first_back, pipe=model.pipe)


@jax.named_scope("first_back")
def take_first_back(model: RankModel, state: LoopState, turn: Turns, *, dx: list[jax.Array] | None = None) -> LoopState:
    """Add the gradients of `first`, given dx of the first stage's input, or what `share_dx` returns now."""
    given = model.at_ends.read(turn.ends.first_back)
    dx = share_dx(model, state, turn) if dx is None else dx
    assert state.grads is not None
    grads = state.grads.add_shared(model.first_grads(given, dx), given.number)
    return replace(state, grads=grads, mark=next_mark(state.mark))


def run_first_back(model: RankModel, state: LoopState, turn: Turns) -> LoopState:
    """Add the gradients of `first` for the microbatch that the tables name, if they name one in this turn."""
    is_named = after(state.mark, turn.ends.first_back != NONE)
    return jax.lax.cond(is_named, lambda state: take_first_back(model, state, turn), lambda state: state, state)


@jax.named_scope("last")
def share_y(model: RankModel, state: LoopState, turn: Turns) -> Any:
    """Return to all ranks what the last stage has made."""
    return broadcast_slot(state.activations, turn.activations.last, pipe=model.pipe)


@jax.named_scope("last")
def make_last(model: RankModel, state: LoopState, turn: Turns, *, y: Any = None, wants: Wants = "grads") -> LoopState:
    """Add the loss of y, what the last stage has made, or what `share_y` returns now, and its gradients."""
    given = model.at_ends.read(turn.ends.last)
    # Every rank computes the same loss; it is counted on the last stage's alone.
    is_counted = turn.activations.last != NONE
    y = share_y(model, state, turn) if y is None else y

    def count(out: Output) -> Output:
        return jax.tree.map(lambda leaf: jnp.where(is_counted, vary_like(leaf, state.sums.loss), 0), out)

    if wants == "loss":
        return replace(state, sums=state.sums.add(count(model.run_last(y, given))), mark=next_mark(state.mark))
    out, grads, dy = model.last_and_grads(y, given)
    assert state.grads is not None
    return replace(
        state,
        sums=state.sums.add(count(out)),
        gradients=put(state.gradients, vary_like(dy, state.gradients), turn.gradients.loss),
        grads=state.grads.add_shared(grads, given.number),
        mark=next_mark(state.mark),
    )


def run_last(model: RankModel, state: LoopState, turn: Turns, *, wants: Wants = "grads") -> LoopState:
    """Add the loss of the microbatch that the tables name, if they name one in this turn."""
    run = partial(make_last, model, turn=turn, wants=wants)
    return jax.lax.cond(after(state.mark, turn.ends.last != NONE), run, lambda state: state, state)
