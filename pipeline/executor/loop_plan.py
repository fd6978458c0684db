"""Plan the executor's loop before it starts: residuals of a layer, halves of its backward, buffers of the right size.

    parameters, batch, x  --types-->  vjp     forward and backward of a layer
    tables                            halves  the backward in two, if the tables have such actions
                                      kept    types of the residuals --> buffers [slots, layers, ...]

Types alone decide; the only computation is `StageFns.prepare`, once for all layers. Read `loop_state.py` next.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..model.stage import PipelineParams, StageFns
from .backward.residuals import LayerVjp, plan_layer
from .backward.split_backward import SplitBackward
from .buffers import empty_buffer, read, vary, zeros_for
from .enter import EnterAlone, EnterTogether
from .layers import LayerStack
from .leave import LeaveAlone, LeaveTogether
from .loop_state import LoopState, Wants
from .prepare import prepare_layers
from .tables import Tables, Turns

Bubbles = Literal["zeros", "nan"]
"""Content of buffers before use and of idle sends; "nan" proves that none of it reaches a result."""


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """Constants of the loop: all that a turn needs besides the state and its row of the tables.

    params: stages [C, k, ...] of this rank, marked as varying, and shared.
    batch: leaves [M, b, ...] on this data shard, marked as varying.
    stages: the parameters as layers take them, after `StageFns.prepare`, [C, k, ...].
    enter, leave: what runs `first` and `last`.
    x: type of the activation between layers, [b, ...].
    vjp: forward and backward of a layer; None where only the loss is wanted.
    halves: the backward in two, for tables with such actions.
    kept: types of the residuals of one layer and microbatch, with what the first half of a backward adds.
    axes: mesh axes along which activations differ, pipe and batch; none of size 1.
    """

    fns: StageFns
    params: PipelineParams
    batch: Any
    stages: Any
    enter: EnterAlone | EnterTogether
    leave: LeaveAlone | LeaveTogether
    x: jax.ShapeDtypeStruct
    vjp: LayerVjp | None
    halves: SplitBackward | None
    kept: list[jax.ShapeDtypeStruct]
    wants: Wants
    bubbles: Bubbles
    axes: tuple[str, ...]

    def start_state(self, tables: Tables) -> LoopState:
        """Return the state before the first turn: unused buffers, sums of zero."""
        loss = vary(jnp.zeros((), jnp.float32), self.axes)
        activations = self.fill(self.x, tables.num_activation_slots)
        if self.wants == "loss":
            return LoopState(loss=loss, activations=activations)
        lead = tables.num_residual_slots, self.num_layers
        return LoopState(
            loss=loss,
            activations=activations,
            gradients=self.fill(self.x, tables.num_gradient_slots),
            residuals=[self.fill(leaf, *lead) for leaf in self.kept],
            stage_grads=jax.tree.map(zeros_for, self.params.stages),
            shared_grads=jax.tree.map(zeros_for, self.params.shared),
        )

    def stack(self, turn: Turns) -> LayerStack:
        """Return the layers of the stage that a turn's action runs."""
        chunk = turn.compute.chunk
        return LayerStack(stages=self.stages, chunk=chunk, count=self._count_layers(chunk), unroll=self.fns.unroll)

    def fill(self, kind: jax.ShapeDtypeStruct, *slots: int) -> jax.Array:
        """Return a buffer [*slots, ...] as it is before use: zeros, or NaN to prove that it is not read."""
        return empty_buffer(kind, *slots, fill=_filling(self.bubbles, kind.dtype))

    @property
    def num_chunks(self) -> int:
        """Number of stages of this rank."""
        return jax.tree.leaves(self.params.stages)[0].shape[0]

    @property
    def num_layers(self) -> int:
        """Room for layers in a stage, which is what the largest stage has."""
        return jax.tree.leaves(self.params.stages)[0].shape[1]

    def _count_layers(self, chunk: jax.Array) -> jax.Array | int:
        """Number of layers of a stage: a constant, unless stages differ."""
        # A constant lets jax unroll and differentiate the loop over layers; a traced count allows neither.
        counts = self.fns.layers_per_stage
        if counts is None or len(set(counts)) == 1:
            return self.num_layers
        pipe = self.fns.axes.pipe
        return jnp.asarray(counts)[chunk * jax.lax.axis_size(pipe) + jax.lax.axis_index(pipe)]


def plan_loop(
    fns: StageFns,
    params: PipelineParams,
    batch: Any,
    *,
    tables: Tables,
    bubbles: Bubbles,
    wants: Wants,
    axes: tuple[str, ...],
) -> LoopPlan:
    """Return the plan of one rank's loop; for use inside `shard_map`.

    params.stages [C, k, ...] of this rank, params.shared whole or this rank's part, batch leaves [M, b, ...].
    `axes` are those of pipe and batch that have more than one device.
    """
    # Parameters that are the same on all ranks stay marked so where the ends run together: see EnterTogether.
    end_axes = tuple(axis for axis in axes if axis != fns.axes.pipe) if fns.ends_together else axes
    shared, end_batch = jax.tree.map(lambda leaf: vary(leaf, end_axes), (params.shared, batch))
    own, batch = jax.tree.map(lambda leaf: vary(leaf, axes), (params.stages, batch))
    stages = prepare_layers(fns, own)
    x = jax.eval_shape(lambda: vary(fns.first(shared, read(end_batch, 0)), axes))
    # One layer stands for all: they have the same types, and a residual of each gets a place of its own in the buffers.
    vjp, halves, kept = None, None, []
    if wants == "grads":
        layer, microbatch = read(stages, 0, 0), read(batch, 0)
        example = empty_buffer(x)
        vjp = plan_layer(fns.layer, layer, example, microbatch, prepare=fns.prepare, unprepared=read(own, 0, 0))
        kept = vjp.kept
        if tables.has_halves:
            halves = SplitBackward(vjp, layer, [empty_buffer(leaf) for leaf in kept], microbatch, example)
            kept = [*kept, *halves.extra]
    enter, leave = _choose_ends(fns, shared, end_batch, wants)
    return LoopPlan(
        fns=fns,
        params=PipelineParams(stages=own, shared=shared),
        batch=batch,
        stages=stages,
        enter=enter,
        leave=leave,
        x=x,
        vjp=vjp,
        halves=halves,
        kept=kept,
        wants=wants,
        bubbles=bubbles,
        axes=axes,
    )


def _choose_ends(
    fns: StageFns, shared: Any, batch: Any, wants: Wants
) -> tuple[EnterAlone | EnterTogether, LeaveAlone | LeaveTogether]:
    """Return who runs `first` and who runs `last`: the end stages alone, or all ranks together."""
    if not fns.ends_together:
        return EnterAlone(fns=fns, shared=shared), LeaveAlone(fns=fns, shared=shared, wants=wants)
    together = EnterTogether(fns=fns, shared=shared, batch=batch)
    return together, LeaveTogether(fns=fns, shared=shared, batch=batch, wants=wants)


def _filling(bubbles: Bubbles, dtype: Any) -> float:
    return jnp.nan if bubbles == "nan" and jnp.issubdtype(dtype, jnp.floating) else 0
