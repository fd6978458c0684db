"""Compute the loss and gradients of a pipelined model: the public functions of the executor.

`pipeline_grads` returns both at once. `pipeline_loss` is a differentiable function, for use under `jax.value_and_grad`.

    check arguments and functions -> trace -> shard_map(region) over pipe and data
                                                region:  run_turns, or run_sequence with one rank
                                                         sum gradients over data, once

Read `lower.py` next, then `execute.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...meshes.ring import check_ring
from ..model.stage import LossAndGrads, PipelineParams, StageFns
from ..schedules import Kind, Schedule
from .batch import batch_specs
from .bind_axes import bind_axes, mark_results
from .checks.arguments import check_arguments, check_context
from .checks.collectives import check_branches
from .checks.functions import FnFacts, check_fns
from .checks.user_errors import explain_errors
from .derivatives import Tangents, check_first, check_second, tangent_of_loss, watch_derivatives
from .execute import run_turns
from .loop_plan import Bubbles
from .loop_state import Wants
from .lower import lower
from .prepare import check_prepare
from .sequential import run_sequence
from .traced_function import ClosedOver, TracedFunction, trace_function


def pipeline_grads(
    fns: StageFns,
    *,
    params: PipelineParams,
    batch: Any,
    mesh: Mesh,
    schedule: Schedule,
    bubbles: Bubbles = "zeros",
) -> LossAndGrads:
    """Return the loss of a batch and its gradients, computed in the order of a schedule.

    params.stages [chunks, ranks@pipe, layers, ...]; params.shared replicated over pipe, or as `fns.shared_specs` says;
    batch leaves [M, B@data, ...] of one B, or as `fns.batch_specs` says, and [M] whole on every data shard
    -> loss [], gradients in float32, sharded as the parameters; those of integers are zeros of their own dtype.

    Costs two neighbour permutes a tick and one gradient all-reduce over `data` a step. With `fns.shared_specs`, also
    four all-reduces of an activation over `pipe` a microbatch. With pipe=1 microbatches run one after another, and the
    schedule gives only their number.

    Args:
        bubbles: "nan" fills unused buffers and idle sends with NaN, to prove that nothing leaks.

    Raises:
        ScheduleError: mesh, schedule, parameters and batch disagree on ranks, chunks or microbatches.
        ShardingError: the batch does not split over `data`, or its leaves disagree on B.
        MeshError: the mesh lacks an axis, or has an unknown one.
    """
    call = _check(fns, params, batch, mesh=mesh, schedule=schedule, bubbles=bubbles)
    traced = _trace(call, params, batch, wants="grads")
    given = watch_derivatives((params, batch, traced.closed_over), check=call.check_second)
    loss, grads = traced.run(*given)
    return LossAndGrads(loss=loss, grads=grads)


def pipeline_loss(
    fns: StageFns, *, params: PipelineParams, batch: Any, mesh: Mesh, schedule: Schedule, bubbles: Bubbles = "zeros"
) -> jax.Array:
    """Return the loss of a batch, float32 [], by the forwards of a schedule.

    It is differentiable in `params`: under `jax.grad` or `jax.jvp` it runs the whole schedule once. `jax.grad` gives
    gradients in the parameters' dtype. Shapes, costs and errors are those of `pipeline_grads`.

    Raises:
        ScheduleError: also for a derivative with respect to the batch, or to an array that a function closes over.
    """
    call = _check(fns, params, batch, mesh=mesh, schedule=schedule, bubbles=bubbles)
    traced = _trace(call, params, batch, wants="loss")

    @jax.custom_jvp
    def loss_of(params: PipelineParams, batch: Any, closed_over: ClosedOver) -> jax.Array:
        return traced.run(params, batch, closed_over)[0]

    def rule(primals: Any, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
        check_first(tangents, owners=call.facts.owners)
        given = watch_derivatives(primals, check=call.check_second)
        loss, grads = _trace(call, *given[:2], wants="grads").run(*given)
        return loss, tangent_of_loss(tangents[0], grads)

    loss_of.defjvp(rule, symbolic_zeros=True)
    return loss_of(params, batch, traced.closed_over)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The checked arguments of one call, and what tracing says about its functions."""

    fns: StageFns
    facts: FnFacts
    mesh: Mesh
    schedule: Schedule
    bubbles: Bubbles

    def check_second(self, tangents: Tangents) -> None:
        check_second(tangents, owners=self.facts.owners, fns=self.fns, schedule=self.schedule)


