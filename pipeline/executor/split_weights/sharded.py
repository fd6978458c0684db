"""Parameters that are kept split over the batch axes, and gathered for use (Rajbhandari et al. 2020, "ZeRO").

A spec that names a batch axis keeps a parameter so, P("data", "tensor") a kernel [D, F]. With d devices of data:

    gather="step"     [D/d, F] --all-gather--> [D, F]          once a step, in the compute dtype
                      gradients [D/d, F] <--reduce-scatter-- [D, F]    once a step, in float32
    gather="layer"    the same for one layer at a time, in every action that reads it: no device ever holds more whole
                      layers than the one at work, and the sums of gradients are split as parameters are
    gather="chunk"    sums of gradients as with "layer"; the layers of a chunk are gathered together, once for a run of
                      actions on it, as the table says (`schedules/chunk_weights.py`)

Every device of data has the same layers and other sequences, so a reduce-scatter is also the sum over data that a
gradient needs. Read `region.py` for the first, `layers.py` for the second.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from ....layers.collectives import gather_weight
from ...model.frozen import keep_trained, trained_mask
from ...model.stage import PipelineParams, StageFns
from ...model.trees import kept_axes, mesh_axes_of, spread_specs
from .split_dims import Split, splits_after


@dataclass(frozen=True, kw_only=True)
class Splits:
    """How all parameters are kept, in the order of their leaves.

    stages: dimensions are those of one layer's parameter, without [chunks, layers].
    """

    stages: list[Split]
    shared: list[Split]

    @classmethod
    def of(cls, fns: StageFns, params: PipelineParams, *, summed: Sequence[str]) -> "Splits":
        """Return the splits that the specs of a model name, over batch axes with several devices."""
        return cls.from_specs(fns, specs_of(fns, params), summed=summed)

    @classmethod
    def from_specs(cls, fns: StageFns, specs: PipelineParams, *, summed: Sequence[str]) -> "Splits":
        """Return the splits that the specs of parameters name, those of stages without [chunks, layers]."""
        return cls(stages=_splits_of(specs.stages, fns, summed), shared=_splits_of(specs.shared, fns, summed))


def specs_of(fns: StageFns, params: PipelineParams) -> PipelineParams:
    """Return the spec of each parameter, of those of stages without [chunks, layers]."""
    return PipelineParams(
        stages=spread_specs("stage_specs", fns.stage_specs, params.stages, of="params.stages"),
        shared=spread_specs("shared_specs", fns.shared_specs, params.shared, of="params.shared"),
    )


def _splits_of(specs: Any, fns: StageFns, summed: Sequence[str]) -> list[Split]:
    return [_split_of(spec, fns, summed) for spec in jax.tree.leaves(specs, is_leaf=_is_spec)]


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def _split_of(spec: P, fns: StageFns, summed: Sequence[str]) -> Split:
    for dim, entry in enumerate(spec):
        if axes := tuple(axis for axis in kept_axes(entry, fns.axes) if axis in summed):
            return Split(dim=dim, axes=axes)
    return Split(dim=0, axes=())


def gather(tree: Any, splits: Sequence[Split], *, dtype: DTypeLike | None = None) -> Any:
    """Return the whole of each leaf, sent in `dtype` if that is given: an all-gather for each that is split."""

    def one(leaf: jax.Array, split: Split) -> jax.Array:
        if not split.axes:
            return leaf
        sent = leaf.astype(dtype) if dtype is not None and is_float(leaf) else leaf
        return gather_weight(sent, split.axes, dim=split.dim)

    return _map(one, tree, splits)


def scatter(tree: Any, splits: Sequence[Split]) -> Any:
    """Return each device's own part of gradients, summed over the axes that split their parameters, in float32."""
    return _map(_scatter, tree, splits)


def _scatter(grad: jax.Array, split: Split) -> jax.Array:
    if not split.axes:
        return grad
    # Gradients of integers are zeros of their own dtype.
    sums = grad.astype(jnp.float32) if is_float(grad) else grad
    return jax.lax.psum_scatter(sums, split.axes, scatter_dimension=split.dim, tiled=True)


def _sum_over(tree: Any, specs: Any, axes: Sequence[str]) -> Any:
    """Sum each leaf over those of the axes that its spec does not name: one all-reduce for each such set of axes."""
    leaves, structure = jax.tree.flatten(tree)
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, (leaf, spec) in enumerate(zip(leaves, jax.tree.leaves(specs, is_leaf=_is_spec), strict=True)):
        over = tuple(axis for axis in axes if axis not in mesh_axes_of(spec))
        # A sum over no axes would stay in the program as a copy. Gradients of integers are zeros on every device.
        if over and is_float(leaf):
            groups.setdefault(over, []).append(number)
    for over, numbers in groups.items():
        for number, total in zip(numbers, jax.lax.psum([leaves[n] for n in numbers], over), strict=True):
            leaves[number] = total
    return jax.tree.unflatten(structure, leaves)


