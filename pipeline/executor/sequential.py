"""The path of a single pipeline rank: plain gradient accumulation over microbatches, one at a time.

As in the executor, what a layer keeps for its backward goes into buffers that all microbatches share, and gradients are
added to their sums layer by layer. Autodiff of a scan over layers would make such buffers anew for every microbatch,
and a second copy of all gradients. Layers that are written out need no buffers: each keeps arrays of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..model.stage import PipelineParams, StageFns
from .buffers import add, fill_whole, read, room_for, vary, zeros_for
from .ends import Wants
from .prepare import prepare_layers
from .residuals import Layers, LayerVjp
from .traced_vjp import pull_back


def run_sequence(
    fns: StageFns, params: PipelineParams, batch: Any, *, wants: Wants
) -> tuple[jax.Array, PipelineParams | None]:
    """Return this device's share of the loss and its gradients; for use inside `shard_map` over data.

    params.stages[C, k, ...] whole, params.shared whole; batch leaves [M, b, ...] -> loss[]
    {U:data}, gradients {U:data}.
    """
    params, batch = jax.tree.map(vary, (params, batch))
    sequence, loss = _Sequence(fns, params), vary(jnp.zeros((), jnp.float32))
    if wants == "loss":
        return jax.lax.scan(sequence.add_loss, loss, batch)[0], None
    carry = (loss, jax.tree.map(zeros_for, params), sequence.buffers(read(batch, 0)))
    (loss, sums, _), _ = jax.lax.scan(sequence.add_grads, carry, batch)
    return loss, fill_whole(sums, params)


class _Sequence:
    """All layers of a model, chunk after chunk."""

    def __init__(self, fns: StageFns, params: PipelineParams) -> None:
        self.fns, self.shared = fns, params.shared
        self.vjp = LayerVjp(fns.layer, prepare=fns.prepare, own=read(params.stages, 0, 0))
        num_chunks, self.num_layers = jax.tree.leaves(params.stages)[0].shape[:2]
        counts = fns.layers_per_stage or (self.num_layers,) * num_chunks
        stages = prepare_layers(fns, params.stages)
        self.chunks = [Layers(stages=stages, chunk=i, count=count, unroll=fns.unroll) for i, count in enumerate(counts)]

    def add_loss(self, loss: jax.Array, microbatch: Any) -> tuple[jax.Array, None]:
        """Run one microbatch forward."""
        x = vary(self.fns.first(self.shared, microbatch))
        for chunk in self.chunks:

            def layer(index: jax.Array, x: jax.Array, chunk: Layers = chunk) -> jax.Array:
                return vary(self.fns.layer(chunk.own(index), x, microbatch))

            x = chunk.loop(layer, x)
        return loss + vary(self.fns.last(self.shared, x, microbatch)), None

    def buffers(self, microbatch: Any) -> list[jax.Array]:
        """Room for what all layers keep of one microbatch, [chunks, layers, ...]; none where they are written out."""
        x = jax.eval_shape(lambda: self.fns.first(self.shared, microbatch))
        kept = self.vjp.plan(self.chunks[0].own(jnp.int32(0)), vary(jnp.zeros(x.shape, x.dtype)), microbatch)
        if self.fns.unroll == "on":
            return []
        lead = len(self.chunks), self.num_layers
        return [room_for(leaf, *lead) for leaf in kept]

    def add_grads(self, carry: Any, microbatch: Any) -> tuple[Any, None]:
        """Run one microbatch forward and backward."""
        loss, sums, saved = carry
        x, saved = self._forward(vary(self.fns.first(self.shared, microbatch)), saved, microbatch)
        own_loss, (d_shared, dx) = jax.value_and_grad(self.fns.last, argnums=(0, 1), allow_int=True)(
            self.shared, x, microbatch
        )
        dx, stages, saved = self._backward(vary(dx), saved, microbatch, sums.stages)
        first_grads = pull_back(lambda *args: vary(self.fns.first(*args)), self.shared, microbatch, dx)
        shared = add(sums.shared, d_shared)
        shared = add(shared, first_grads)
        return (loss + vary(own_loss), PipelineParams(stages=stages, shared=shared), saved), None

    def _forward(self, x: jax.Array, buffers: list[jax.Array], microbatch: Any) -> tuple[jax.Array, list[Any]]:
        own: list[Any] = []
        for chunk in self.chunks:
            if self.fns.unroll == "off":
                x, buffers = self.vjp.forward_stack(chunk, x, buffers, microbatch, slot=(chunk.chunk,))
                continue
            for index in range(chunk.count):
                y, kept = self.vjp.forward(chunk.own(index), x, microbatch)
                x = vary(y)
                own.append(kept)
        return x, [*buffers, *own]

    def _backward(self, dx: jax.Array, saved: list[Any], microbatch: Any, sums: Any) -> tuple[jax.Array, Any, list]:
        for chunk in reversed(self.chunks):
            if self.fns.unroll == "off":
                dx, sums = self.vjp.backward_stack(chunk, dx, saved, microbatch, sums, slot=(chunk.chunk,))
                continue
            for index in reversed(range(chunk.count)):
                *saved, kept = saved
                grads, dx = self.vjp.backward(chunk.own(index), kept, microbatch, dx)
                dx, sums = vary(dx), add(sums, grads, (chunk.chunk, index))
        return dx, sums, saved
