"""The part of a pipelined step that runs on each device, and how parameters and batch are cut for it.

    params.stages [C, ranks@pipe, k, D@own axes, ...]  --cut-->  [C, k, d, ...] of this device
                                                                  run_turns, or run_sequence with one rank
    gradients      [C, ranks@pipe, k, D@own axes, ...] <--join--  summed over the batch axes, once, in one all-reduce

Every mesh axis is manual here: each device sees its own blocks, and nothing is sent that the code does not name. Axes
of size 1 are bound too, so that a function may name them, but no array is cut or marked along them, which would cost a
sum over a single device. Read `execute.py` next.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..model.stage import PipelineParams, StageFns
from ..model.trees import on_mesh
from ..schedules import Kind, Schedule
from .batch import batch_specs
from .buffers import vary
from .execute import run_turns
from .loop_plan import Bubbles
from .loop_state import Wants
from .lower import lower
from .param_specs import param_specs
from .prepare import check_prepare
from .sequential import run_sequence


@dataclass(frozen=True, kw_only=True)
class Region:
    """A pipelined computation on a mesh: a function of (params, batch) to (loss, gradients or None)."""

    fns: StageFns
    mesh: Mesh
    schedule: Schedule
    bubbles: Bubbles
    wants: Wants

    def __call__(self, params: PipelineParams, batch: Any) -> tuple[jax.Array, Any]:
        """Run on the whole arrays: params.stages [C, ranks@pipe, k, ...], batch leaves [M, B@data, ...]."""
        specs = param_specs(self.fns, params, self.mesh)
        return jax.shard_map(
            self._run,
            mesh=self.mesh,
            in_specs=(specs, on_mesh(batch_specs(self.fns, batch), self.mesh)),
            out_specs=(P(), specs if self.wants == "grads" else P()),
        )(params, batch)

    def _run(self, params: PipelineParams, batch: Any) -> tuple[jax.Array, Any]:
        axes = self.fns.axes
        pipe, spread = self._split_axes((axes.pipe,)), self._split_axes(axes.batch)
        fns = _mark_results(self.fns, pipe, spread, self.mesh)
        params = _drop_rank_dim(params)
        check_prepare(fns, params.stages, (*pipe, *spread))
        if not pipe:
            loss, grads = run_sequence(fns, params, batch, wants=self.wants, axes=spread)
        else:
            kinds: tuple[Kind, ...] = ("F", "B", "I", "W") if self.wants == "grads" else ("F",)
            tables = lower(self.schedule, kinds=kinds, ends="together" if fns.ends_together else "alone")
            loss, grads = run_turns(
                fns, params, batch, tables=tables, bubbles=self.bubbles, wants=self.wants, axes=(*pipe, *spread)
            )
        # Where the ends ran together, their gradients are summed over pipe already.
        shared_axes = spread if fns.ends_together else (*pipe, *spread)
        return _sum(loss, (*pipe, *spread)), None if grads is None else _sum_grads(grads, spread, shared_axes)

    def _split_axes(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.mesh.shape.get(axis, 1) > 1)


def _mark_results(fns: StageFns, pipe: tuple[str, ...], spread: tuple[str, ...], mesh: Mesh) -> StageFns:
    """Return the functions with results marked as varying over the devices that have copies of them.

    A result that a function has summed over data is counted once by every data shard. Only when it is marked as varying
    is its gradient counted the same way. Marks over axes of size 1, which only a function itself can make, go.
    """
    ends = spread if fns.ends_together else (*pipe, *spread)
    trivial = frozenset(axis for axis, size in mesh.shape.items() if size == 1)

    def mark(fn: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
        def one(leaf: jax.Array) -> jax.Array:
            alone = tuple(trivial & jax.typeof(leaf).mat.varying)
            return vary(jax.lax.psum(leaf, alone) if alone else leaf, axes)

        return lambda *args: jax.tree.map(one, fn(*args))

    layer = mark(fns.layer, (*pipe, *spread))
    prepare = None if fns.prepare is None else mark(fns.prepare, (*pipe, *spread))
    return replace(fns, first=mark(fns.first, ends), layer=layer, last=mark(fns.last, ends), prepare=prepare)


def _drop_rank_dim(params: PipelineParams) -> PipelineParams:
    """Drop the rank dimension: [C, 1, k, ...] -> [C, k, ...]."""
    return PipelineParams(stages=jax.tree.map(lambda leaf: leaf[:, 0], params.stages), shared=params.shared)


def _sum_grads(grads: PipelineParams, spread: tuple[str, ...], shared_axes: tuple[str, ...]) -> PipelineParams:
    """Sum gradients over the batch axes, and those of shared parameters over `shared_axes`: once a step."""
    stages = _sum(grads.stages, spread)
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
