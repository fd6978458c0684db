"""The part of a model that one rank runs, and what is known of it from types alone, before the first turn.

    parameters, batch  --types-->  x, zero_sums     what layers pass on, and what is summed
                                   plan_backward    residuals of a layer, and the halves of its backward

Types alone decide; the only computation is `StageFns.prepare`, once for all layers. Read `layers.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from ...meshes.device_axes import mark_varying
from ..model.frozen import trained_mask
from ..model.pattern import stage_pattern
from ..model.protocol import Given, Output
from ..model.stage import PipelineParams
from .backward.residuals import LayerVjp, plan_layer
from .backward.split_backward import SplitBackward
from .backward.traced_vjp import pull_back, split_floats
from .buffers import empty_buffer, floats_of, read, zeros_for
from .functions import Functions
from .layers import Index, LayerStack
from .loop_state import Grads, Place, Sums
from .microbatches import Inputs, Microbatches, microbatches_of
from .prepare import prepare_layers
from .split_weights.sharded import LayerGather, layer_gathers


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """The layers of one rank with the parameters of the ends, and the batch of its data shard.

    unprepared: parameters of the layers, by kind, [C, k, ...], marked as varying.
    stages: the same as layers take them, after `StageFns.prepare`.
    shared: parameters of the ends, marked as the ends need it.
    state: state of the layers, by kind, [C, k, ...] or None.
    gathers: the gather of one layer's parameters, by kind, None where they are whole.
    microbatches, at_ends: the batch, as layers and as the ends are given it.
    wants_batch: whether gradients of the batch are asked for too.
    trained, trained_shared: trees of bools, whether a parameter of the layers, by kind, or of the ends has gradients.
    """

    functions: Functions
    unprepared: dict[str, Any]
    stages: dict[str, Any]
    shared: Any
    state: dict[str, Any]
    gathers: dict[str, LayerGather | None]
    microbatches: Microbatches
    at_ends: Microbatches
    wants_batch: bool
    trained: dict[str, Any]
    trained_shared: Any

    @property
    def pipe(self) -> str:
        """The mesh axis of the pipeline."""
        return self.functions.fns.axes.pipe

    @property
    def ends_together(self) -> bool:
        """Whether all ranks run `first` and `last` together."""
        return self.functions.fns.ends_together

    @property
    def num_chunks(self) -> int:
        """Number of stages of this rank."""
        return jax.tree.leaves(self.unprepared)[0].shape[0]

    def room(self, kind: str) -> int:
        """Number of layers of a kind that a stage has room for, which is what the largest stage has."""
        return jax.tree.leaves(self.unprepared[kind])[0].shape[1]

    def stack(self, chunk: Index, stage: Index) -> LayerStack:
        """Return the layers of one of this rank's stages. A constant stage has a constant number of layers."""
        fns = self.functions.fns
        num_stages = self.num_chunks * (jax.lax.axis_size(self.pipe) if self.pipe in self.functions.axes else 1)
        counts = fns.counts(num_stages=num_stages, room=self.room(next(iter(self.unprepared))))
        # Constants let jax unroll and differentiate the loop over layers; a traced count allows neither.
        count, first = counts[0], stage * counts[0]
        if len(set(counts)) > 1:
            count, first = (_at(own, stage) for own in (counts, (0, *accumulate(counts[:-1]))))
        # Rows of constants of the program: one row is read at run time where the rank decides which stage it is.
        kind_of = place_of = kind_counts = None
        if fns.pattern is not None:
            pattern = stage_pattern(fns.pattern, kinds=tuple(self.unprepared), counts=counts)
            if pattern.is_sorted:
                own = {kind: pattern.counts_of(kind) for kind in pattern.kinds}
                kind_counts = {kind: each[0] if len(set(each)) == 1 else _at(each, stage) for kind, each in own.items()}
            else:
                kind_of, place_of = (jnp.asarray(table)[stage] for table in (pattern.kind_of, pattern.place_of))
        return LayerStack(
            stages=self.stages,
            chunk=chunk,
            count=count,
            stage=stage,
            first_layer=first,
            state=self.state,
            gathers=self.gathers,
            kind_of=kind_of,
            place_of=place_of,
            kind_counts=kind_counts,
            unroll=fns.unroll,
        )

    @property
    def example(self) -> LayerStack:
        """Layers whose types stand for those of all: they have the same."""
        is_pipelined = self.pipe in self.functions.axes
        return self.stack(jnp.int32(0), jax.lax.axis_index(self.pipe) if is_pipelined else jnp.int32(0))

    def gather_chunk(self, chunk: Index) -> dict[str, Any]:
        """Return the whole prepared parameters of one of this rank's stages, by kind, leaves [k, ...]."""
        own = {kind: read(stages, chunk) for kind, stages in self.stages.items()}
        return {
            kind: gather.gather(own[kind], stacked=1) if gather else own[kind] for kind, gather in self.gathers.items()
        }

    @property
    def chunk_types(self) -> dict[str, Any]:
        """Types of what `gather_chunk` returns."""
        return jax.eval_shape(lambda: self.gather_chunk(0))

    def run_first(self, given: Given) -> Any:
        """Return the input of the first layer for a microbatch."""
        return self.functions.first(self.shared, given.at(-1))

    def first_grads(self, given: Given, dx: list[jax.Array]) -> tuple[Any, Any]:
        """Return gradients of (shared, microbatch) through `first`, given those of its output."""
        wanted: dict[str, Any] = {"wants_batch": self.wants_batch, "trained": self.trained_shared}
        grads = pull_back(self.functions.first, self.shared, given.at(-1), dx, **wanted)
        return grads[0], self._once(grads[1])

    def run_last(self, y: Any, given: Given) -> Output:
        """Return a microbatch's part of the loss, and of the metrics of `last`."""
        return self.functions.last(self.shared, y, given.at(-2))

    def last_and_grads(self, y: Any, given: Given) -> tuple[Output, tuple[Any, Any], list[jax.Array]]:
        """Return the result of `last`, its gradients of (shared, microbatch), and dy of the floating-point leaves."""
        floats, merge = split_floats(self.shared, self.trained_shared)

        # Differentiated at once, so nothing of the head waits for a backward turn. Gradients of integers are float0.
        def loss_of(floats: list[Any], y: Any, microbatch: Any) -> tuple[Any, Output]:
            out = self.functions.last(merge(floats), y, replace(given.at(-2), microbatch=microbatch))
            return out.loss, out

        wanted = (0, 1, 2) if self.wants_batch else (0, 1)
        grads, out = jax.grad(loss_of, argnums=wanted, has_aux=True, allow_int=True)(floats, y, given.microbatch)
        d_shared, dy, *d_batch = grads
        return out, (merge(d_shared, others="none"), self._once(d_batch[0]) if d_batch else None), floats_of(dy)

    def _once(self, d_batch: Any) -> Any:
        """Return gradients of a microbatch on one rank and zeros on the others, where all ranks have the same."""
        if d_batch is None or not self.ends_together:
            return d_batch
        is_first = jax.lax.axis_index(self.pipe) == 0
        return jax.tree.map(
            lambda leaf: jnp.where(is_first, leaf, 0) if leaf.size and leaf.dtype != jax.dtypes.float0 else leaf,
            d_batch,
        )

    @cached_property
    def x(self) -> Any:
        """Types of what layers pass on, a tree of [b, ...]."""

        # The marks of `first` over tensor, say, stay: what layers pass on may differ there, or be the same.
        def run() -> Any:
            x = self.run_first(self.at_ends.read(0))
            return jax.tree.map(lambda leaf: mark_varying(leaf, self.functions.axes), x)

        return jax.eval_shape(run)

    def zero_sums(self) -> Sums:
        """Return the sums before the first microbatch, of loss, metrics and stats."""

        def run() -> tuple[dict[str, Output], Output]:
            x, stack = jax.tree.map(empty_buffer, self.x), self.example
            outs = {}
            for kind, layer in self.functions.layers.items():
                place, given = self._example_of(kind, stack)
                outs[kind] = layer(stack.params(place), x, given)
            return outs, self.run_last(x, self.at_ends.read(0))

        # Traced for types alone. A metric that several functions return has one shape in all: the checks see to it.
        outs, last = jax.eval_shape(run)
        metrics = {name: kind for out in (last, *outs.values()) for name, kind in out.metrics.items()}
        zeros = lambda kind: mark_varying(empty_buffer(kind), self.functions.axes)  # noqa: E731
        stats = {
            kind: jax.tree.map(lambda leaf, k=kind: empty_buffer(leaf, self.num_chunks, self.room(k)), out.stats)
            for kind, out in outs.items()
        }
        return Sums(loss=zeros(last.loss), metrics=jax.tree.map(zeros, metrics), stats=stats)

    def _example_of(self, kind: str, stack: LayerStack) -> tuple[Place, Given]:
        """Return the place of a layer of a kind, and what it is given."""
        place = Place(kind=kind, chunk=0, index=0)
        return place, stack.given(self.microbatches.read(0), 0, place)

    def zero_grads(self) -> Grads:
        """Return sums of zero for the gradients."""
        return Grads(
            stages=jax.tree.map(zeros_for, self.unprepared, self.trained),
            shared=jax.tree.map(zeros_for, self.shared, self.trained_shared),
            batch=jax.tree.map(zeros_for, self.microbatches.batch) if self.wants_batch else None,
        )

    def plan_backward(self) -> dict[str, LayerVjp]:
        """Return the forward and backward of a layer of each kind, with residuals chosen."""
        stack, x = self.example, jax.tree.map(empty_buffer, self.x)

        def plan(kind: str) -> LayerVjp:
            place, given = self._example_of(kind, stack)
            return plan_layer(
                self.functions.layers[kind],
                stack.params(place),
                x,
                given,
                prepare=self.functions.prepares[kind],
                unprepared=read(self.unprepared[kind], 0, 0),
                gather=self.gathers[kind],
                wants_batch=self.wants_batch,
                trained=self.trained[kind],
            )

        return {kind: plan(kind) for kind in self.functions.layers}

    def split_backward(self, vjps: dict[str, LayerVjp]) -> dict[str, SplitBackward]:
        """Return the two halves of the backward of a layer of each kind."""
        stack, dy = self.example, jax.tree.map(empty_buffer, floats_of(self.x))

        def split(kind: str, vjp: LayerVjp) -> SplitBackward:
            place, given = self._example_of(kind, stack)
            return SplitBackward(vjp, stack.params(place), jax.tree.map(empty_buffer, vjp.kept), given, dy)

        return {kind: split(kind, vjp) for kind, vjp in vjps.items()}


