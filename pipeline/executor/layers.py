"""The layers of one stage, run in order forward and in reverse order backward, with residuals in buffers.

    forward        x -> layer 0 -> layer 1 -> ... -> y        each writes its residuals at [slot, layer]
    backward      dx <- layer 0 <- layer 1 <- ... <- dy       each reads them there, and adds dw to its sum
    input_grad    dx <- layer 0 <- layer 1 <- ... <- dy       each reads them, and writes there what dw needs
    weight_grad         layer 0,   layer 1,   ...             each reads that, and adds dw to its sum

Buffers are updated in place, layer by layer. `jax.grad` of a scan over layers would make all residuals of a stage anew
for every microbatch, and a second copy of all gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..model.protocol import Given, Output
from ..model.stage import Unroll
from .backward.residuals import LayerVjp
from .backward.split_backward import SplitBackward
from .buffers import read, vary_like, write
from .loop_state import Grads, LoopState, Place, Sums

Index = jax.Array | int


@dataclass(frozen=True, kw_only=True)
class LayerStack:
    """The layers of one stage on this rank: the first `count` of chunk `chunk` of `stages` [C, k, ...].

    stage: position of the stage in the model.
    first_layer: position of its first layer in the model.
    state: what layers are given as `info.state`, leaves [C, k, ...].
    """

    stages: Any
    chunk: Index
    count: Index
    stage: Index
    first_layer: Index
    state: Any = None
    unroll: Unroll = "off"

    def params(self, index: Index) -> Any:
        """Return the (prepared) parameters of one layer."""
        return read(self.stages, self.chunk, index)

    def place(self, index: Index) -> Place:
        """Return the place of one layer in arrays [C, k, ...]."""
        return self.chunk, index

    def given(self, given: Given, index: Index) -> Given:
        """Return what one layer is given: a microbatch, with the layer's info if any function asks for it."""
        if given.info is None:
            return given
        # Marked alike on every path, since a layer is traced once for all.
        like = given.info.microbatch
        position, stage = (vary_like(jnp.asarray(n, jnp.int32), like) for n in (self.first_layer + index, self.stage))
        return replace(
            given, info=replace(given.info, index=position, stage=stage, state=read(self.state, self.chunk, index))
        )

    def loop(self, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
        """Return the state after body(0, state) to body(count - 1, state)."""
        # A count that differs between ranks is a traced number: such a loop cannot be written out.
        is_written_out = self.unroll == "on" and isinstance(self.count, int)
        return jax.lax.fori_loop(0, self.count, body, state, unroll=is_written_out or None)


def run_layers(
    stack: LayerStack, layer: Callable[[Any, Any, Given], Output], x: Any, sums: Sums, given: Given
) -> tuple[Any, Sums]:
    """Return the output of all layers, x[b, ...] -> y[b, ...], and the sums with theirs; keep nothing."""

    def body(index: jax.Array, state: tuple[Any, Sums]) -> tuple[Any, Sums]:
        x, sums = state
        out = layer(stack.params(index), x, stack.given(given, index))
        return out.x, sums.add(out, stack.place(index))

    return stack.loop(body, (x, sums))


def forward_layers(
    stack: LayerStack, vjp: LayerVjp, x: Any, state: LoopState, given: Given, *, slot: Index
) -> tuple[Any, LoopState]:
    """Return the output of all layers, and the state with their residuals [slots, layers, ...] at the slot."""

    def body(index: jax.Array, carry: tuple[Any, Sums, list[jax.Array]]) -> tuple[Any, Sums, list[jax.Array]]:
        x, sums, buffers = carry
        out, residuals = vjp.forward(stack.params(index), x, stack.given(given, index))
        # With a split backward there are more buffers, which only the input gradient writes.
        kept = zip(buffers, residuals, strict=False)
        written = [write(buffer, leaf, slot, index) for buffer, leaf in kept]
        return out.x, sums.add(out, stack.place(index)), [*written, *buffers[len(residuals) :]]

    x, sums, residuals = stack.loop(body, (x, state.sums, state.residuals))
    return x, replace(state, sums=sums, residuals=residuals)


def backward_layers(
    stack: LayerStack, vjp: LayerVjp, dy: list[jax.Array], state: LoopState, given: Given, *, slot: Index
) -> tuple[list[jax.Array], LoopState]:
    """Return dx, and the state with the gradients of all layers added, in float32; no communication of its own.

    dy and dx are lists of the floating-point leaves of what layers pass on.
    """

    def body(turn: jax.Array, carry: tuple[list[jax.Array], Grads]) -> tuple[list[jax.Array], Grads]:
        dy, sums = carry
        index = stack.count - 1 - turn
        residuals = [read(buffer, slot, index) for buffer in state.residuals]
        own = stack.given(given, index)
        grads, dx = vjp.backward(stack.params(index), residuals, own, dy)
        return vary_like(dx, dy), sums.add_layer(grads, stack.place(index), given.number)

    dx, grads = stack.loop(body, (dy, state.grads))
    return dx, replace(state, grads=grads)


def input_grad_layers(
    stack: LayerStack, halves: SplitBackward, dy: list[jax.Array], state: LoopState, given: Given, *, slot: Index
) -> tuple[list[jax.Array], LoopState]:
    """Return dx, and the state with what the weight gradients need in place of the residuals."""

    def body(turn: jax.Array, carry: tuple[list[jax.Array], list[jax.Array]]) -> tuple[Any, list[jax.Array]]:
        dy, buffers = carry
        index = stack.count - 1 - turn
        saved = [read(buffer, slot, index) for buffer in buffers[: halves.num_saved]]
        dx, kept = halves.input_grad(stack.params(index), saved, stack.given(given, index), dy)
        old = [*saved, *[None] * len(halves.extra)]
        # Only what changed is written: a write of the same value would cost a copy of the entry.
        buffers = [
            buffer if new is before else write(buffer, new, slot, index)
            for buffer, new, before in zip(buffers, kept, old, strict=True)
        ]
        return vary_like(dx, dy), buffers

    dx, residuals = stack.loop(body, (dy, state.residuals))
    return dx, replace(state, residuals=residuals)


def weight_grad_layers(
    stack: LayerStack, halves: SplitBackward, state: LoopState, given: Given, *, slot: Index
) -> LoopState:
    """Return the state with the gradients of all layers added, from what `input_grad_layers` left."""

    def body(index: jax.Array, sums: Grads) -> Grads:
        kept = [read(buffer, slot, index) for buffer in state.residuals]
        grads = halves.weight_grad(stack.params(index), kept, stack.given(given, index))
        return sums.add_layer(grads, stack.place(index), given.number)

    return replace(state, grads=stack.loop(body, state.grads))
