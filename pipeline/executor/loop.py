"""The loop over the turns of a schedule: a `lax.scan`, or three where the schedule has a steady state.

    turns of the tables     | 0 1 2 ...  | pairs of turns, F and B on every rank | ... last |
                              run_turn       _run_pair                             run_turn

In the steady state every rank runs a forward and a backward, tick after tick, so none has to ask what its action is.
One body does both without conditionals around them, and each message has work beside it that does not wait for it:

    gradients of the tick before   |--permute-->|                        needed by this backward
    forward                        |============|
    activations of this forward                 |--permute-->|           needed by the next forward
    backward                                    |============|
    sums over pipe, ends together  |-- dx ---|   |-- y, next x --|

In a turn of its own, as `execute.py` runs them, a message stands in a conditional with nothing beside it. The same
tables serve both ways: with overlap, `lower` puts forwards first in these ticks, makes x a turn earlier and takes dx a
turn later, and `lowering/steady.py` finds where the steady state is.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ...meshes.device_axes import hold
from ..lowering.tables import Steady, Tables, Transfer, Turns, at_rank
from .ends_together import (
    make_first,
    make_last,
    run_first,
    run_first_back,
    run_last,
    share_dx,
    share_y,
    take_first_back,
)
from .execute import backward, forward, gather_weights, run_chunk, run_turn, send
from .host_residuals import finish_copies, start_loading, without_host
from .loop_plan import Bubbles, LoopPlan, plan_loop
from .loop_state import Grads, LoopState, Sums, Wants, put
from .rank_model import RankModel


def run_turns(model: RankModel, *, tables: Tables, bubbles: Bubbles, wants: Wants) -> tuple[Sums, Grads | None]:
    """Return this device's share of the sums and of the gradients; for use inside `shard_map`.

    loss[] {U:(pipe, data)}; gradients {U:data} of stages and of a shared part, {U:(pipe, data)} of shared wholes.
    Costs one neighbour permute of an activation and one of a gradient in ticks where any rank sends one; a placement
    whose stages go up and down again has one to each side.
    """
    plan = plan_loop(model, tables=tables, bubbles=bubbles, wants=wants)
    state, steady = plan.start_state(tables), tables.steady
    if steady is None:
        state = _scan(partial(run_turn, plan), state, tables.turns)
        return state.sums, state.grads
    before, pairs, after = _split(tables.turns, steady)
    state = _scan(partial(run_turn, plan), state, before)
    state = _scan(partial(_run_pair, plan, steady), state, pairs)
    # The gradients of the last pair have no forward beside them.
    final = jax.tree.map(lambda column: jnp.asarray(column[steady.stop - 1]), tables.turns.backward)
    final = at_rank(final, jax.lax.axis_index(model.pipe))
    gradients = _receive(state.gradients, final, _send(plan, state.gradients, final, step=-1, offsets=steady.backward))
    state = _scan(partial(run_turn, plan), replace(state, gradients=gradients), after)
    return state.sums, state.grads


def _scan(body: Any, state: LoopState, rows: Any) -> LoopState:
    # Constants of the program, the same on all ranks; the scan takes one row [ranks] of each column a turn.
    state, _ = jax.lax.scan(body, state, jax.tree.map(jnp.asarray, rows))
    return state


Pair = tuple[Turns, Turns, dict[int, Transfer]]
"""The rows of a forward and of a backward turn, and the transfers of gradients of the turn before both."""


def _split(turns: Turns, steady: Steady) -> tuple[Turns, Pair, Turns]:
    """Return the turns before the steady state, its pairs, and the turns after it."""

    def rows(tree: Any, start: int, stop: int | None, step: int = 1) -> Any:
        return jax.tree.map(lambda column: column[start:stop:step], tree)

    # What would be exchanged just before the steady state is exchanged beside its first forward.
    moved = {
        offset: replace(transfer, is_active=np.where(_is_at(transfer, steady.start - 1), 0, transfer.is_active))
        if offset in steady.backward
        else transfer
        for offset, transfer in turns.backward.items()
    }
    pairs = (
        rows(turns, steady.start, steady.stop, 2),
        rows(turns, steady.start + 1, steady.stop, 2),
        rows(turns.backward, steady.start - 1, steady.stop - 1, 2),
    )
    return rows(replace(turns, backward=moved), 0, steady.start), pairs, rows(turns, steady.stop, None)


def _is_at(transfer: Transfer, turn: int) -> Any:
    return np.arange(len(transfer.is_active)) == turn


def _run_pair(plan: LoopPlan, steady: Steady, state: LoopState, pair: Pair) -> tuple[LoopState, None]:
    """Run one forward and one backward of this rank, given the columns [ranks] of their turns.

    The order is that of the turns, but for messages, which leave as soon as they are made and are put into their slots
    when they are needed, and for `last`, whose gradient no backward of the same pair reads. What is summed over pipe
    for the ends is used only after the products that are to run beside it: by itself XLA takes element-wise work for
    enough.
    """
    rank, model = jax.lax.axis_index(plan.model.pipe), plan.model
    ahead, back, before = (at_rank(rows, rank) for rows in pair)
    is_together, dx, y = steady.ends == "always", None, None
    gradients = _send(plan, state.gradients, before, step=-1, offsets=steady.backward)
    arriving, host = {}, {}
    if ahead.host is not None:
        state, arriving = start_loading(state, ahead.host)
        state, host = without_host(state)
    if is_together:
        dx = share_dx(model, state, ahead)
    if steady.ends == "sometimes":
        state = run_first(model, state, ahead)
    state = run_chunk(forward, plan, gather_weights(plan, state, ahead), ahead)
    if ahead.host is not None:
        state, host = without_host(finish_copies(replace(state, host=host), arriving, ahead.host, plan.packings))
    if is_together:
        dx, activations = hold(dx, until=state.activations)
        state = take_first_back(model, replace(state, activations=activations), ahead, dx=dx)
        y = share_y(model, state, ahead)
    state = replace(state, gradients=_receive(state.gradients, before, gradients))
    activations = _send(plan, state.activations, back.forward, step=1, offsets=steady.forward)
    if is_together:
        state = make_first(model, state, back)
    if steady.ends == "sometimes":
        state = run_first(model, run_first_back(model, run_last(model, state, ahead), ahead), back)
    state = run_chunk(backward, plan, gather_weights(plan, state, back), back)
    if is_together:
        y, gradients = hold(y, until=state.gradients)
        state = make_last(model, replace(state, gradients=gradients), ahead, y=y)
    if steady.ends == "sometimes":
        state = run_first_back(model, run_last(model, state, back), back)
    return replace(state, activations=_receive(state.activations, back.forward, activations), host=host), None


@jax.named_scope("exchange")
def _send(
    plan: LoopPlan, buffers: Any, transfers: dict[int, Transfer], *, step: Literal[1, -1], offsets: tuple[int, ...]
) -> dict[int, Any]:
    """Return what arrives from either side, of the slots that a turn sends."""
    links = plan.placement.links(step)
    return {offset: send(plan, buffers, transfers[offset], links[offset]) for offset in offsets}


def _receive(buffers: Any, transfers: dict[int, Transfer], arrived: dict[int, Any]) -> Any:
    for offset, values in arrived.items():
        buffers = put(buffers, values, transfers[offset].receive)
    return buffers
