"""Check the arguments of a pipeline against each other, from their types and shapes, before anything runs.

Read `functions.py` next: it checks the functions, by tracing them.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from ....meshes import MeshError, ScheduleError, ShardingError
from ....meshes.arguments import check_choice, check_instance
from ....meshes.axes import MeshAxes
from ....meshes.divisibility import check_divides
from ....meshes.errors import suggest
from ....meshes.ring import check_ring
from ....meshes.switches import check_switches
from ....schedules import Placement, Schedule
from ...model.pattern import stage_pattern
from ...model.stack import check_layers
from ...model.stage import PipelineParams, StageFns
from ...model.trees import check_arrays, kept_axes, mesh_axes_of, spread_specs
from ..batch import check_batch
from ..loop_plan import Bubbles
from ..microbatches import Inputs


def check_arguments(
    fns: StageFns, params: PipelineParams, inputs: Inputs, *, mesh: Mesh, schedule: Schedule, bubbles: Bubbles
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
    _check_mesh(mesh, fns.axes)
    pipe, num_ranks = fns.axes.pipe, mesh.shape[fns.axes.pipe]
    if schedule.num_ranks != num_ranks:
        raise ScheduleError(
            f"schedule {schedule.name!r} is for {schedule.num_ranks} ranks, but the mesh has {pipe}={num_ranks}.",
            fix=f"build it with num_ranks={num_ranks}.",
        )
    _check_placement(fns, schedule)
    _check_numbers(params)
    rooms = _check_stages(fns, params, schedule)
    _check_state(fns, inputs.state, rooms, schedule)
    _check_key(inputs.key)
    if fns.pattern is None:
        _check_counts(fns, params, schedule)
    _check_specs(fns, mesh, params.stages, name="stage_specs")
    _check_specs(fns, mesh, params.shared, name="shared_specs")
    if schedule.placement.has_ring:
        check_ring(mesh, what=f"schedule {schedule.name!r}", pipe=pipe)
    check_batch(fns, inputs.batch, num_microbatches=schedule.num_microbatches, sizes=mesh.shape)


def _check_placement(fns: StageFns, schedule: Schedule) -> None:
    """Raise unless parameters were cut by the schedule's placement: else layers would run in another order."""
    given, own = fns.placement, schedule.placement
    if Placement.resolve(given, num_ranks=own.num_ranks, num_chunks=own.num_chunks) != own:
        shown = given.ranks if isinstance(given, Placement) else repr(given)
        raise ScheduleError(
            f"schedule {schedule.name!r} places its stages on ranks {list(own.ranks)}, but the model was cut by "
            f"placement={shown}: layers would run in another order.",
            fix="give placement=schedule.placement to StageFns and stages_from_layers(), or to split_transformer().",
        )


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


def _check_mesh(mesh: Mesh, axes: MeshAxes) -> None:
    needed = (axes.pipe, *axes.summed)
    missing = [axis for axis in needed if axis not in mesh.axis_names]
    if missing:
        raise MeshError(
            f"the mesh has axes {', '.join(mesh.axis_names)}, but a pipeline runs over {' and '.join(needed)}: "
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing.",
            fix="make it with build_mesh(MeshSpec(...)), where axes of size 1 cost nothing, or say what your axes are "
            'for: StageFns(axes=MeshAxes.of(pp="pipe", dp="batch")).',
        )
    others = [axis for axis, size in mesh.shape.items() if axis not in axes.names and size > 1]
    if others:
        # All work would be repeated along such an axis.
        sizes = " ".join(f"{axis}={mesh.shape[axis]}" for axis in others)
        raise MeshError(
            f"the mesh has {sizes}, but the axes with a role are {', '.join(axes.names)}."
            f"{suggest(others[0], axes.names)}",
            fix=f'say what it is for: StageFns(axes=MeshAxes.of(..., {others[0]}="batch")).',
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


def _check_stages(fns: StageFns, params: PipelineParams, schedule: Schedule) -> dict[str, int]:
    """Return the number of layers of each kind that stages have room for, which every stage parameter has."""
    leaves = jax.tree_util.tree_leaves_with_path(params.stages)
    if not leaves:
        raise ScheduleError("params.stages is empty: a pipeline has layers.", fix="put every layer's parameters there.")
    rooms = _rooms(fns, params, schedule)
    for path, leaf in leaves:
        # XLA clamps an index past the end: of a leaf with fewer layers it would silently read the last one again.
        want = (schedule.num_chunks, schedule.num_ranks, rooms[getattr(path[0], "key", "") if fns.pattern else ""])
        if leaf.shape[:3] != want:
            raise ScheduleError(
                f"stage parameter params.stages{jax.tree_util.keystr(path)} has shape {leaf.shape}, but schedule "
                f"{schedule.name!r} and the other parameters want leading dimensions [chunks, ranks, layers] = "
                f"{list(want)}.",
                fix="reshape [all layers, ...] to [chunks, ranks, layers, ...].",
            )
    return rooms


def _check_state(fns: StageFns, state: Any, rooms: dict[str, int], schedule: Schedule) -> None:
    if state is None:
        return
    if fns.pattern is not None and (not isinstance(state, Mapping) or set(state) != set(rooms)):
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ScheduleError(
            f"state is {found}, but layer has the kinds {sorted(rooms)}.",
            fix="give a dict of the state of each kind, and None for a kind that has none.",
        )
    for kind, own in fns.by_kind(state).items():
        want = [schedule.num_chunks, schedule.num_ranks, rooms[kind]]
        for name, leaf in check_arrays(f"state[{kind!r}]" if kind else "state", own).items():
            if list(leaf.shape[:3]) != want:
                raise ScheduleError(
                    f"{name} has shape {leaf.shape}, but state has the leading dimensions of stage parameters, "
                    f"[chunks, ranks, layers] = {want}.",
                    fix="cut it as they are: stages_from_layers(state, num_ranks=...).",
                )


def _check_key(key: Any) -> None:
    if key is None:
        return
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError) as error:
        what = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array | np.ndarray) else repr(key)
        raise ScheduleError(
            f"key={what} is not one random key.", fix="give key=jax.random.key(step), another one each step."
        ) from error


