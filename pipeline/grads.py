"""Loss and gradients of a pipelined model, for `jax.jit`: the door to the executor.

`pipeline_grads` returns both at once; `pipeline_loss` is an ordinary differentiable function for those who write
`jax.value_and_grad` themselves. Read `execute.py` next.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from .check import check_arguments
from .check_fns import check_fns
from .ends import Wants
from .execute import Bubbles, run_turns
from .lower import lower
from .schedules import Kind, Schedule
from .sequential import run_sequence
from .stage import LossAndGrads, PipelineParams, StageFns


def pipeline_grads(
    fns: StageFns,
    *,
    params: PipelineParams,
    batch: Any,
    mesh: Mesh,
    schedule: Schedule,
    bubbles: Bubbles = "zeros",
) -> LossAndGrads:
    """Return the loss of a batch and its gradients, computed as the schedule says.

    params.stages [chunks, ranks@pipe, layers, ...], params.shared as `fns.shared_specs` says, or replicated over pipe,
    batch leaves [M, B@data, ...] -> loss [], gradients float32 and sharded as the parameters; those of whole numbers
    are zeros of their own type.

    Costs two neighbour permutes a tick and one gradient all-reduce over `data` a step, and with ends run together four
    all-reduces of an activation over `pipe` a microbatch. With a pipe axis of 1 the
    microbatches run one after another and the schedule only gives their number.

    Args:
        bubbles: "nan" fills unused buffers and idle sends with NaN, to prove that nothing leaks.

    Raises:
        ScheduleError: mesh, schedule, parameters and batch disagree on ranks, chunks or microbatches.
        ShardingError: the batch does not split over `data`.
    """
    check_arguments(fns, params, batch, mesh=mesh, schedule=schedule)
    how = _How(fns=fns, mesh=mesh, schedule=schedule, bubbles=bubbles)
    loss, grads = _run(how, params, batch, wants="grads")
    return LossAndGrads(loss=loss, grads=grads)


def pipeline_loss(
    fns: StageFns, *, params: PipelineParams, batch: Any, mesh: Mesh, schedule: Schedule, bubbles: Bubbles = "zeros"
) -> jax.Array:
    """Return the loss of a batch, a float32 scalar, running only the schedule's forwards.

    Differentiable in `params` (not in `batch`): under `jax.grad` it runs the whole schedule once, and gradients come
    in the parameters' dtype. Shapes, costs and errors are those of `pipeline_grads`.
    """
    check_arguments(fns, params, batch, mesh=mesh, schedule=schedule)
    how = _How(fns=fns, mesh=mesh, schedule=schedule, bubbles=bubbles)

    @jax.custom_vjp
    def loss_of(params: PipelineParams, batch: Any) -> jax.Array:
        return _run(how, params, batch, wants="loss")[0]

    def forward(params: PipelineParams, batch: Any) -> tuple[jax.Array, tuple[PipelineParams, Any]]:
        loss, grads = _run(how, params, batch, wants="grads")
        return loss, (jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), batch)

    def backward(saved: tuple[PipelineParams, Any], grad: jax.Array) -> tuple[PipelineParams, Any]:
        grads, batch = saved
        return jax.tree.map(lambda g: g * grad.astype(g.dtype), grads), jax.tree.map(_zero_cotangent, batch)

    loss_of.defvjp(forward, backward)
    return loss_of(params, batch)


@dataclass(frozen=True, kw_only=True)
class _How:
    fns: StageFns
    mesh: Mesh
    schedule: Schedule
    bubbles: Bubbles


def _run(how: _How, params: PipelineParams, batch: Any, *, wants: Wants) -> tuple[jax.Array, Any]:
    fns, mesh, schedule = how.fns, how.mesh, how.schedule
    is_pipelined = schedule.num_ranks > 1
    # XLA fails to compile a sum over a manual axis of size 1 ("IsManualSubgroup"): such axes appear in no spec or sum.
    # They are manual all the same: with two axes left to the compiler jax does not lower a debug.callback.
    axes = tuple(axis for axis in ("pipe", "data") if mesh.shape[axis] > 1)
    tables = None
    is_together = is_pipelined and fns.shared_specs is not None
    if is_pipelined:
        kinds: tuple[Kind, ...] = ("F", "B", "I", "W") if wants == "grads" else ("F",)
        tables = lower(schedule, kinds=kinds, ends="together" if is_together else "alone")

    def region(params: PipelineParams, batch: Any) -> tuple[jax.Array, Any]:
        params = _own(params)
        check_fns(fns, params, batch)
        if tables is None:
            loss, grads = run_sequence(fns, params, batch, wants=wants)
        else:
            loss, grads = run_turns(fns, params, batch, tables=tables, bubbles=how.bubbles, wants=wants)
        # Ends that ran together have summed over the ranks what had to be.
        shared_axes = tuple(axis for axis in axes if axis == "data") if is_together else axes
        return _sum(loss, axes), None if grads is None else _sum_grads(grads, axes, shared_axes)

    stages = P(None, "pipe" if is_pipelined else None)
    split = PipelineParams(stages=stages, shared=fns.shared_specs if is_together else P())
    return jax.shard_map(
        region,
        mesh=mesh,
        in_specs=(split, P(None, "data" if "data" in axes else None)),
        out_specs=(P(), split if wants == "grads" else P()),
        axis_names={"pipe", "data"},
    )(params, batch)


def _own(params: PipelineParams) -> PipelineParams:
    """Drop the rank dimension, of which this rank holds one entry."""
    return PipelineParams(stages=jax.tree.map(lambda leaf: leaf[:, 0], params.stages), shared=params.shared)


def _sum_grads(grads: PipelineParams, axes: tuple[str, ...], shared_axes: tuple[str, ...]) -> PipelineParams:
    """Sum over the data shards, and what every rank holds whole over the ranks too: once a step."""
    stages = _sum(grads.stages, tuple(axis for axis in axes if axis == "data"))
    return PipelineParams(stages=jax.tree.map(lambda g: g[:, None], stages), shared=_sum(grads.shared, shared_axes))


def _sum(tree: Any, axes: tuple[str, ...]) -> Any:
    """Sum over axes; the zeros that whole numbers have for a gradient are the same everywhere."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    floats = [leaf for leaf, is_its in zip(leaves, is_float, strict=True) if is_its]
    sums = iter(jax.lax.psum(floats, axes) if axes else floats)
    return jax.tree.unflatten(
        structure, [next(sums) if is_its else leaf for leaf, is_its in zip(leaves, is_float, strict=True)]
    )


def _zero_cotangent(leaf: Any) -> Any:
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if is_float else np.zeros(leaf.shape, jax.dtypes.float0)