def gather_once(fns: StageFns, params: PipelineParams, *, summed: Sequence[str]) -> PipelineParams:
    """Return the parameters with what is gathered once a step: all with gather="step", else those of the ends.

    params.stages [C, k, ...] of this device.
    """
    splits, dtype = Splits.of(fns, params, summed=summed), fns.gather_dtype
    # Back in their own dtype: an embedding's gradient sums over tokens, in the dtype of its table.
    whole = gather(params.shared, splits.shared, dtype=dtype)
    shared = jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), whole, params.shared)
    if fns.gather != "step":
        return PipelineParams(stages=params.stages, shared=shared)
    stages = gather(params.stages, [split.behind(2) for split in splits.stages], dtype=dtype)
    return PipelineParams(stages=stages, shared=shared)


def sum_once(
    fns: StageFns,
    grads: PipelineParams,
    *,
    params: PipelineParams,
    pipe: Sequence[str],
    summed: Sequence[str],
    tokens: Sequence[str],
) -> PipelineParams:
    """Return the gradients summed over the batch axes, and those of the ends over pipe too, in parts as parameters are.

    Where tokens are split, what is whole along their axes is summed over those as well. grads.stages [C, k, ...] of
    what `gather_once` returned, with None for frozen parameters.
    """
    specs, stages = keep_trained(specs_of(fns, params), trained_mask(fns.frozen, params)), grads.stages
    splits = Splits.from_specs(fns, specs, summed=summed)
    if fns.gather == "step":
        stages = scatter(stages, [split.behind(2) for split in splits.stages])
    shared = scatter(grads.shared, splits.shared)
    return PipelineParams(
        stages=_sum_over(stages, specs.stages, (*summed, *tokens)),
        shared=_sum_over(shared, specs.shared, (*pipe, *summed, *tokens)),
    )


@dataclass(frozen=True, kw_only=True)
class LayerGather:
    """The gather of one layer's parameters in an action, or of those of a whole chunk.

    kept: how each is kept, a tree like that of the parameters.
    prepared: how leaves are split after `prepare`.
    dtype: in which they are sent, their own if None.
    """

    kept: Any
    prepared: tuple[Split, ...]
    dtype: DTypeLike | None

    @classmethod
    def of(
        cls, prepare: Callable[[Any], Any] | None, own: Any, splits: Sequence[Split], *, dtype: DTypeLike | None
    ) -> "LayerGather | None":
        """Return the gather of a layer whose own parameters [D/d, F] are kept so; None if all are whole.

        Raises:
            ShardingError: `prepare` mixes what different devices have.
        """
        if not any(split.axes for split in splits):
            return None
        prepared = tuple(splits if prepare is None else splits_after(prepare, own, splits))
        return cls(kept=jax.tree.unflatten(jax.tree.structure(own), splits), prepared=prepared, dtype=dtype)

    def gather(self, params: Any, *, stacked: int = 0) -> Any:
        """Return the whole prepared parameters of a layer, of which this device keeps parts.

        Args:
            stacked: number of leading dimensions of layers, for parameters [k, ...] of several.
        """
        return gather(params, [split.behind(stacked) for split in self.prepared], dtype=self.dtype)

    def gather_kept(self, params: Any) -> Any:
        """Return the whole parameters of a layer before `prepare`: for their types."""
        return gather(params, jax.tree.leaves(self.kept))

    def scatter(self, grads: Any) -> Any:
        """Return this device's part of the gradients of a layer's parameters, summed; None stays."""
        return jax.tree.map(lambda split, grad: grad if grad is None else _scatter(grad, split), self.kept, grads)


def layer_gathers(
    fns: StageFns, params: PipelineParams, stages: dict[str, Any], *, summed: Sequence[str]
) -> dict[str, LayerGather | None]:
    """Return the gather of a layer's parameters by kind, None where they are whole; stages [C, k, ...] by kind."""
    if fns.gather == "step":
        return dict.fromkeys(stages)
    specs = fns.by_kind(spread_specs("stage_specs", fns.stage_specs, params.stages, of="params.stages"))
    return {
        kind: LayerGather.of(
            fns.by_kind(fns.prepare)[kind],
            jax.tree.map(lambda leaf: leaf[0, 0], own),
            _splits_of(specs[kind], fns, summed),
            dtype=fns.gather_dtype,
        )
        for kind, own in stages.items()
    }


def is_float(leaf: jax.Array) -> bool:
    """Return whether a leaf has gradients: those of integers are zeros."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _map(fn: Callable[[Any, Split], Any], tree: Any, splits: Sequence[Split]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [fn(leaf, split) for leaf, split in zip(leaves, splits, strict=True)])
