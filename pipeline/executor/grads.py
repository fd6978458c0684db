"""Compute the loss and gradients of a pipelined model: the public functions of the executor.

`pipeline_grads` returns both at once. `pipeline_loss` is a differentiable function, for use under `jax.value_and_grad`.

    check arguments and functions -> trace region.py: shard_map over all axes of the mesh

Read `region.py` next.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from ...meshes import ScheduleError
from ...meshes.arguments import check_choice
from ...meshes.axes import DEFAULT_AXES, MeshAxes
from ...meshes.device_kind import GPUS, platform_of
from ...meshes.host_memory import check_host_memory
from ...meshes.switches import xla_flags
from ...schedules import Schedule
from ..lowering.tables import Offload
from ..model.stage import Aux, LossAndGrads, PipelineParams, StageFns
from .checks.arguments import check_arguments, check_context
from .checks.collectives import check_branches
from .checks.functions import FnFacts, check_fns
from .derivatives import (
    Tangents,
    check_first,
    check_second,
    has_tangent,
    tangent_of_loss,
    watch_derivatives,
)
from .loop_plan import Bubbles
from .loop_state import Wants
from .microbatches import Inputs
from .region import Region
from .split_weights.shard_squares import check_shard_squares
from .traced_function import ClosedOver, TracedFunction, trace_function

Overlap = Literal["auto", "on", "off"]
"""Whether the steady state of a schedule has a loop of its own, in which messages travel beside products."""

ShardSquares = Literal["off", "on"]
"""Whether the squared norms of the shards' own gradients are computed too."""

_LIMIT = "xla_gpu_experimental_parallel_collective_overlap_limit"
_STARTED_EARLY = "xla_gpu_experimental_collective_start_as_early_as_possible"


def compiler_options(
    mesh: Mesh | AbstractMesh, *, overlap: Overlap = "auto", axes: MeshAxes = DEFAULT_AXES
) -> dict[str, Any]:
    """Return options of `jax.jit` with which XLA puts the messages of a step beside its products.

    By default XLA has one collective on the way at a time, and starts it as late as its estimate of its time allows.
    Beside a layer's products there may be the next layer's weights and sums of gradients over data, in a pipeline also
    two permutes, sums over pipe and one over tensor. Empty on CPUs and without overlap; options in XLA_FLAGS are the
    user's.

    Args:
        axes: the roles of the mesh's axes, if their names are not the default ones.

    >>> step = jax.jit(step, compiler_options=compiler_options(mesh))

    Raises:
        ScheduleError: `overlap` is not one of the choices.
    """
    check_choice("overlap", overlap, get_args(Overlap), error=ScheduleError)
    if platform_of(mesh) not in GPUS or not _overlaps(mesh, overlap):
        return {}
    # Without a pipeline an early start delays what is needed sooner, such as tokens on the way to experts.
    is_piped = mesh.shape.get(axes.pipe, 1) > 1
    options: dict[str, Any] = {_LIMIT: 8, _STARTED_EARLY: True} if is_piped else {_LIMIT: 4}
    return {name: value for name, value in options.items() if name not in xla_flags()}


def _overlaps(mesh: Mesh | AbstractMesh, overlap: Overlap) -> bool:
    return overlap == "on" or (overlap == "auto" and platform_of(mesh) in GPUS)


def pipeline_grads(
    fns: StageFns,
    *,
    params: PipelineParams,
    batch: Any,
    mesh: Mesh,
    schedule: Schedule,
    state: Any = None,
    key: jax.Array | None = None,
    overlap: Overlap = "auto",
    offload: Offload = "none",
    bubbles: Bubbles = "zeros",
    shard_squares: ShardSquares = "off",
) -> LossAndGrads:
    """Return the loss of a batch and its gradients, computed in the order of a schedule.

    params.stages [chunks, ranks@pipe, layers, ...]; params.shared replicated over pipe, or as `fns.shared_specs` says;
    batch leaves [M, B@data, ...] of one B, or as `fns.batch_specs` says, and [M] whole on every data shard
    -> loss [], gradients in float32, sharded as the parameters; integers have zeros, frozen parameters None.

    Costs two neighbour permutes a tick and one gradient all-reduce over `data` a step; where `fns.shared_specs` split
    over pipe, four all-reduces of an activation over it a microbatch. With pipe=1 microbatches run one by one.

    Args:
        state: what layers are given as `info.state`, leaves [chunks, ranks@pipe, layers, ...]; without gradients.
        key: a random key, replicated, from which `info.keys()` makes one for each layer and sequence.
        offload: "residuals" copies those whose backward is far off to the memory of the host, and back in time.
        overlap: "on" runs the steady state in a loop of its own, with messages beside products, and keeps one more
            microbatch; "auto" does so on GPUs.
        bubbles: "nan" fills unused buffers and idle sends with NaN, to prove that nothing leaks.
        shard_squares: "on" also returns the squared norms of the shards' own gradients (`shard_squares.py`).

    Raises:
        ScheduleError: mesh, schedule, parameters and batch disagree on ranks, chunks or microbatches.
        ShardingError, MeshError: the batch does not split over `data`; an axis is missing or unknown.
    """
    _check_asked(fns, mesh, offload=offload, shard_squares=shard_squares)
    inputs = Inputs(batch=batch, state=state, key=key)
    call = _check(fns, params, inputs, mesh=mesh, schedule=schedule, overlap=overlap, bubbles=bubbles)
    return _run_grads(call, params, inputs, offload=offload, shard_squares=shard_squares)


