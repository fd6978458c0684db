"""Checks of a pipeline's arguments, from their types and shapes alone and before anything runs.

`check_fns.py` checks the functions among them, by tracing.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from ..meshes import MeshError, ScheduleError, ShardingError, mesh_sizes
from .schedules import Schedule
from .stage import PipelineParams, StageFns


def check_arguments(fns: StageFns, params: PipelineParams, batch: Any, *, mesh: Mesh, schedule: Schedule) -> None:
    """Raise unless mesh, schedule, parameters and batch agree on ranks, chunks, layers, microbatches and data shards.

    Raises:
        MeshError: the mesh lacks an axis, or its axes are not Auto.
        ScheduleError: a count differs, or parameters are missing.
        ShardingError: the batch does not split over `data`.
    """
    _check_mesh(mesh)
    sizes = mesh_sizes(mesh)
    if schedule.num_ranks != sizes.pipe:
        raise ScheduleError(
            f"schedule {schedule.name!r} is for {schedule.num_ranks} ranks, but the mesh has pipe={sizes.pipe}.",
            fix=f"build it with num_ranks={sizes.pipe}.",
        )
    _check_stages(params, schedule)
    if fns.layers_per_stage is not None:
        _check_counts(fns.layers_per_stage, params, schedule)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 2 or leaf.shape[0] != schedule.num_microbatches:
            raise ScheduleError(
                f"batch{name} has shape {leaf.shape}, but schedule {schedule.name!r} runs "
                f"{schedule.num_microbatches} microbatches: leaves are [microbatches, batch, ...].",
                fix=f"reshape it to ({schedule.num_microbatches}, batch / {schedule.num_microbatches}, ...).",
            )
        if leaf.shape[1] % sizes.data:
            raise ShardingError(
                f"batch{name}: {leaf.shape[1]} sequences a microbatch do not split over data={sizes.data}.",
                fix=f"use a microbatch size that is a multiple of {sizes.data}.",
            )


def _check_mesh(mesh: Mesh) -> None:
    missing = [axis for axis in ("pipe", "data") if axis not in mesh.axis_names]
    if missing:
        raise MeshError(
            f"the mesh has axes {', '.join(mesh.axis_names)}, but a pipeline runs over pipe and data: "
            f"{' and '.join(missing)} is missing.",
            fix="make it with build_mesh(MeshSpec(...)); axes of size 1 cost nothing.",
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise MeshError(
            f"the mesh has axis types {', '.join(str(kind) for kind in mesh.axis_types)}; a pipeline needs Auto.",
            fix="make it with build_mesh(MeshSpec(...)): jax.make_mesh gives Explicit axes unless told otherwise.",
        )


def _check_stages(params: PipelineParams, schedule: Schedule) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params.stages)
    if not leaves:
        raise ScheduleError("params.stages is empty: a pipeline has layers.", fix="put every layer's parameters there.")
    num_layers = max((leaf.shape[2] for _, leaf in leaves if leaf.ndim > 2), default=0)
    want = (schedule.num_chunks, schedule.num_ranks, max(1, num_layers))
    for path, leaf in leaves:
        # A leaf with fewer layers than another would be read past its end, and XLA would read its last layer again.
        if leaf.shape[:3] != want:
            raise ScheduleError(
                f"stage parameter params.stages{jax.tree_util.keystr(path)} has shape {leaf.shape}, but schedule "
                f"{schedule.name!r} and the other parameters want leading dimensions [chunks, ranks, layers] = "
                f"{list(want)}.",
                fix="reshape [all layers, ...] to [chunks, ranks, layers, ...].",
            )


def _check_counts(counts: tuple[int, ...], params: PipelineParams, schedule: Schedule) -> None:
    slots = jax.tree.leaves(params.stages)[0].shape[2]
    if len(counts) != schedule.num_stages or min(counts) < 1 or max(counts) != slots:
        raise ScheduleError(
            f"layers_per_stage={list(counts)} does not fit {schedule.num_stages} stages whose parameters have room for "
            f"{slots} layers each.",
            fix="give every stage 1 layer or more, and make the parameters with stages_from_layers().",
        )
