"""Check the arguments of a pipeline against each other, from their types and shapes, before anything runs.

Read `functions.py` next: it checks the functions, by tracing them.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from ....meshes import AXES, MeshError, ScheduleError, ShardingError, mesh_sizes
from ....meshes.arguments import check_choice, check_instance
from ....meshes.divisibility import check_divides
from ....meshes.switches import check_switches
from ...model.stack import check_layers
from ...model.stage import PipelineParams, StageFns
from ...model.trees import check_arrays, spread_specs
from ...schedules import Schedule
from ..batch import check_batch
from ..loop_plan import Bubbles


def check_arguments(
    fns: StageFns, params: PipelineParams, batch: Any, *, mesh: Mesh, schedule: Schedule, bubbles: Bubbles
) -> None:
    """Raise unless mesh, schedule, parameters and batch agree on ranks, chunks, layers, microbatches and data shards.

    Raises:
        MeshError: the mesh lacks an axis, has an unknown one, or its axes are not Auto.
        ScheduleError: an argument has the wrong type, a count differs, or parameters are missing.
        ShardingError: the batch does not split over `data`, or `shared` not over `pipe`.
    """
    # It runs with all other switches of jax: see tests/pipeline/test_switches.py.
    check_switches("jax_disable_jit", "jax_auto_pcast", error=ScheduleError)
    _check_kinds(fns, params, mesh, schedule, bubbles)
    _check_mesh(mesh)
    sizes = mesh_sizes(mesh)
    if schedule.num_ranks != sizes.pipe:
        raise ScheduleError(
            f"schedule {schedule.name!r} is for {schedule.num_ranks} ranks, but the mesh has pipe={sizes.pipe}.",
            fix=f"build it with num_ranks={sizes.pipe}.",
        )
    _check_numbers(params)
    _check_stages(params, schedule)
    _check_counts(fns, params, schedule)
    if fns.shared_specs is not None:
        _check_shared(fns.shared_specs, params.shared, num_ranks=sizes.pipe)
    check_batch(fns, batch, num_microbatches=schedule.num_microbatches, num_shards=sizes.data)


def _check_kinds(fns: Any, params: Any, mesh: Any, schedule: Any, bubbles: Any) -> None:
    check_instance("fns", fns, StageFns, error=ScheduleError, fix="give StageFns(first=..., layer=..., last=...).")
    check_instance(
        "params", params, PipelineParams, error=ScheduleError, fix="give PipelineParams(stages=..., shared=...)."
    )
    check_instance("mesh", mesh, (Mesh, AbstractMesh), error=MeshError, fix="make it with build_mesh(MeshSpec(...)).")
    check_instance(
        "schedule", schedule, Schedule, error=ScheduleError, fix="make it with build_schedule(name, num_ranks=...)."
    )
    check_choice("bubbles", bubbles, get_args(Bubbles), error=ScheduleError)


def _check_mesh(mesh: Mesh) -> None:
    missing = [axis for axis in ("pipe", "data") if axis not in mesh.axis_names]
    if missing:
        raise MeshError(
            f"the mesh has axes {', '.join(mesh.axis_names)}, but a pipeline runs over pipe and data: "
            f"{' and '.join(missing)} is missing.",
            fix="make it with build_mesh(MeshSpec(...)); axes of size 1 cost nothing.",
        )
    others = [axis for axis, size in mesh.shape.items() if axis not in AXES and size > 1]
    if others:
        # shard_map would repeat all work along such an axis, and its transpose would sum the copies of a gradient.
        sizes = " ".join(f"{axis}={mesh.shape[axis]}" for axis in others)
        raise MeshError(
            f"the mesh has {sizes}, but a pipeline runs over pipe, data and tensor alone.",
            fix="call what splits the batch data: build_mesh(MeshSpec(data=...)).",
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise MeshError(
            f"the mesh has axis types {', '.join(str(kind) for kind in mesh.axis_types)}; a pipeline needs Auto.",
            fix="make it with build_mesh(MeshSpec(...)): jax.make_mesh gives Explicit axes unless told otherwise.",
        )


def check_context(mesh: Mesh) -> None:
    """Raise unless the context's mesh (`jax.set_mesh`) is unset or equal to this one.

    Raises:
        MeshError: they differ in axes or sizes, or the context's axes are not Auto.
    """
    context = jax.sharding.get_abstract_mesh()
    is_same = tuple(context.shape.items()) == tuple(mesh.shape.items())
    if context.empty or (is_same and all(kind == AxisType.Auto for kind in context.axis_types)):
        return
    axes = zip(context.shape.items(), context.axis_types, strict=True)
    found = " ".join(f"{axis}={size} ({kind})" for (axis, size), kind in axes)
    asked = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    raise MeshError(
        f"the pipeline's mesh is {asked}, all Auto, but it is called where the mesh of the context is {found}.",
        fix="call it outside of that jax.set_mesh() or shard_map, or inside jax.set_mesh(mesh) with the same mesh.",
    )


def _check_numbers(params: PipelineParams) -> None:
    """Raise for complex parameters: gradients are summed in float32, which would drop the imaginary part."""
    for name, leaf in check_arrays("params", params).items():
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ScheduleError(
                f"{name} is {leaf.dtype}, but gradients are summed in float32.",
                fix="give real and imaginary part as two arrays, and put them together in the layer.",
            )


def _check_stages(params: PipelineParams, schedule: Schedule) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params.stages)
    if not leaves:
        raise ScheduleError("params.stages is empty: a pipeline has layers.", fix="put every layer's parameters there.")
    num_layers = max((leaf.shape[2] for _, leaf in leaves if leaf.ndim > 2), default=0)
    want = (schedule.num_chunks, schedule.num_ranks, max(1, num_layers))
    for path, leaf in leaves:
        # XLA clamps an index past the end: of a leaf with fewer layers it would silently read the last one again.
        if leaf.shape[:3] != want:
            raise ScheduleError(
                f"stage parameter params.stages{jax.tree_util.keystr(path)} has shape {leaf.shape}, but schedule "
                f"{schedule.name!r} and the other parameters want leading dimensions [chunks, ranks, layers] = "
                f"{list(want)}.",
                fix="reshape [all layers, ...] to [chunks, ranks, layers, ...].",
            )


def _check_counts(fns: StageFns, params: PipelineParams, schedule: Schedule) -> None:
    """Raise unless every layer of the parameters runs, or is known to be padding."""
    counts, room = fns.layers_per_stage, jax.tree.leaves(params.stages)[0].shape[2]
    places = room * schedule.num_stages
    if counts is None:
        if fns.num_layers not in (None, places):
            raise ScheduleError(
                f"num_layers={fns.num_layers}, but the parameters are {places} layers: {schedule.num_stages} stages of "
                f"{room}.",
                fix="leave num_layers out, or say what each stage has: StageFns(layers_per_stage=...).",
            )
        return
    if len(counts) != schedule.num_stages or min(counts) < 1 or max(counts) != room:
        raise ScheduleError(
            f"layers_per_stage={list(counts)} does not fit {schedule.num_stages} stages whose parameters have room for "
            f"{room} layers each.",
            fix="give every stage 1 layer or more, and make the parameters with stages_from_layers().",
        )
    if fns.num_layers is None and sum(counts) != places:
        raise ScheduleError(
            f"layers_per_stage={list(counts)} runs {sum(counts)} layers of parameters with room for {places}: their "
            "shape does not tell an empty place from a layer that would never run.",
            fix="say how many layers the model has, StageFns(num_layers=...), and make the parameters with "
            "stages_from_layers().",
        )
    if fns.num_layers is not None:
        ranks, chunks = schedule.num_ranks, schedule.num_chunks
        check_layers(fns.num_layers, num_ranks=ranks, num_chunks=chunks, layers_per_stage=counts)


def _check_shared(specs: Any, shared: Any, *, num_ranks: int) -> None:
    leaves = check_arrays("params.shared", shared)
    own = jax.tree.leaves(spread_specs("shared_specs", specs, shared, of="params.shared"))
    for (name, leaf), spec in zip(leaves.items(), own, strict=True):
        axes = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
        if any(axis not in (None, "pipe") for entry in axes for axis in entry):
            raise ShardingError(
                f"shared_specs of {name} is {spec}: it says what lies on each rank, so it names pipe alone.",
                fix='leave other axes to the array\'s own sharding, which the compiler keeps: write P("pipe").',
            )
        if len(axes) > leaf.ndim:
            raise ShardingError(
                f"shared_specs of {name} is {spec}, but its shape is {leaf.shape}.",
                fix="name no more dimensions than it has.",
            )
        for dim, entry in enumerate(axes):
            if entry == ("pipe",):
                check_divides(
                    f"{name}.shape[{dim}]",
                    leaf.shape[dim],
                    over="pipe",
                    parts=num_ranks,
                    error=ShardingError,
                    fix=f"pad it to a multiple of {num_ranks}.",
                )
