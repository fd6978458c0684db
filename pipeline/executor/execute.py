"""The executor: one turn of any schedule, inside one jitted program.

Every mesh axis is manual (see `region.py`). In each turn a rank reads its row of the
tables and runs a forward, a backward, half of a backward, or nothing; at the end of a tick activations move to the next
rank and gradients to the one before:

    tables (one row a turn)          plan (made once)
            |                            |
            v                            v
    scan:  state -> first -> action -> last, first_back -> exchange -> state
                             |
                             +- forward:  enter -> layers -> leave
                             +- backward: layers -> enter.leave_back

An idle rank computes nothing, since inside `shard_map` each device takes its own branch of a `lax.cond`. Residuals wait
in buffers with as many slots as microbatches are in flight, written and read in place. Gradients are summed over `data`
once, after the loop.
`lowering/tables.py` draws a turn, and `loop.py` runs all of them; a mesh with one pipeline rank takes `sequential.py`
instead.
Read `layers.py` next.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...layers.in_order import Mark, after, next_mark
from ...meshes.device_axes import hold
from ...meshes.device_kind import is_nvidia
from ...schedules.placement import Link
from ..lowering.tables import BACKWARD, FORWARD, INPUT_GRAD, NONE, WEIGHT_GRAD, Transfer, Turns
from .buffers import read, type_like, write
from .ends_together import run_first, run_first_back, run_last
from .host_residuals import finish_copies, start_loading, without_host
from .layers import backward_layers, forward_layers, input_grad_layers, run_layers, weight_grad_layers
from .loop_plan import LoopPlan
from .loop_state import LoopState, put

Action = Callable[[LoopPlan, LoopState, Turns], LoopState]


def run_turn(plan: LoopPlan, state: LoopState, turns: Turns) -> tuple[LoopState, None]:
    """Run one turn of this rank, given the turn's columns [ranks]: the four steps that `tables.py` draws."""
    # All ranks run this one program; what differs between them is only the entries of the tables.
    turn = turns.at_rank(jax.lax.axis_index(plan.model.pipe))
    if turn.host is not None:
        state, arriving = start_loading(state, turn.host)
        state, host = without_host(state)
        state, _ = run_turn(plan, state, replace(turns, host=None))
        return finish_copies(replace(state, host=host), arriving, turn.host, plan.packings), None
    is_together = plan.model.ends_together
    if is_together:
        state = run_first(plan.model, state, turn)
    state = _end_actions(_run_action(plan, state, turn))
    if is_together:
        state = run_last(plan.model, state, turn, wants=plan.wants)
    if is_together and plan.wants == "grads":
        state = run_first_back(plan.model, state, turn)
    for offset, links in plan.placement.links(1).items():
        activations, mark = exchange(plan, state.activations, turn.forward[offset], links, mark=state.mark)
        state = replace(state, activations=activations, mark=mark)
    if plan.wants == "grads":
        for offset, links in plan.placement.links(-1).items():
            gradients, mark = exchange(plan, state.gradients, turn.backward[offset], links, mark=state.mark)
            state = replace(state, gradients=gradients, mark=mark)
    return state, None


def _run_action(plan: LoopPlan, state: LoopState, turn: Turns) -> LoopState:
    """Run the action of `turn.compute.kind`.

    There is one `cond` for each kind rather than one `switch` over them: a buffer that a branch only reads is then no
    output of it, and XLA updates it in place. Through a switch it is copied in every turn.
    """
    actions: dict[int, Action] = {FORWARD: forward}
    if plan.wants == "loss":
        actions = {FORWARD: _forward_only}
    elif plan.halves:
        actions |= {INPUT_GRAD: _input_grad, WEIGHT_GRAD: _weight_grad}
    else:
        actions |= {BACKWARD: backward}
    state = gather_weights(plan, state, turn)
    for kind, action in actions.items():
        is_its = after(state.mark, turn.compute.kind == kind)
        state = jax.lax.cond(is_its, partial(run_chunk, action, plan), _keep, state, turn)
    return state


def run_chunk(action: Action, plan: LoopPlan, state: LoopState, turn: Turns) -> LoopState:
    """Run an action; on GPUs with a `cond` for each of several chunks.

    At a constant chunk a product of cuBLASLt reads a layer's weights in place, and adds to a gradient in place.
    """
    state = replace(state, mark=next_mark(state.mark))
    chunks = range(plan.model.num_chunks)
    if len(chunks) == 1 or not is_nvidia():
        return action(plan, state, turn)
    for chunk in chunks:
        own = replace(turn, compute=replace(turn.compute, chunk=chunk))
        is_its = turn.compute.chunk == chunk
        state = jax.lax.cond(is_its, lambda state, own=own: action(plan, state, own), lambda state: state, state)
    return state