def _rooms(fns: StageFns, params: PipelineParams, schedule: Schedule) -> dict[str, int]:
    """Return the number of layers of each kind that stages have room for."""
    if fns.pattern is None:
        leaves = jax.tree.leaves(params.stages)
        return {"": max(1, *(leaf.shape[2] if leaf.ndim > 2 else 0 for leaf in leaves))}
    kinds = list(fns.by_kind(fns.layer))
    found = list(params.stages) if isinstance(params.stages, Mapping) else type(params.stages).__name__
    if found != kinds and sorted(found) != sorted(kinds):
        raise ScheduleError(
            f"params.stages is {found}, but layer has the kinds {kinds}.",
            fix="make them with stages_from_layers({kind: [layers of the kind, ...]}, pattern=...).",
        )
    for kind in kinds:
        if not jax.tree.leaves(params.stages[kind]):
            raise ScheduleError(
                f"params.stages[{kind!r}] has no arrays; a kind has one at least, by which its layers are counted.",
                fix='give it an array that its function does not read: {"unused": jnp.zeros(num_layers)} before '
                "stages_from_layers().",
            )
    chunks, ranks = schedule.num_chunks, schedule.num_ranks
    counts = check_layers(
        fns.num_layers or 0, num_ranks=ranks, num_chunks=chunks, layers_per_stage=fns.layers_per_stage
    )
    pattern = stage_pattern(fns.pattern, kinds=kinds, counts=counts)
    return {kind: max(1, *pattern.counts_of(kind)) for kind in kinds}


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


def _check_specs(fns: StageFns, mesh: Mesh, tree: Any, *, name: Literal["stage_specs", "shared_specs"]) -> None:
    """Raise unless specs fit the leaves of a tree, and split them evenly over axes that parameters may be split over.

    Specs of stages are those of one layer: they leave out [chunks, ranks, layers], the first three dimensions.
    """
    of, lead = ("params.stages", 3) if name == "stage_specs" else ("params.shared", 0)
    own = (fns.axes.pipe,) if lead else ()
    allowed = [axis for axis in fns.axes.names if axis not in own]
    leaves = check_arrays(of, tree)
    specs = spread_specs(name, getattr(fns, name), tree, of=of)
    for (leaf_name, leaf), spec in zip(leaves.items(), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True):
        named = mesh_axes_of(spec)
        if wrong := [axis for axis in named if axis not in allowed]:
            near = "" if wrong[0] in fns.axes.names else suggest(str(wrong[0]), allowed)
            raise ShardingError(
                f"{name} of {leaf_name} is {spec}; it may name {' and '.join(allowed)}"
                f"{f', since stages are split over {fns.axes.pipe} anyhow' if own and own[0] in wrong else ''}.{near}",
                fix=f"name one of these, {P(None, allowed[-1])} say, or P() for whole." if allowed else "write P().",
            )
        if twice := [axis for place, axis in enumerate(named) if axis in named[:place]]:
            raise ShardingError(
                f"{name} of {leaf_name} is {spec}, which names {twice[0]} twice; an axis splits one dimension.",
                fix=f"leave one {twice[0]} out.",
            )
        _check_gathered(f"{name} of {leaf_name}", spec, fns.axes)
        if len(spec) > leaf.ndim - lead:
            raise ShardingError(
                f"{name} of {leaf_name} is {spec}, but its shape is {leaf.shape}"
                f"{', of which the first three are chunks, ranks and layers' if lead else ''}.",
                fix="name no more dimensions than it has.",
            )
        for dim, entry in enumerate(spec, start=lead):
            parts = math.prod(mesh.shape.get(axis, 1) for axis in mesh_axes_of(P(entry)))
            words = {"over": " x ".join(mesh_axes_of(P(entry))), "fix": f"pad it to a multiple of {parts}."}
            check_divides(f"{leaf_name}.shape[{dim}]", leaf.shape[dim], parts=parts, error=ShardingError, **words)


def _check_gathered(name: str, spec: P, axes: MeshAxes) -> None:
    """Raise unless batch axes split one dimension, and no other axis splits it too: that is gathered over them."""
    split = [entry for entry in spec if kept_axes(entry, axes)]
    if len(split) > 1 or (split and kept_axes(split[0], axes) != mesh_axes_of(P(split[0]))):
        raise ShardingError(
            f"{name} is {spec}: batch axes keep one dimension of a parameter split, by themselves, to be gathered.",
            fix=f"name them in one dimension alone, {P(axes.batch[0], None)} say.",
        )


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)
