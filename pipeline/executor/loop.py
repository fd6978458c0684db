"""The loop over the turns of a schedule: a `lax.scan`, or three where the schedule has a steady state.

    turns of the tables     | 0 1 2 ...  | pairs of turns, F and B on every rank | ... last |
                              run_turn       _run_pair                             run_turn

In the steady state every rank runs a forward and a backward, tick after tick, so none has to ask what its action is.
One body does both without conditionals around them, and each message has work beside it that does not wait for it:

    gradients of the tick before   |--permute-->|                        needed by this backward
    forward                        |============|
    activations of this forward                 |--permute-->|           needed by the next forward
    backward                                    |============|
    sums over pipe, ends together  |--dx, dy--->|---y, x---->|           dx, dy of the tick before, x of the next

In a turn of its own, as `execute.py` runs them, a message stands in a conditional with nothing beside it. The same
tables serve both ways: with overlap, `lower` puts forwards first in these ticks, makes x a turn earlier and takes dx a
turn later, and `steady.py` finds where the steady state is.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .ends_together import make_first, make_last, run_first, run_first_back, run_last, share_last, take_first_back
from .execute import backward, forward, run_turn, send
from .loop_plan import Bubbles, LoopPlan, plan_loop
from .loop_state import Grads, LoopState, Sums, Wants, put
from .rank_model import RankModel
from .tables import NONE, Steady, Tables, Transfer, Turns


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
    y = share_last(model, state, _row(plan, tables, steady.start - 1)) if steady.ends == "always" else ()
    state, y = _scan(partial(_run_pair, plan, steady), (state, y), pairs)
    state = _finish(plan, steady, (state, y), _row(plan, tables, steady.stop - 1))
    state = _scan(partial(run_turn, plan), state, after)
    return state.sums, state.grads


def _row(plan: LoopPlan, tables: Tables, turn: int) -> Turns:
    """Return this rank's entries [] of one turn."""
    row = jax.tree.map(lambda column: jnp.asarray(column[turn]), tables.turns)
    return row.at_rank(jax.lax.axis_index(plan.model.pipe))


def _scan(body: Any, state: Any, rows: Any) -> Any:
    # Constants of the program, the same on all ranks; the scan takes one row [ranks] of each column a turn.
    state, _ = jax.lax.scan(body, state, jax.tree.map(jnp.asarray, rows))
    return state


Carry = tuple[LoopState, Any]
"""The state, and y[b, ...] of the last stage that waits for its loss; () unless the ends run together in every pair."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Pair:
    """The rows of a forward and of a backward turn, and of the backward turn before both."""

    before: Turns
    ahead: Turns
    back: Turns


def _split(turns: Turns, steady: Steady) -> tuple[Turns, Pair, Turns]:
    """Return the turns before the steady state, its pairs, and the turns after it."""

    def rows(start: int, stop: int | None, step: int = 1, of: Turns = turns) -> Turns:
        return jax.tree.map(lambda column: column[start:stop:step], of)

    start, stop = steady.start, steady.stop
    pairs = Pair(before=rows(start - 1, stop - 1, 2), ahead=rows(start, stop, 2), back=rows(start + 1, stop, 2))
    # What would happen last before the steady state happens beside its first forward: an exchange, and a loss.
    sent = {
        offset: replace(transfer, is_active=_without(transfer.is_active, start - 1, 0))
        for offset, transfer in turns.backward.items()
        if offset in steady.backward
    }
    ends = turns.ends
    if steady.ends == "always":
        ends = replace(ends, last=_without(ends.last, start - 1, NONE))
    ramp = replace(turns, backward=turns.backward | sent, ends=ends)
    return rows(0, start, of=ramp), pairs, rows(stop, None)


def _without(column: Any, turn: int, nothing: int) -> Any:
    return np.where(np.arange(len(column)) == turn, nothing, column)


def _finish(plan: LoopPlan, steady: Steady, carry: Carry, row: Turns) -> LoopState:
    """Do what the last pair has left to the next: send its gradients, and make its loss."""
    state, y = carry
    if steady.ends == "always":
        state = make_last(plan.model, state, row, y)
    arrived = _send(plan, state.gradients, row.backward, step=-1, offsets=steady.backward)
    return replace(state, gradients=_receive(state.gradients, row.backward, arrived))


def _run_pair(plan: LoopPlan, steady: Steady, carry: Carry, pair: Pair) -> tuple[Carry, None]:
    """Run one forward and one backward of this rank, given the columns [ranks] of their turns.

    The order is that of the turns, but for what is sent: it leaves as soon as it is made, and is put into its slot when
    it is needed. Where the ends run together, the loss of a pair is made at the start of the next one.
    """
    (state, y), model = carry, plan.model
    rank = jax.lax.axis_index(model.pipe)
    before, ahead, back = pair.before.at_rank(rank), pair.ahead.at_rank(rank), pair.back.at_rank(rank)
    is_always = steady.ends == "always"
    gradients = _send(plan, state.gradients, before.backward, step=-1, offsets=steady.backward)
    if is_always:
        state = make_last(model, take_first_back(model, state, ahead), before, y)
    state = _run_ends(plan, steady, state, (run_first, ahead))
    state = forward(plan, state, ahead)
    state = replace(state, gradients=_receive(state.gradients, before.backward, gradients))
    activations = _send(plan, state.activations, back.forward, step=1, offsets=steady.forward)
    if is_always:
        y = share_last(model, state, back)
        state = make_first(model, state, back)
    state = _run_ends(plan, steady, state, (run_last, ahead), (run_first_back, ahead), (run_first, back))
    state = backward(plan, state, back)
    state = _run_ends(plan, steady, state, (run_last, back), (run_first_back, back))
    return (replace(state, activations=_receive(state.activations, back.forward, activations)), y), None


def _run_ends(plan: LoopPlan, steady: Steady, state: LoopState, *steps: Any) -> LoopState:
    """Run steps of the ends that a pair may have or not, (function, turn)."""
    for step, turn in steps if steady.ends == "sometimes" else ():
        state = step(plan.model, state, turn)
    return state


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