def _at(numbers: Sequence[int], stage: Index) -> Index:
    return numbers[stage] if isinstance(stage, int) else jnp.asarray(numbers)[stage]


def _mark(tree: Any, axes: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda leaf: mark_varying(leaf, axes), tree)


def rank_model(functions: Functions, params: PipelineParams, inputs: Inputs, *, wants_batch: bool) -> RankModel:
    """Return the model of this rank; for use inside `shard_map`.

    params.stages [C, k, ...] of this rank, params.shared whole or this rank's part, batch leaves [M, b, ...].
    """
    # Parameters that are the same on all ranks stay marked so where the ends run together: see ends_together.py.
    tokens, by_kind = functions.token_axes, functions.fns.by_kind
    summed = [axis for axis in functions.axes if axis in functions.fns.axes.summed]
    shared = _mark(params.shared, (*functions.end_axes, *tokens))
    unprepared = _mark(by_kind(params.stages), (*functions.axes, *tokens))
    at_ends = microbatches_of(functions, inputs)
    trained = trained_mask(functions.fns.frozen, params)
    return RankModel(
        functions=functions,
        unprepared=unprepared,
        stages=prepare_layers(functions, unprepared),
        shared=shared,
        state=_mark(by_kind(inputs.state), functions.axes),
        gathers=layer_gathers(functions.fns, params, unprepared, summed=summed),
        microbatches=at_ends.marked(functions.axes),
        at_ends=at_ends,
        wants_batch=wants_batch,
        trained=by_kind(trained.stages),
        trained_shared=trained.shared,
    )
