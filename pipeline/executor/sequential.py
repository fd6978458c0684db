"""Run a pipeline of a single rank: gradient accumulation over microbatches, one at a time.

    for each microbatch:  first -> chunk 0 -> chunk 1 -> ... -> last
                          first <- chunk 0 <- chunk 1 <- ... <- dy

As in `execute.py`, residuals go into buffers that all microbatches share, and gradients are added to sums layer by
layer. Layers that are written out (`unroll="on"`) need no buffers: their residuals are separate arrays.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..model.stage import PipelineParams, StageFns
from .backward.residuals import LayerVjp, plan_layer
from .backward.traced_vjp import pull_back
from .buffers import add, empty_buffer, fill_integers, read, vary, vary_like, zeros_for
from .layers import LayerStack, backward_layers, forward_layers, run_layers
from .loop_state import Wants
from .prepare import prepare_layers


def run_sequence(
    fns: StageFns, params: PipelineParams, batch: Any, *, wants: Wants, axes: tuple[str, ...]
) -> tuple[jax.Array, PipelineParams | None]:
    """Return this device's share of the loss and its gradients; for use inside `shard_map`.

    params.stages[C, k, ...] whole, params.shared whole; batch leaves [M, b, ...] -> loss[]
    {U:data}, gradients {U:data}. `axes` are those of the batch that have more than one device.
    """
    params, batch = jax.tree.map(lambda leaf: vary(leaf, axes), (params, batch))
    model = _cut_chunks(fns, params)
    # Marked as varying before the scan: a carry must keep its type, and every result of a microbatch varies over data.
    loss = vary(jnp.zeros((), jnp.float32), axes)
    if wants == "loss":
        return jax.lax.scan(model.add_loss, loss, batch)[0], None
    # Any microbatch will do: only its types matter.
    microbatch = read(batch, 0)
    vjp = model.plan(params.stages, microbatch)
    state = _State(loss=loss, grads=jax.tree.map(zeros_for, params), residuals=model.empty_buffers(vjp))
    state, _ = jax.lax.scan(lambda state, microbatch: model.add_grads(vjp, state, microbatch), state, batch)
    return state.loss, fill_integers(state.grads, params)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _State:
    """The carry of the scan over microbatches: sums, and buffers [chunks, layers, ...] of residuals."""

    loss: jax.Array
    grads: PipelineParams
    residuals: list[jax.Array]


@dataclass(frozen=True, kw_only=True)
class _WholeModel:
    """All stages of a model, chunk after chunk, with `first` before and `last` after them."""

    fns: StageFns
    shared: Any
    chunks: list[LayerStack]
    num_layers: int

    def plan(self, stages: Any, microbatch: Any) -> LayerVjp:
        """Return the forward and backward of a layer, with residuals chosen."""
        x = jax.eval_shape(lambda: self.fns.first(self.shared, microbatch))
        return plan_layer(
            self.fns.layer,
            self.chunks[0].params(jnp.int32(0)),
            empty_buffer(x),
            microbatch,
            prepare=self.fns.prepare,
            unprepared=read(stages, 0, 0),
        )

    def empty_buffers(self, vjp: LayerVjp) -> list[jax.Array]:
        """Return buffers for the residuals of all layers and one microbatch; none where layers are written out."""
        if self.fns.unroll == "on":
            return []
        return [empty_buffer(leaf, len(self.chunks), self.num_layers) for leaf in vjp.kept]

    def add_loss(self, loss: jax.Array, microbatch: Any) -> tuple[jax.Array, None]:
        """Run one microbatch forward, and add its loss."""
        x = self.fns.first(self.shared, microbatch)
        for chunk in self.chunks:
            x = run_layers(chunk, self.fns.layer, x, microbatch)
        return loss + self.fns.last(self.shared, x, microbatch), None

    def add_grads(self, vjp: LayerVjp, state: _State, microbatch: Any) -> tuple[_State, None]:
        """Run one microbatch forward and backward, and add its loss and gradients."""
        x = self.fns.first(self.shared, microbatch)
        x, saved = self._forward(vjp, x, state.residuals, microbatch)
        loss, (d_shared, dx) = jax.value_and_grad(self.fns.last, argnums=(0, 1), allow_int=True)(
            self.shared, x, microbatch
        )
        dx, stages, residuals = self._backward(vjp, vary_like(dx, x), saved, microbatch, state.grads.stages)
        first_grads = pull_back(self.fns.first, self.shared, microbatch, dx)
        shared = add(add(state.grads.shared, d_shared), first_grads)
        grads = PipelineParams(stages=stages, shared=shared)
        return _State(loss=state.loss + loss, grads=grads, residuals=residuals), None

    def _forward(
        self, vjp: LayerVjp, x: jax.Array, buffers: list[jax.Array], microbatch: Any
    ) -> tuple[jax.Array, list[Any]]:
        """Return the output, and the buffers followed by the residuals of each layer that is written out."""
        own: list[Any] = []
        for chunk in self.chunks:
            if self.fns.unroll == "off":
                x, buffers = forward_layers(chunk, vjp, x, buffers, microbatch, slot=chunk.chunk)
                continue
            for index in range(_static_count(chunk)):
                x, kept = vjp.forward(chunk.params(index), x, microbatch)
                own.append(kept)
        return x, [*buffers, *own]

    def _backward(
        self, vjp: LayerVjp, dx: jax.Array, saved: list[Any], microbatch: Any, sums: Any
    ) -> tuple[jax.Array, Any, list[Any]]:
        for chunk in reversed(self.chunks):
            if self.fns.unroll == "off":
                dx, sums = backward_layers(chunk, vjp, dx, saved, microbatch, slot=chunk.chunk, sums=sums)
                continue
            for index in reversed(range(_static_count(chunk))):
                # Residuals form a stack: the last layer of the forward is the first of the backward.
                *saved, kept = saved
                dy = dx
                grads, dx = vjp.backward(chunk.params(index), kept, microbatch, dy)
                dx, sums = vary_like(dx, dy), add(sums, grads, (chunk.chunk, index))
        return dx, sums, saved


def _cut_chunks(fns: StageFns, params: PipelineParams) -> _WholeModel:
    num_chunks, num_layers = jax.tree.leaves(params.stages)[0].shape[:2]
    counts = fns.layers_per_stage or (num_layers,) * num_chunks
    stages = prepare_layers(fns, params.stages)
    chunks = [LayerStack(stages=stages, chunk=i, count=count, unroll=fns.unroll) for i, count in enumerate(counts)]
    return _WholeModel(fns=fns, shared=params.shared, chunks=chunks, num_layers=num_layers)


def _static_count(chunk: LayerStack) -> int:
    """Return the number of layers of a chunk, which a single rank knows before it runs."""
    assert isinstance(chunk.count, int)
    return chunk.count
