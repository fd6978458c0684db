"""The executor: one loop over turns runs any schedule, inside one jitted program.

Manual over `pipe` and `data`, automatic over `tensor`. In each turn a rank looks up its row of the tables and runs a
forward, a backward or half of one, or nothing; at the end of a tick activations move one rank on and gradients one rank
back. What a rank skips costs nothing, since `lax.cond` really branches. Residuals wait in ring buffers with as many
slots as microbatches are in flight, written and read layer by layer in place. Gradients are summed over `data` once,
after the loop. `lower.py` makes the tables; `sequential.py` is the path of a single rank.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from .lower import BACKWARD, FORWARD, INPUT_GRAD, NONE, WEIGHT_GRAD, Tables
from .residuals import LayerVjp
from .split_backward import SplitBackward
from .stage import PipelineParams, StageFns

Bubbles = Literal["zeros", "nan"]
"""What fills buffers before use and what idle ranks send; "nan" proves that none of it reaches a result."""

Wants = Literal["loss", "grads"]
Carry = dict[str, Any]
Row = dict[str, jax.Array]


def run_turns(
    fns: StageFns, params: PipelineParams, batch: Any, *, tables: Tables, bubbles: Bubbles, wants: Wants
) -> tuple[jax.Array, PipelineParams | None]:
    """Return this device's share of the loss and its gradients; for use inside `shard_map` over pipe and data.

    params.stages[C, k, ...] of this rank, params.shared whole; batch leaves [M, b, ...] -> loss[] {U:(pipe, data)},
    gradients {U:data} for stages and {U:(pipe, data)} for shared. Per tick: one neighbour permute of an activation
    and one of a gradient, in ticks where somebody sends.
    """
    machine = _Machine(fns, params, batch, bubbles)
    carry = machine.start(tables, wants)
    columns = {name: jnp.asarray(column) for name, column in tables.columns.items()}
    carry, _ = jax.lax.scan(partial(machine.turn, wants), carry, columns)
    return carry["loss"], carry.get("grads")


class _Machine:
    """One rank's view of the loop. The carry is a dict of buffers; a row is this rank's entry of every column."""

    def __init__(self, fns: StageFns, params: PipelineParams, batch: Any, bubbles: Bubbles) -> None:
        self.fns, self.params, self.batch, self.bubbles = fns, params, batch, bubbles
        self.vjp = LayerVjp(fns.layer)
        self.has_halves = False
        self.num_chunks, self.num_layers = jax.tree.leaves(params.stages)[0].shape[:2]

    def start(self, tables: Tables, wants: Wants) -> Carry:
        """The carry before the first turn: empty buffers, zero sums."""
        self.has_halves = bool((tables.columns["kind"] == INPUT_GRAD).any())
        microbatch = _read(self.batch, 0)
        x = vary(self.fns.first(self.params.shared, microbatch))
        carry: Carry = {"loss": _zero(), "activations": self._empty(x, tables.num_activation_slots)}
        if wants == "grads":
            layer = _read(self.params.stages, 0, 0)
            kept = self.vjp.plan(layer, x, microbatch)
            carry["gradients"] = self._empty(x, tables.num_gradient_slots)
            if self.has_halves:
                examples = [self._empty(leaf) for leaf in kept]
                self.halves = SplitBackward(self.vjp, layer, examples, microbatch, x)
                kept = [*kept, *self.halves.extra]
            carry["saved"] = [self._empty(leaf, tables.num_save_slots, self.num_layers) for leaf in kept]
            carry["grads"] = jax.tree.map(lambda p: vary(jnp.zeros(p.shape, jnp.float32)), self.params)
        return carry

    def turn(self, wants: Wants, carry: Carry, columns: Row) -> tuple[Carry, None]:
        """Run this rank's action, then pass on what waits to be sent."""
        rank = jax.lax.axis_index("pipe")
        row = {name: column[rank] for name, column in columns.items() if column.ndim}
        # One branch for each kind, not one switch over them: a buffer that a branch only reads is then no output of it,
        # and XLA updates it in place; through a switch it is copied in every turn.
        forward = self._forward if wants == "grads" else self._forward_only
        carry = jax.lax.cond(row["kind"] == FORWARD, forward, _keep, carry, row)
        if wants == "grads" and self.has_halves:
            carry = jax.lax.cond(row["kind"] == INPUT_GRAD, self._input_grad, _keep, carry, row)
            carry = jax.lax.cond(row["kind"] == WEIGHT_GRAD, self._weight_grad, _keep, carry, row)
        elif wants == "grads":
            carry = jax.lax.cond(row["kind"] == BACKWARD, self._backward, _keep, carry, row)
        carry = self._pass(carry, "activations", row["send"], row["arrive"], columns["passes_on"], step=1)
        if wants == "grads":
            slots = row["send_grad"], row["arrive_grad"]
            carry = self._pass(carry, "gradients", *slots, columns["passes_back"], step=-1)
        return carry, None

    def _forward(self, carry: Carry, row: Row) -> Carry:
        microbatch = _read(self.batch, row["microbatch"])

        def layer(index: jax.Array, state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            x, saved = state
            y, residuals = self.vjp.forward(self._layer_params(row, index), x, microbatch)
            place = (row["save"], index)
            written = [_write(b, vary(r), *place) for b, r in zip(saved[: len(residuals)], residuals, strict=True)]
            return vary(y), [*written, *saved[len(residuals) :]]

        start = (self._input(carry, row, microbatch), carry["saved"])
        y, saved = jax.lax.fori_loop(0, self.num_layers, layer, start)
        carry = self._leave(carry | {"saved": saved}, "activations", y, row["target"])
        finish = partial(self._finish, y, microbatch, row)
        return jax.lax.cond(row["loss_grad"] == NONE, lambda carry: carry, finish, carry)

    def _forward_only(self, carry: Carry, row: Row) -> Carry:
        microbatch = _read(self.batch, row["microbatch"])

        def layer(index: jax.Array, x: jax.Array) -> jax.Array:
            return vary(self.fns.layer(self._layer_params(row, index), x, microbatch))

        y = jax.lax.fori_loop(0, self.num_layers, layer, self._input(carry, row, microbatch))
        loss = jax.lax.cond(
            row["target"] == NONE, lambda: vary(self.fns.last(self.params.shared, y, microbatch)), _zero
        )
        return self._leave(carry | {"loss": carry["loss"] + loss}, "activations", y, row["target"])

    def _finish(self, y: jax.Array, microbatch: Any, row: Row, carry: Carry) -> Carry:
        """Loss of the last stage and its gradient at once, so that logits never wait in a buffer."""
        loss, (d_shared, dy) = jax.value_and_grad(self.fns.last, argnums=(0, 1))(self.params.shared, y, microbatch)
        shared = jax.tree.map(_accumulate, carry["grads"].shared, d_shared)
        return carry | {
            "loss": carry["loss"] + loss,
            "gradients": _write(carry["gradients"], vary(dy), row["loss_grad"]),
            "grads": PipelineParams(stages=carry["grads"].stages, shared=shared),
        }

    def _backward(self, carry: Carry, row: Row) -> Carry:
        microbatch = _read(self.batch, row["microbatch"])

        def layer(turn: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            grad, sums = state
            index = self.num_layers - 1 - turn
            residuals = [_read(buffer, row["save"], index) for buffer in carry["saved"]]
            d_params, dx = self.vjp.backward(self._layer_params(row, index), residuals, microbatch, grad)
            add = partial(_accumulate, place=(row["chunk"], index))
            return vary(dx), jax.tree.map(add, sums, d_params)

        grad = _read(carry["gradients"], row["source"])
        dx, stages = jax.lax.fori_loop(0, self.num_layers, layer, (grad, carry["grads"].stages))
        carry = carry | {"grads": PipelineParams(stages=stages, shared=carry["grads"].shared)}
        return self._pass_back(carry, dx, microbatch, row)

    def _input_grad(self, carry: Carry, row: Row) -> Carry:
        microbatch = _read(self.batch, row["microbatch"])

        def layer(turn: jax.Array, state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            grad, buffers = state
            place = (row["save"], self.num_layers - 1 - turn)
            saved = [_read(buffer, *place) for buffer in buffers[: self.halves.num_saved]]
            dx, kept = self.halves.input_grad(self._layer_params(row, place[1]), saved, microbatch, grad)
            old = [*saved, *[None] * len(self.halves.extra)]
            buffers = [
                buffer if new is before else _write(buffer, vary(new), *place)
                for buffer, new, before in zip(buffers, kept, old, strict=True)
            ]
            return vary(dx), buffers

        grad = _read(carry["gradients"], row["source"])
        dx, saved = jax.lax.fori_loop(0, self.num_layers, layer, (grad, carry["saved"]))
        return self._pass_back(carry | {"saved": saved}, dx, microbatch, row)

    def _weight_grad(self, carry: Carry, row: Row) -> Carry:
        microbatch = _read(self.batch, row["microbatch"])

        def layer(index: jax.Array, sums: Any) -> Any:
            kept = [_read(buffer, row["save"], index) for buffer in carry["saved"]]
            grads = self.halves.weight_grad(self._layer_params(row, index), kept, microbatch)
            return jax.tree.map(partial(_accumulate, place=(row["chunk"], index)), sums, grads)

        stages = jax.lax.fori_loop(0, self.num_layers, layer, carry["grads"].stages)
        return carry | {"grads": PipelineParams(stages=stages, shared=carry["grads"].shared)}

    def _pass_back(self, carry: Carry, dx: jax.Array, microbatch: Any, row: Row) -> Carry:
        """Leave a gradient for the rank before, or on the first stage take it through `first`."""
        first = partial(self._first_backward, dx, microbatch)
        shared = jax.lax.cond(row["target"] == NONE, first, lambda sums: sums, carry["grads"].shared)
        carry = carry | {"grads": PipelineParams(stages=carry["grads"].stages, shared=shared)}
        return self._leave(carry, "gradients", dx, row["target"])

    def _first_backward(self, dx: jax.Array, microbatch: Any, sums: Any) -> Any:
        _, vjp = jax.vjp(lambda shared: vary(self.fns.first(shared, microbatch)), self.params.shared)
        return jax.tree.map(_accumulate, sums, vjp(dx)[0])

    def _input(self, carry: Carry, row: Row, microbatch: Any) -> jax.Array:
        """What enters this stage: the microbatch itself on the first, else what arrived."""
        return jax.lax.cond(
            row["source"] == NONE,
            lambda: vary(self.fns.first(self.params.shared, microbatch)),
            lambda: _read(carry["activations"], row["source"]),
        )

    def _layer_params(self, row: Row, index: jax.Array) -> Any:
        return _read(self.params.stages, row["chunk"], index)

    def _leave(self, carry: Carry, buffer: str, value: jax.Array, slot: jax.Array) -> Carry:
        """Put a result where it waits for the end of the tick, unless nobody wants it."""
        left = jax.lax.cond(slot == NONE, lambda b: b, lambda b: _write(b, value, slot), carry[buffer])
        return carry | {buffer: left}

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
            value = _read(slots, jnp.maximum(send, 0))
            if self.bubbles == "nan":
                value = jnp.where(send == NONE, self._fill(value.shape, value.dtype), value)
            arrived = jax.lax.ppermute(value, "pipe", links)
            return jax.lax.cond(arrive == NONE, lambda b: b, lambda b: _write(b, arrived, arrive), slots)

        return carry | {buffer: jax.lax.cond(is_sent == 1, exchange, lambda slots: slots, carry[buffer])}

    def _empty(self, leaf: Any, *slots: int) -> jax.Array:
        return self._fill((*slots, *leaf.shape), leaf.dtype)

    def _fill(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        is_poison = self.bubbles == "nan" and jnp.issubdtype(dtype, jnp.floating)
        return vary(jnp.full(shape, jnp.nan if is_poison else 0, dtype))


def vary(x: jax.Array) -> jax.Array:
    """Return x marked as differing over every manual axis of size > 1, as all that the loop carries is."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = [axis for axis, kind in kinds if kind == AxisType.Manual and mesh.shape[axis] > 1]
    missing = tuple(axis for axis in manual if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _keep(carry: Carry, _: Row) -> Carry:
    return carry


def _zero() -> jax.Array:
    return vary(jnp.zeros((), jnp.float32))


def _read(tree: Any, *place: jax.Array | int) -> Any:
    """Return every leaf at the given position of its leading dimensions."""

    def read(leaf: jax.Array) -> jax.Array:
        starts = (*place, *[0] * (leaf.ndim - len(place)))
        inner = leaf.shape[len(place) :]
        return jax.lax.dynamic_slice(leaf, starts, (*[1] * len(place), *inner)).reshape(inner)

    return jax.tree.map(read, tree)


def _write(buffer: jax.Array, value: jax.Array, *place: jax.Array) -> jax.Array:
    starts = (*place, *[0] * value.ndim)
    return jax.lax.dynamic_update_slice(buffer, value.reshape(*[1] * len(place), *value.shape), starts)


def _accumulate(sums: jax.Array, grad: jax.Array, place: tuple[jax.Array, ...] = ()) -> jax.Array:
    return _write(sums, _read(sums, *place) + grad.astype(sums.dtype), *place)
