"""The layers of one stage, run in order forward and in reverse order backward, with residuals in buffers.

    forward        x -> layer 0 -> layer 1 -> ... -> y        each writes its residuals at [slot, layer]
    backward      dx <- layer 0 <- layer 1 <- ... <- dy       each reads them there, and adds dw to its sum
    input_grad    dx <- layer 0 <- layer 1 <- ... <- dy       each reads them, and writes there what dw needs
    weight_grad         layer 0,   layer 1,   ...             each reads that, and adds dw to its sum

Buffers are updated in place, layer by layer. `jax.grad` of a scan over layers would make all residuals of a stage anew
for every microbatch, and a second copy of all gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from ..model.stage import Unroll
from .backward.residuals import LayerVjp
from .backward.split_backward import SplitBackward
from .buffers import add, read, vary_like, write

Index = jax.Array | int


@dataclass(frozen=True, kw_only=True)
class LayerStack:
    """The layers of one stage on this rank: the first `count` of chunk `chunk` of `stages` [C, k, ...]."""

    stages: Any
    chunk: Index
    count: Index
    unroll: Unroll = "off"

    def params(self, index: Index) -> Any:
        """Return the (prepared) parameters of one layer."""
        return read(self.stages, self.chunk, index)

    def loop(self, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
        """Return the state after body(0, state) to body(count - 1, state)."""
        # A count that differs between ranks is a traced number: such a loop cannot be written out.
        is_written_out = self.unroll == "on" and isinstance(self.count, int)
        return jax.lax.fori_loop(0, self.count, body, state, unroll=is_written_out or None)


def run_layers(
    stack: LayerStack, layer: Callable[[Any, jax.Array, Any], jax.Array], x: jax.Array, microbatch: Any
) -> jax.Array:
    """Return the output of all layers, x[b, ...] -> y[b, ...], and keep nothing."""

    def body(index: jax.Array, x: jax.Array) -> jax.Array:
        return layer(stack.params(index), x, microbatch)

    return stack.loop(body, x)


def forward_layers(
    stack: LayerStack, vjp: LayerVjp, x: jax.Array, buffers: list[jax.Array], microbatch: Any, *, slot: Index
) -> tuple[jax.Array, list[jax.Array]]:
    """Return the output of all layers, and the buffers [slots, layers, ...] with their residuals at the slot."""

    def body(index: jax.Array, state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        x, buffers = state
        y, residuals = vjp.forward(stack.params(index), x, microbatch)
        # With a split backward there are more buffers, which only the input gradient writes.
        kept = zip(buffers, residuals, strict=False)
        written = [write(buffer, leaf, slot, index) for buffer, leaf in kept]
        return y, [*written, *buffers[len(residuals) :]]

    return stack.loop(body, (x, buffers))


def backward_layers(
    stack: LayerStack,
    vjp: LayerVjp,
    dy: jax.Array,
    buffers: list[jax.Array],
    microbatch: Any,
    *,
    slot: Index,
    sums: Any,
) -> tuple[jax.Array, Any]:
    """Return dx[b, ...], and the sums [C, k, ...] with the gradients of all layers added.

    dy[b, ...], buffers [slots, layers, ...] -> dx[b, ...], sums in float32; no communication of its own.
    """

    def body(turn: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        dy, sums = state
        index = stack.count - 1 - turn
        residuals = [read(buffer, slot, index) for buffer in buffers]
        d_params, dx = vjp.backward(stack.params(index), residuals, microbatch, dy)
        return vary_like(dx, dy), add(sums, d_params, (stack.chunk, index))

    return stack.loop(body, (dy, sums))


def input_grad_layers(
    stack: LayerStack, halves: SplitBackward, dy: jax.Array, buffers: list[jax.Array], microbatch: Any, *, slot: Index
) -> tuple[jax.Array, list[jax.Array]]:
    """Return dx[b, ...], and the buffers with what the weight gradients need in place of the residuals."""

    def body(turn: jax.Array, state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        dy, buffers = state
        index = stack.count - 1 - turn
        saved = [read(buffer, slot, index) for buffer in buffers[: halves.num_saved]]
        dx, kept = halves.input_grad(stack.params(index), saved, microbatch, dy)
        old = [*saved, *[None] * len(halves.extra)]
        # Only what changed is written: a write of the same value would cost a copy of the entry.
        buffers = [
            buffer if new is before else write(buffer, new, slot, index)
            for buffer, new, before in zip(buffers, kept, old, strict=True)
        ]
        return vary_like(dx, dy), buffers

    return stack.loop(body, (dy, buffers))


def weight_grad_layers(
    stack: LayerStack, halves: SplitBackward, buffers: list[jax.Array], microbatch: Any, *, slot: Index, sums: Any
) -> Any:
    """Return the sums [C, k, ...] with the gradients of all layers added, from what `input_grad_layers` left."""

    def body(index: jax.Array, sums: Any) -> Any:
        kept = [read(buffer, slot, index) for buffer in buffers]
        grads = halves.weight_grad(stack.params(index), kept, microbatch)
        return add(sums, grads, (stack.chunk, index))

    return stack.loop(body, sums)
