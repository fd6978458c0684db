"""Partition specs of a pipeline's parameters, from what `StageFns` says of one layer and of `shared`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from .stage import PipelineParams, StageFns
from .trees import on_mesh, spread_specs


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
