"""The part of a model that one rank runs, and what is known of it from types alone, before the first turn.

    parameters, batch  --types-->  x, zero_sums     what layers pass on, and what is summed
                                   plan_backward    residuals of a layer, and the halves of its backward

Types alone decide; the only computation is `StageFns.prepare`, once for all layers. Read `layers.py` next.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from ..model.protocol import Given, Output
from ..model.stage import PipelineParams
from .backward.residuals import LayerVjp, plan_layer
from .backward.split_backward import SplitBackward
from .backward.traced_vjp import pull_back
from .buffers import empty_buffer, floats_of, read, vary, zeros_for
from .functions import Functions
from .layers import Index, LayerStack
from .loop_state import Grads, Sums
from .microbatches import Inputs, Microbatches, microbatches_of
from .prepare import prepare_layers


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """The layers of one rank with the parameters of the ends, and the batch of its data shard.

    unprepared: parameters of the layers, [C, k, ...], marked as varying.
    stages: the same as layers take them, after `StageFns.prepare`.
    shared: parameters of the ends, marked as the ends need it.
    state: state of the layers, [C, k, ...], or None.
    microbatches, at_ends: the batch, as layers and as the ends are given it.
    wants_batch: whether gradients of the batch are asked for too.
    """

    functions: Functions
    unprepared: Any
    stages: Any
    shared: Any
    state: Any
    microbatches: Microbatches
    at_ends: Microbatches
    wants_batch: bool

    @property
    def pipe(self) -> str:
        """The mesh axis of the pipeline."""
        return self.functions.fns.axes.pipe

    @property
    def num_chunks(self) -> int:
        """Number of stages of this rank."""
        return jax.tree.leaves(self.unprepared)[0].shape[0]

    @property
    def num_layers(self) -> int:
        """Room for layers in a stage, which is what the largest stage has."""
        return jax.tree.leaves(self.unprepared)[0].shape[1]

    def stack(self, chunk: Index, stage: Index) -> LayerStack:
        """Return the layers of one of this rank's stages. A constant stage has a constant number of layers."""
        counts = self.functions.fns.layers_per_stage
        count, first = self.num_layers, stage * self.num_layers
        if counts is not None and len(set(counts)) > 1:
            # A constant lets jax unroll and differentiate the loop over layers; a traced count allows neither.
            firsts = (0, *accumulate(counts[:-1]))
            is_known = isinstance(stage, int)
            count, first = (own[stage] if is_known else jnp.asarray(own)[stage] for own in (counts, firsts))
        return LayerStack(
            stages=self.stages,
            chunk=chunk,
            count=count,
            stage=stage,
            first_layer=first,
            state=self.state,
            unroll=self.functions.fns.unroll,
        )

    @property
    def example(self) -> LayerStack:
        """Layers whose types stand for those of all: they have the same."""
        is_pipelined = self.pipe in self.functions.axes
        return self.stack(jnp.int32(0), jax.lax.axis_index(self.pipe) if is_pipelined else jnp.int32(0))

    def run_first(self, given: Given) -> Any:
        """Return the input of the first layer for a microbatch."""
        return self.functions.first(self.shared, given.at(-1))

    def first_grads(self, given: Given, dx: list[jax.Array]) -> tuple[Any, Any]:
        """Return gradients of (shared, microbatch) through `first`, given those of its output."""
        grads = pull_back(self.functions.first, self.shared, given.at(-1), dx, wants_batch=self.wants_batch)
        return grads[0], self._once(grads[1])

    def run_last(self, y: Any, given: Given) -> Output:
        """Return a microbatch's part of the loss, and of the metrics of `last`."""
        return self.functions.last(self.shared, y, given.at(-2))

    def last_and_grads(self, y: Any, given: Given) -> tuple[Output, tuple[Any, Any], list[jax.Array]]:
        """Return the result of `last`, its gradients of (shared, microbatch), and dy of the floating-point leaves."""

        def loss_of(shared: Any, y: Any, microbatch: Any) -> tuple[jax.Array, Output]:
            out = self.functions.last(shared, y, replace(given.at(-2), microbatch=microbatch))
            return out.loss, out

        wanted = (0, 1, 2) if self.wants_batch else (0, 1)
        grads, out = jax.grad(loss_of, argnums=wanted, has_aux=True, allow_int=True)(self.shared, y, given.microbatch)
        d_shared, dy, *d_batch = grads
        return out, (d_shared, self._once(d_batch[0]) if d_batch else None), floats_of(dy)

    def _once(self, d_batch: Any) -> Any:
        """Return gradients of a microbatch on one rank and zeros on the others, where all ranks have the same."""
        if d_batch is None or not self.functions.fns.ends_together:
            return d_batch
        is_first = jax.lax.axis_index(self.pipe) == 0
        return jax.tree.map(
            lambda leaf: jnp.where(is_first, leaf, 0) if leaf.size and leaf.dtype != jax.dtypes.float0 else leaf,
            d_batch,
        )

    @cached_property
    def x(self) -> Any:
        """Types of what layers pass on, a tree of [b, ...]."""

        def run() -> Any:
            x = self.run_first(self.at_ends.read(0))
            return jax.tree.map(lambda leaf: vary(leaf, self.functions.axes), x)

        return jax.eval_shape(run)

    def zero_sums(self) -> Sums:
        """Return the sums before the first microbatch, of loss, metrics and stats."""

        def run() -> tuple[Output, Output]:
            x = jax.tree.map(empty_buffer, self.x)
            given = self.example.given(self.microbatches.read(0), 0)
            out = self.functions.layer(self.example.params(0), x, given)
            return out, self.run_last(x, self.at_ends.read(0))

        out, last = jax.eval_shape(run)
        lead = self.num_chunks, self.num_layers
        zeros = lambda kind: vary(empty_buffer(kind), self.functions.axes)  # noqa: E731
        return Sums(
            loss=zeros(last.loss),
            metrics=jax.tree.map(zeros, dict(last.metrics) | dict(out.metrics)),
            stats=jax.tree.map(lambda kind: empty_buffer(kind, *lead), out.stats),
        )

    def zero_grads(self) -> Grads:
        """Return sums of zero for the gradients."""
        return Grads(
            stages=jax.tree.map(zeros_for, self.unprepared),
            shared=jax.tree.map(zeros_for, self.shared),
            batch=jax.tree.map(zeros_for, self.microbatches.batch) if self.wants_batch else None,
        )

    def plan_backward(self) -> LayerVjp:
        """Return the forward and backward of a layer, with residuals chosen."""
        return plan_layer(
            self.functions.layer,
            self.example.params(0),
            jax.tree.map(empty_buffer, self.x),
            self.example.given(self.microbatches.read(0), 0),
            prepare=self.functions.prepare,
            unprepared=read(self.unprepared, 0, 0),
            wants_batch=self.wants_batch,
        )

    def split_backward(self, vjp: LayerVjp) -> SplitBackward:
        """Return the two halves of a layer's backward."""
        given = self.example.given(self.microbatches.read(0), 0)
        residuals = [empty_buffer(leaf) for leaf in vjp.kept]
        return SplitBackward(
            vjp, self.example.params(0), residuals, given, [empty_buffer(k) for k in floats_of(self.x)]
        )


def rank_model(functions: Functions, params: PipelineParams, inputs: Inputs, *, wants_batch: bool) -> RankModel:
    """Return the model of this rank; for use inside `shard_map`.

    params.stages [C, k, ...] of this rank, params.shared whole or this rank's part, batch leaves [M, b, ...].
    """
    # Parameters that are the same on all ranks stay marked so where the ends run together: see EnterTogether.
    shared = jax.tree.map(lambda leaf: vary(leaf, functions.end_axes), params.shared)
    unprepared, state = jax.tree.map(lambda leaf: vary(leaf, functions.axes), (params.stages, inputs.state))
    at_ends = microbatches_of(functions, inputs)
    return RankModel(
        functions=functions,
        unprepared=unprepared,
        stages=prepare_layers(functions, unprepared),
        shared=shared,
        state=state,
        microbatches=at_ends.marked(functions.axes),
        at_ends=at_ends,
        wants_batch=wants_batch,
    )
