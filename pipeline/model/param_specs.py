"""Partition specs of a pipeline's parameters: from what `StageFns` says of one layer and of `shared`, and back."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ...meshes.axes import MeshAxes
from ...meshes.rules import split_first_free_dim
from .stage import PipelineParams, StageFns
from .trees import kept_axes, mesh_axes_of, on_mesh, spread_specs

_STACKED_DIMS = 3
"""Number of leading dimensions of a stage parameter: [chunks, ranks, layers, ...]."""


def param_specs(fns: StageFns, params: PipelineParams, mesh: Mesh) -> PipelineParams:
    """Return the spec of every parameter, [C, ranks@pipe, k, ...] for those of stages; axes of size 1 are left out.

    Raises:
        ShardingError: `fns.stage_specs` or `fns.shared_specs` is not a prefix of the parameters' tree.
    """
    own = spread_specs("stage_specs", fns.stage_specs, params.stages, of="params.stages")
    is_spec: Callable[[Any], bool] = lambda node: isinstance(node, P)  # noqa: E731
    stages = jax.tree.map(lambda spec: P(None, fns.axes.pipe, None, *spec), own, is_leaf=is_spec)
    shared = spread_specs("shared_specs", fns.shared_specs, params.shared, of="params.shared")
    return on_mesh(PipelineParams(stages=stages, shared=shared), mesh)


def layer_specs(shardings: PipelineParams) -> PipelineParams:
    """Return the specs that `StageFns` is given: of one layer's parameters, and of `shared`."""
    is_own: Callable[[Any], bool] = lambda node: isinstance(node, NamedSharding)  # noqa: E731
    stages = jax.tree.map(lambda own: P(*own.spec[_STACKED_DIMS:]), shardings.stages, is_leaf=is_own)
    return PipelineParams(stages=stages, shared=jax.tree.map(lambda own: own.spec, shardings.shared, is_leaf=is_own))


def gathered(sharding: NamedSharding, axes: MeshAxes) -> NamedSharding:
    """Return the sharding of the same array once it is gathered for use."""
    kept = (kept_axes(entry, axes) for entry in sharding.spec)
    pairs = zip(sharding.spec, kept, strict=True)
    left = (tuple(axis for axis in mesh_axes_of(P(entry)) if axis not in own) for entry, own in pairs)
    return NamedSharding(sharding.mesh, P(*(entry or None for entry in left)))


def split_over_batch(
    shardings: PipelineParams, shapes: PipelineParams, *, axes: MeshAxes, names: Sequence[str] | None = None
) -> PipelineParams:
    """Return the shardings with the first free dimension that divides evenly split over the batch axes.

    kernel[chunks, ranks@pipe, layers, D, F@tensor] -> kernel[chunks, ranks@pipe, layers, D@data, F@tensor]

    Args:
        axes: the axes of the mesh. Experts are split over those that hold copies of them, all else over expert too.
        names: names of the parameters that are split so, such as kernel; all if left out.
    """

    def split(lead: int) -> Any:
        def one(path: Any, sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            if names is not None and getattr(path[-1], "key", None) not in names:
                return sharding
            has_experts = set(axes.expert) & set(mesh_axes_of(sharding.spec))
            over = axes.kept if has_experts else axes.summed
            size = math.prod(sharding.mesh.shape[axis] for axis in over)
            spec = split_first_free_dim(sharding.spec, shape=leaf.shape, axis=over, size=size, start=lead)
            return NamedSharding(sharding.mesh, spec)

        return one

    # Never a stack dimension: to slice it XLA would gather the whole stack ("Involuntary full rematerialization").
    return PipelineParams(
        stages=jax.tree_util.tree_map_with_path(split(_STACKED_DIMS), shardings.stages, shapes.stages),
        shared=jax.tree_util.tree_map_with_path(split(0), shardings.shared, shapes.shared),
    )