def _check(
    fns: StageFns, params: PipelineParams, batch: Any, *, mesh: Mesh, schedule: Schedule, bubbles: Bubbles
) -> _Call:
    check_arguments(fns, params, batch, mesh=mesh, schedule=schedule, bubbles=bubbles)
    check_context(mesh)
    if schedule.num_chunks > 1:
        check_ring(mesh, what=f"schedule {schedule.name!r}")
    facts = check_fns(fns, params, batch, mesh=mesh)
    return _Call(fns=fns, facts=facts, mesh=mesh, schedule=schedule, bubbles=bubbles)


def _trace(call: _Call, params: PipelineParams, batch: Any, *, wants: Wants) -> TracedFunction:
    run = partial(_run, call, wants=wants)
    try:
        traced = trace_function(partial(run, named=call.facts.axes), params, batch)
    except NameError:
        # A function that marks arrays as varying names axes, and its trace cannot be told from jax's own marks. Trace
        # again with both axes bound.
        with explain_errors("the gradient of a function", call.mesh):
            traced = trace_function(partial(run, named=frozenset(("pipe", "data"))), params, batch)
    check_branches(traced.jaxpr.jaxpr)
    return traced


def _run(
    call: _Call, params: PipelineParams, batch: Any, *, wants: Wants, named: frozenset[str]
) -> tuple[jax.Array, Any]:
    fns, mesh, schedule = call.fns, call.mesh, call.schedule
    is_pipelined = schedule.num_ranks > 1
    # Manual are pipe and data; tensor is left to the compiler, which splits layers along it by their rules.
    # Axes of size 1 appear in no spec and no sum, unless a function names them and another axis is larger.
    has_devices = mesh.shape["pipe"] * mesh.shape["data"] > 1
    axes = tuple(axis for axis in ("pipe", "data") if mesh.shape[axis] > 1 or (has_devices and axis in named))
    # On a single device `vmap` binds the names instead, see bind_axes.py.
    fns = mark_results(bind_axes(fns, () if has_devices else tuple(sorted(named))))
    tables = None
    is_together = is_pipelined and fns.shared_specs is not None
    if is_pipelined:
        kinds: tuple[Kind, ...] = ("F", "B", "I", "W") if wants == "grads" else ("F",)
        tables = lower(schedule, kinds=kinds, ends="together" if is_together else "alone")

    def region(params: PipelineParams, batch: Any) -> tuple[jax.Array, Any]:
        params = _drop_rank_dim(params)
        check_prepare(fns, params.stages)
        if tables is None:
            loss, grads = run_sequence(fns, params, batch, wants=wants)
        else:
            loss, grads = run_turns(fns, params, batch, tables=tables, bubbles=call.bubbles, wants=wants)
        # Where the ends ran together, their gradients are summed over pipe already.
        shared_axes = tuple(axis for axis in axes if axis == "data") if is_together else axes
        return _sum(loss, axes), None if grads is None else _sum_grads(grads, axes, shared_axes)

    stages = P(None, "pipe" if "pipe" in axes else None)
    split = PipelineParams(stages=stages, shared=fns.shared_specs if is_together else P())
    return jax.shard_map(
        region,
        mesh=mesh,
        in_specs=(split, batch_specs(fns, batch) if "data" in axes else P()),
        out_specs=(P(), split if wants == "grads" else P()),
        # Not an empty set, which would make all axes manual, tensor too.
        axis_names=set(axes or named) or {"data"},
        # Names bound by `vmap` are unknown to the types that this checks.
        check_vma=has_devices or not named,
    )(params, batch)


def _drop_rank_dim(params: PipelineParams) -> PipelineParams:
    """Drop the rank dimension: [C, 1, k, ...] -> [C, k, ...]."""
    return PipelineParams(stages=jax.tree.map(lambda leaf: leaf[:, 0], params.stages), shared=params.shared)


def _sum_grads(grads: PipelineParams, axes: tuple[str, ...], shared_axes: tuple[str, ...]) -> PipelineParams:
    """Sum gradients over the data shards, and those of shared parameters over `shared_axes`: once a step."""
    stages = _sum(grads.stages, tuple(axis for axis in axes if axis == "data"))
    return PipelineParams(stages=jax.tree.map(lambda g: g[:, None], stages), shared=_sum(grads.shared, shared_axes))


def _sum(tree: Any, axes: tuple[str, ...]) -> Any:
    """Sum over axes in one all-reduce. Gradients of integers are zeros on every device and stay as they are."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    floats = [leaf for leaf, is_its in zip(leaves, is_float, strict=True) if is_its]
    sums = iter(jax.lax.psum(floats, axes) if axes else floats)
    return jax.tree.unflatten(
        structure, [next(sums) if is_its else leaf for leaf, is_its in zip(leaves, is_float, strict=True)]
    )