def gather_weights(plan: LoopPlan, state: LoopState, turn: Turns) -> LoopState:
    """Return the state with the whole weights of the turn's chunk in their slot, where the table has it gathered now.

    The ranks of a pipeline gather in turns of their own: all devices of a gather are of the same rank.
    """
    if turn.weights is None:
        return state
    slot = turn.weights.gather

    @jax.named_scope("gather_chunk")
    def gather(both: tuple[Any, Mark]) -> tuple[Any, Mark]:
        weights, mark = both
        return write(weights, plan.model.gather_chunk(turn.compute.chunk), slot), next_mark(mark)

    both = state.weights, state.mark
    weights, mark = jax.lax.cond(after(state.mark, slot != NONE), gather, lambda both: both, both)
    return replace(state, weights=weights, mark=mark)


def _end_actions(state: LoopState) -> LoopState:
    """Return the state, of which nothing is sent on GPUs before every action of the turn has ended.

    In a turn ranks run different actions side by side. The message of a forward waits for no other action, so XLA for
    GPUs puts its permute before the conditionals of the others: ranks that have no forward would wait for those with
    one, and a turn of a split backward would take as long as all three kinds.
    """
    if not is_nvidia() or state.grads is None:
        return state
    # The smallest sum of gradients stands for the action that writes them. Frozen stages have none.
    sums, structure = jax.tree.flatten(state.grads.stages)
    if not sums:
        return state
    place = min(range(len(sums)), key=lambda number: sums[number].size)
    (activations, gradients), sums[place] = hold((state.activations, state.gradients), until=sums[place])
    grads = replace(state.grads, stages=jax.tree.unflatten(structure, sums))
    return replace(state, activations=activations, gradients=gradients, grads=grads)


# The named scopes tell in profiles and in the compiled program which action an instruction belongs to.


@jax.named_scope("forward")
def forward(plan: LoopPlan, state: LoopState, turn: Turns) -> LoopState:
    """Run the forward of a turn."""
    given = plan.model.microbatches.read(turn.compute.microbatch)
    x = plan.enter.enter(state, turn, given)
    y, state = forward_layers(plan.stack(turn, state), plan.vjps, x, state, given, slot=turn.compute.residuals)
    return plan.leave.leave(state, y, turn, given)


@jax.named_scope("forward")
def _forward_only(plan: LoopPlan, state: LoopState, turn: Turns) -> LoopState:
    given = plan.model.microbatches.read(turn.compute.microbatch)
    x = plan.enter.enter(state, turn, given)
    y, sums = run_layers(plan.stack(turn, state), plan.model.functions.layers, x, state.sums, given)
    return plan.leave.leave(replace(state, sums=sums), y, turn, given)


@jax.named_scope("backward")
def backward(plan: LoopPlan, state: LoopState, turn: Turns) -> LoopState:
    """Run the backward of a turn, of the gradient in its slot."""
    given = plan.model.microbatches.read(turn.compute.microbatch)
    dy = read(state.gradients, turn.gradients.read)
    dx, state = backward_layers(plan.stack(turn, state), plan.vjps, dy, state, given, slot=turn.compute.residuals)
    return plan.enter.leave_back(state, dx, turn, given)


@jax.named_scope("input_grad")
def _input_grad(plan: LoopPlan, state: LoopState, turn: Turns) -> LoopState:
    given = plan.model.microbatches.read(turn.compute.microbatch)
    dy = read(state.gradients, turn.gradients.read)
    dx, state = input_grad_layers(plan.stack(turn, state), plan.halves, dy, state, given, slot=turn.compute.residuals)
    return plan.enter.leave_back(state, dx, turn, given)


@jax.named_scope("weight_grad")
def _weight_grad(plan: LoopPlan, state: LoopState, turn: Turns) -> LoopState:
    given = plan.model.microbatches.read(turn.compute.microbatch)
    return weight_grad_layers(plan.stack(turn, state), plan.halves, state, given, slot=turn.compute.residuals)


def _keep(state: LoopState, _turn: Turns) -> LoopState:
    return state


def send(plan: LoopPlan, buffers: Any, transfer: Transfer, links: list[Link]) -> Any:
    """Return what arrives [b, ...] over links, of the slots that a turn sends of buffers [slots, b, ...]."""

    def one(value: jax.Array) -> jax.Array:
        if plan.bubbles == "nan":
            value = jnp.where(transfer.send == NONE, plan.fill(type_like(value)), value)
        return jax.lax.ppermute(value, plan.model.pipe, links)

    return jax.tree.map(one, read(buffers, jnp.maximum(transfer.send, 0)))


@jax.named_scope("exchange")
def exchange(plan: LoopPlan, buffers: Any, transfer: Transfer, links: list[Link], *, mark: Mark) -> tuple[Any, Mark]:
    """Return the buffers [slots, b, ...] after a permute over links, in turns where any rank sends over them."""

    # The permute stands in a branch that all ranks take alike: `is_active` is the same on all of them.
    def run(both: tuple[Any, Mark]) -> tuple[Any, Mark]:
        slots, mark = both
        return put(slots, send(plan, slots, transfer, links), transfer.receive), next_mark(mark)

    return jax.lax.cond(after(mark, transfer.is_active == 1), run, lambda both: both, (buffers, mark))
