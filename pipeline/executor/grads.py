"""Compute the loss and gradients of a pipelined model: the public functions of the executor.

`pipeline_grads` returns both at once. `pipeline_loss` is a differentiable function, for use under `jax.value_and_grad`.

    check arguments and functions -> trace region.py: shard_map over all axes of the mesh

Read `region.py` next.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from ...meshes.ring import check_ring
from ..model.stage import LossAndGrads, PipelineParams, StageFns
from ..schedules import Schedule
from .checks.arguments import check_arguments, check_context
from .checks.collectives import check_branches
from .checks.functions import FnFacts, check_fns
from .derivatives import Tangents, check_first, check_second, tangent_of_loss, watch_derivatives
from .loop_plan import Bubbles
from .loop_state import Wants
from .region import Region
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

    Costs two neighbour permutes a tick and one gradient all-reduce over `data` a step. Where `fns.shared_specs` split
    over pipe, also four all-reduces of an activation over it a microbatch. With pipe=1 microbatches run one after
    another, and the schedule gives only their number.

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
    region = Region(fns=call.fns, mesh=call.mesh, schedule=call.schedule, bubbles=call.bubbles, wants=wants)
    traced = trace_function(region, params, batch)
    check_branches(traced.jaxpr.jaxpr)
    return traced
