"""The executor: one loop over turns runs any schedule, inside one jitted program.

Manual over `pipe` and `data`, automatic over `tensor`. In each turn a rank looks up its row of the tables and runs a
forward, a backward or half of one, or nothing; at the end of a tick activations move one rank on and gradients one rank
back. What a rank skips costs nothing, since `lax.cond` really branches. Residuals wait in ring buffers with as many
slots as microbatches are in flight, written and read layer by layer in place. Gradients are summed over `data` once,
after the loop. `lower.py` makes the tables, `ends.py` runs what comes before the first layer and after the last, and
`sequential.py` is the path of a single rank.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..model.stage import PipelineParams, StageFns
from .buffers import Carry, Row, add, fill_whole, read, room_for, vary, write, zeros_for
from .ends import AloneEnds, TogetherEnds, Wants
from .lower import BACKWARD, FORWARD, INPUT_GRAD, NONE, WEIGHT_GRAD, Tables
from .prepare import prepare_layers
from .residuals import Layers, LayerVjp
from .split_backward import SplitBackward

Bubbles = Literal["zeros", "nan"]
"""What fills buffers before use and what idle ranks send; "nan" proves that none of it reaches a result."""


def run_turns(
    fns: StageFns, params: PipelineParams, batch: Any, *, tables: Tables, bubbles: Bubbles, wants: Wants
) -> tuple[jax.Array, PipelineParams | None]:
    """Return this device's share of the loss and its gradients; for use inside `shard_map` over pipe and data.

    params.stages[C, k, ...] of this rank, params.shared whole or this rank's part; batch leaves [M, b, ...] -> loss[]
    {U:(pipe, data)}, gradients {U:data} for stages, {U:data} for a shared part and {U:(pipe, data)} for shared wholes.
    Per tick: one neighbour permute of an activation and one of a gradient, in ticks where somebody sends.
    """
    machine = _Machine(fns, params, batch, bubbles, wants)
    carry = machine.start(tables)
    columns = {name: jnp.asarray(column) for name, column in tables.columns.items()}
    carry, _ = jax.lax.scan(machine.turn, carry, columns)
    if wants == "loss":
        return carry["loss"], None
    sums = PipelineParams(stages=carry["stage_grads"], shared=carry["shared_grads"])
    return carry["loss"], fill_whole(sums, params)


class _Machine:
    """One rank's view of the loop. The carry is a dict of buffers; a row is this rank's entry of every column.

    Named scopes say in profiles and in the compiled program which action an instruction belongs to.
    """

    def __init__(self, fns: StageFns, params: PipelineParams, batch: Any, bubbles: Bubbles, wants: Wants) -> None:
        self.fns, self.bubbles, self.wants = fns, bubbles, wants
        self.own, self.batch = jax.tree.map(vary, (params.stages, batch))
        self.stages = prepare_layers(fns, self.own)
        self.ends = (AloneEnds if fns.shared_specs is None else TogetherEnds)(fns, params, batch, wants)
        self.vjp = LayerVjp(fns.layer, prepare=fns.prepare, own=read(self.own, 0, 0))
        self.has_halves = False
        self.num_chunks, self.num_layers = jax.tree.leaves(params.stages)[0].shape[:2]

    def start(self, tables: Tables) -> Carry:
        """The carry before the first turn: empty buffers, zero sums."""
        self.has_halves = bool((tables.columns["kind"] == INPUT_GRAD).any())
        x = self._empty(jax.eval_shape(lambda: self.fns.first(self.ends.shared, read(self.ends.batch, 0))))
        carry: Carry = {
            "loss": vary(jnp.zeros((), jnp.float32)),
            "activations": self._empty(x, tables.num_activation_slots),
        }
        if self.wants == "loss":
            return carry
        layer, microbatch = read(self.stages, 0, 0), read(self.batch, 0)
        kept = self.vjp.plan(layer, x, microbatch)
        if self.has_halves:
            examples = [room_for(leaf) for leaf in kept]
            self.halves = SplitBackward(self.vjp, layer, examples, microbatch, x)
            kept = [*kept, *self.halves.extra]
        return carry | {
            "gradients": self._empty(x, tables.num_gradient_slots),
            "saved": [self._room(leaf, tables.num_save_slots, self.num_layers) for leaf in kept],
            "stage_grads": jax.tree.map(zeros_for, self.own),
            "shared_grads": jax.tree.map(zeros_for, self.ends.shared),
        }

    def turn(self, carry: Carry, columns: Row) -> tuple[Carry, None]:
        """Run this rank's action, then pass on what waits to be sent."""
        rank = jax.lax.axis_index("pipe")
        row = {name: column[rank] for name, column in columns.items() if column.ndim}
        carry = self.ends.before(carry, row, columns)
        # One branch for each kind, not one switch over them: a buffer that a branch only reads is then no output of it,
        # and XLA updates it in place; through a switch it is copied in every turn.
        forward = self._forward if self.wants == "grads" else self._forward_only
        carry = jax.lax.cond(row["kind"] == FORWARD, forward, _keep, carry, row)
        if self.wants == "grads" and self.has_halves:
            carry = jax.lax.cond(row["kind"] == INPUT_GRAD, self._input_grad, _keep, carry, row)
            carry = jax.lax.cond(row["kind"] == WEIGHT_GRAD, self._weight_grad, _keep, carry, row)
        elif self.wants == "grads":
            carry = jax.lax.cond(row["kind"] == BACKWARD, self._backward, _keep, carry, row)
        carry = self.ends.after(carry, row, columns)
        carry = self._pass(carry, "activations", row["send"], row["arrive"], columns["passes_on"], step=1)
        if self.wants == "grads":
            slots = row["send_grad"], row["arrive_grad"]
            carry = self._pass(carry, "gradients", *slots, columns["passes_back"], step=-1)
        return carry, None

    @jax.named_scope("forward")
    def _forward(self, carry: Carry, row: Row) -> Carry:
        microbatch = read(self.batch, row["microbatch"])
        x = self.ends.enter(carry, row, microbatch)
        y, saved = self.vjp.forward_stack(self._layers(row), x, carry["saved"], microbatch, slot=(row["save"],))
        return self.ends.leave(carry | {"saved": saved}, y, row, microbatch)

    @jax.named_scope("forward")
    def _forward_only(self, carry: Carry, row: Row) -> Carry:
        microbatch = read(self.batch, row["microbatch"])

        def layer(index: jax.Array, x: jax.Array) -> jax.Array:
            return vary(self.fns.layer(self._layer_params(row, index), x, microbatch))

        y = self._layers(row).loop(layer, self.ends.enter(carry, row, microbatch))
        return self.ends.leave(carry, y, row, microbatch)

    @jax.named_scope("backward")
    def _backward(self, carry: Carry, row: Row) -> Carry:
        microbatch, grad = read(self.batch, row["microbatch"]), read(carry["gradients"], row["source"])
        dx, sums = self.vjp.backward_stack(
            self._layers(row), grad, carry["saved"], microbatch, carry["stage_grads"], slot=(row["save"],)
        )
        return self.ends.leave_back(carry | {"stage_grads": sums}, dx, row, microbatch)

    @jax.named_scope("input_grad")
    def _input_grad(self, carry: Carry, row: Row) -> Carry:
        microbatch, num_layers = read(self.batch, row["microbatch"]), self._num_own_layers(row)

        def layer(turn: jax.Array, state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            grad, buffers = state
            place = (row["save"], num_layers - 1 - turn)
            saved = [read(buffer, *place) for buffer in buffers[: self.halves.num_saved]]
            dx, kept = self.halves.input_grad(self._layer_params(row, place[1]), saved, microbatch, grad)
            old = [*saved, *[None] * len(self.halves.extra)]
            buffers = [
                buffer if new is before else write(buffer, new, *place)
                for buffer, new, before in zip(buffers, kept, old, strict=True)
            ]
            return vary(dx), buffers

        grad = read(carry["gradients"], row["source"])
        dx, saved = self._layers(row).loop(layer, (grad, carry["saved"]))
        return self.ends.leave_back(carry | {"saved": saved}, dx, row, microbatch)

    @jax.named_scope("weight_grad")
    def _weight_grad(self, carry: Carry, row: Row) -> Carry:
        microbatch = read(self.batch, row["microbatch"])

        def layer(index: jax.Array, sums: Any) -> Any:
            kept = [read(buffer, row["save"], index) for buffer in carry["saved"]]
            grads = self.halves.weight_grad(self._layer_params(row, index), kept, microbatch)
            return add(sums, grads, (row["chunk"], index))

        sums = self._layers(row).loop(layer, carry["stage_grads"])
        return carry | {"stage_grads": sums}

    def _num_own_layers(self, row: Row) -> jax.Array | int:
        """The number of layers of the stage at hand: a constant, unless stages differ."""
        counts = self.fns.layers_per_stage
        if counts is None or len(set(counts)) == 1:
            return self.num_layers
        return jnp.asarray(counts)[row["chunk"] * jax.lax.axis_size("pipe") + jax.lax.axis_index("pipe")]

    def _layers(self, row: Row) -> Layers:
        count, unroll = self._num_own_layers(row), self.fns.unroll
        return Layers(stages=self.stages, chunk=row["chunk"], count=count, unroll=unroll)

    def _layer_params(self, row: Row, index: jax.Array) -> Any:
        return read(self.stages, row["chunk"], index)

    @jax.named_scope("exchange")
    def _pass(
        self, carry: Carry, buffer: str, send: jax.Array, arrive: jax.Array, is_sent: jax.Array, *, step: int
    ) -> Carry:
        """Move what waits by `step` ranks, in turns where anybody sends."""
        num_ranks = jax.lax.axis_size("pipe")
        # A line unless there are chunks: the link from the last rank back to the first would carry nothing.
        is_ring = self.num_chunks > 1
        ends = [(rank, rank + step) for rank in range(num_ranks)]
        links = [(rank, end % num_ranks) for rank, end in ends if is_ring or 0 <= end < num_ranks]

        def exchange(slots: jax.Array) -> jax.Array:
            value = read(slots, jnp.maximum(send, 0))
            if self.bubbles == "nan":
                value = jnp.where(send == NONE, self._fill(value.shape, value.dtype), value)
            arrived = jax.lax.ppermute(value, "pipe", links)
            return jax.lax.cond(arrive == NONE, lambda b: b, lambda b: write(b, arrived, arrive), slots)

        return carry | {buffer: jax.lax.cond(is_sent == 1, exchange, lambda slots: slots, carry[buffer])}

    def _empty(self, leaf: Any, *slots: int) -> jax.Array:
        return self._fill((*slots, *leaf.shape), leaf.dtype)

    def _room(self, kept: jax.ShapeDtypeStruct, *slots: int) -> jax.Array:
        return room_for(kept, *slots, fill=self._filling(kept.dtype))

    def _fill(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return vary(jnp.full(shape, self._filling(dtype), dtype))

    def _filling(self, dtype: Any) -> float:
        return jnp.nan if self.bubbles == "nan" and jnp.issubdtype(dtype, jnp.floating) else 0


def _keep(carry: Carry, _: Row) -> Carry:
    return carry