def _run_grads(
    call: "_Call", params: PipelineParams, inputs: Inputs, *, offload: Offload, shard_squares: ShardSquares
) -> LossAndGrads:
    traced = _trace(call, params, inputs, wants="grads", offload=offload, wants_squares=shard_squares == "on")
    given = watch_derivatives((params, inputs, traced.closed_over), check=call.check_second)
    out = traced.run(*given)
    own = {"metrics": out.metrics, "stats": out.stats, "shard_squares": out.shard_squares}
    return LossAndGrads(loss=out.loss, grads=out.grads, **own)


def pipeline_loss(
    fns: StageFns,
    *,
    params: PipelineParams,
    batch: Any,
    mesh: Mesh,
    schedule: Schedule,
    state: Any = None,
    key: jax.Array | None = None,
    has_aux: bool = False,
    overlap: Overlap = "auto",
    bubbles: Bubbles = "zeros",
) -> Any:
    """Return the loss of a batch, float32 [], by the forwards of a schedule; with `has_aux` also an `Aux`.

    It is differentiable in `params` and in floating-point leaves of `batch`: under `jax.grad` or `jax.jvp` it runs the
    whole schedule once. `jax.grad` gives gradients in the dtype of what it differentiates. Shapes, costs and errors are
    those of `pipeline_grads`.

    >>> step = jax.value_and_grad(lambda params: pipeline_loss(..., params=params, has_aux=True), has_aux=True)
    >>> (loss, aux), grads = step(params)

    Raises:
        ScheduleError: also for a derivative with respect to an array that a function closes over.
    """
    inputs = Inputs(batch=batch, state=state, key=key)
    call = _check(fns, params, inputs, mesh=mesh, schedule=schedule, overlap=overlap, bubbles=bubbles)
    traced = _trace(call, params, inputs, wants="loss")

    # A rule of our own: jax's would differentiate the loop over turns, and keep the residuals of every turn.
    @jax.custom_jvp
    def loss_of(params: PipelineParams, inputs: Inputs, closed_over: ClosedOver) -> tuple[jax.Array, Aux]:
        out = traced.run(params, inputs, closed_over)
        return out.loss, Aux(metrics=out.metrics, stats=out.stats)

    loss_of.defjvp(partial(_differentiate, call), symbolic_zeros=True)
    loss, aux = loss_of(params, inputs, traced.closed_over)
    return (loss, aux) if has_aux else loss


def _differentiate(call: "_Call", primals: Any, tangents: Tangents) -> tuple[Any, Any]:
    """Return (loss, aux) and their tangents; the schedule computes the gradients, of the batch only where asked for."""
    check_first(tangents, owners=call.facts.owners)
    given = watch_derivatives(primals, check=call.check_second)
    # Gradients of the batch take a buffer as large as the batch, so they are computed only where they are asked for.
    wants_batch = has_tangent(tangents[1].batch)
    out = _trace(call, *given[:2], wants="grads", wants_batch=wants_batch).run(*given)
    tangent = tangent_of_loss(tangents[0], out.grads)
    if wants_batch:
        tangent += tangent_of_loss(tangents[1].batch, out.batch_grads)
    aux = Aux(metrics=out.metrics, stats=out.stats)
    return (out.loss, aux), (tangent, jax.tree.map(jnp.zeros_like, aux))


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The checked arguments of one call, and what tracing says about its functions."""

    fns: StageFns
    facts: FnFacts
    mesh: Mesh
    schedule: Schedule
    overlap: Overlap
    bubbles: Bubbles

    def check_second(self, tangents: Tangents) -> None:
        check_second(tangents, owners=self.facts.owners, fns=self.fns, schedule=self.schedule)


def _check(
    fns: StageFns,
    params: PipelineParams,
    inputs: Inputs,
    *,
    mesh: Mesh,
    schedule: Schedule,
    overlap: Overlap,
    bubbles: Bubbles,
) -> _Call:
    check_choice("overlap", overlap, get_args(Overlap), error=ScheduleError)
    check_arguments(fns, params, inputs, mesh=mesh, schedule=schedule, bubbles=bubbles)
    check_context(mesh)
    facts = check_fns(fns, params, inputs, mesh=mesh)
    return _Call(fns=fns, facts=facts, mesh=mesh, schedule=schedule, overlap=overlap, bubbles=bubbles)


def _check_asked(fns: StageFns, mesh: Mesh, *, offload: Offload, shard_squares: ShardSquares) -> None:
    check_choice("offload", offload, get_args(Offload), error=ScheduleError)
    check_choice("shard_squares", shard_squares, get_args(ShardSquares), error=ScheduleError)
    if shard_squares == "on":
        check_shard_squares(fns, mesh)
    if offload == "none":
        return
    if mesh.shape.get(fns.axes.pipe, 1) == 1:
        raise ScheduleError(
            f"offload='residuals' on a mesh with {fns.axes.pipe}=1: each backward follows its forward at once, and no "
            "residuals wait for it.",
            fix="leave offload out, or use two or more pipeline ranks.",
        )
    check_host_memory(mesh, asked="offload='residuals'")


def _trace(
    call: _Call,
    params: PipelineParams,
    inputs: Inputs,
    *,
    wants: Wants,
    wants_batch: bool = False,
    wants_squares: bool = False,
    offload: Offload = "none",
) -> TracedFunction:
    region = Region(
        fns=call.fns,
        mesh=call.mesh,
        schedule=call.schedule,
        bubbles=call.bubbles,
        overlap=_overlaps(call.mesh, call.overlap),
        wants=wants,
        wants_batch=wants_batch,
        wants_squares=wants_squares,
        offload=offload,
    )
    traced = trace_function(region, params, inputs)
    check_branches(traced.jaxpr.jaxpr)
    return traced
