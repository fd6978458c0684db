"""The part of a pipelined step that runs on each device, and how parameters and batch are cut for it.

    params.stages [C, ranks@pipe, k, D@own axes, ...]  --cut-->  [C, k, d, ...] of this device
                                                                  run_turns, or run_sequence with one rank
    gradients      [C, ranks@pipe, k, D@own axes, ...] <--join--  summed over data and context, once, in one all-reduce

Every mesh axis is manual here: each device sees its own blocks, and nothing is sent that the code does not name. Axes
of size 1 are bound too, so that a function may name them, but no array is cut or marked along them, which would cost a
sum over a single device. Read `execute.py` next.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...schedules import Kind, Schedule
from ..lowering.lower import lower
from ..lowering.tables import Ends, Gathers, Offload
from ..model.frozen import keep_trained, trained_mask
from ..model.param_specs import param_specs
from ..model.stage import PipelineParams, StageFns
from ..model.trees import mesh_axes_of, on_mesh
from .batch import batch_specs
from .buffers import fill_integers
from .functions import bind_functions
from .loop import run_turns
from .loop_plan import Bubbles
from .loop_state import Grads, Wants
from .microbatches import Inputs
from .prepare import check_prepare
from .rank_model import RankModel, rank_model
from .sequential import run_sequence
from .split_weights.shard_squares import sum_shard_squares
from .split_weights.sharded import gather_once, sum_once


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Results:
    """What a step computes: replicated sums, and gradients sharded as what they are of.

    loss: float32 []; metrics: named; stats: leaves [C, ranks@pipe, k, ...].
    grads: gradients of the parameters, None where only the loss is wanted; batch_grads: of the batch, if wanted.
    shard_squares: float32 [], if wanted.
    """

    loss: Any
    metrics: Any
    stats: Any
    grads: Any
    batch_grads: Any
    shard_squares: Any = None


@dataclass(frozen=True, kw_only=True)
class Region:
    """A pipelined computation on a mesh: a function of (params, inputs) to results."""

    fns: StageFns
    mesh: Mesh
    schedule: Schedule
    bubbles: Bubbles
    overlap: bool
    wants: Wants
    offload: Offload = "none"
    wants_batch: bool = False
    wants_squares: bool = False

    def __call__(self, params: PipelineParams, inputs: Inputs) -> Results:
        """Run on the whole arrays: params.stages [C, ranks@pipe, k, ...], batch leaves [M, B@data, ...]."""
        of_params = param_specs(self.fns, params, self.mesh)
        of_layers = on_mesh(P(None, self.fns.axes.pipe), self.mesh)
        of_batch = on_mesh(batch_specs(self.fns, inputs.batch), self.mesh)
        return jax.shard_map(
            self._run,
            mesh=self.mesh,
            in_specs=(of_params, Inputs(batch=of_batch, state=of_layers, key=P())),
            out_specs=Results(
                loss=P(),
                metrics=P(),
                stats=of_layers,
                grads=keep_trained(of_params, self._trained(params)) if self.wants == "grads" else P(),
                batch_grads=of_batch if self.wants_batch else P(),
                shard_squares=P(),
            ),
        )(params, inputs)

    def _run(self, params: PipelineParams, inputs: Inputs) -> Results:
        axes = self.fns.axes
        # Empty for axes of one device: nothing is cut, marked or summed along those.
        pipe, summed = self._split_axes((axes.pipe,)), self._split_axes(axes.summed)
        tokens = self._split_axes(self.fns.token_axes)
        functions = bind_functions(self.fns, pipe=pipe, summed=summed, tokens=tokens)
        params, inputs = replace(params, stages=_drop(params.stages)), replace(inputs, state=_drop(inputs.state))
        params = gather_once(self.fns, params, summed=summed)
        trained = self._trained(params)
        check_prepare(functions, self.fns.by_kind(params.stages), self.fns.by_kind(trained.stages))
        model = rank_model(functions, params, inputs, wants_batch=self.wants_batch)
        # With one pipeline rank there is no turn to wait for: microbatches run one after another.
        if pipe:
            kinds: tuple[Kind, ...] = ("F", "B", "I", "W") if self.wants == "grads" else ("F",)
            ends: Ends = "together" if self.fns.ends_together else "alone"
            has_grads = self.wants == "grads"
            choices: dict[str, Any] = {
                "offload": self.offload if has_grads else "none",
                "gathers": self._gathers(model),
            }
            tables = lower(self.schedule, kinds=kinds, ends=ends, overlap=self.overlap and has_grads, **choices)
            sums, grads = run_turns(model, tables=tables, bubbles=self.bubbles, wants=self.wants)
        else:
            sums, grads = run_sequence(model, wants=self.wants)
        loss, metrics = _sum((sums.loss, sums.metrics), functions.axes)
        stats = _restore(_sum(self.fns.one_or_by_kind(sums.stats), summed))
        results = Results(loss=loss, metrics=metrics, stats=stats, grads=None, batch_grads=None)
        return results if grads is None else self._join(results, grads, params, inputs, pipe=pipe, summed=summed)

    def _join(
        self,
        results: Results,
        grads: Grads,
        params: PipelineParams,
        inputs: Inputs,
        *,
        pipe: tuple[str, ...],
        summed: tuple[str, ...],
    ) -> Results:
        """Return the results with gradients, summed over the devices that have a part of them: once a step."""
        trained = keep_trained(params, self._trained(params))
        stages = fill_integers(self.fns.one_or_by_kind(grads.stages), trained.stages)
        of_params = PipelineParams(stages=stages, shared=fill_integers(grads.shared, trained.shared))
        # Where the ends ran together, their gradients are summed over pipe already.
        over = {"summed": summed, "tokens": self._split_axes(self.fns.token_axes)}
        if self.wants_squares:
            sizes = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
            results = replace(
                results, shard_squares=sum_shard_squares(self.fns, of_params, params=params, sizes=sizes, **over)
            )
        of_params = sum_once(self.fns, of_params, params=params, pipe=() if self.fns.ends_together else pipe, **over)
        results = replace(results, grads=replace(of_params, stages=_restore(of_params.stages)))
        if not self.wants_batch:
            return results

        # Every stage adds its part of the gradient of a microbatch, and every shard that of a leaf that is whole.
        def over_copies(grad: jax.Array, spec: P) -> jax.Array:
            return _sum(grad, tuple(axis for axis in (*pipe, *summed) if axis not in mesh_axes_of(spec)))

        specs = on_mesh(batch_specs(self.fns, inputs.batch), self.mesh)
        of_batch = jax.tree.map(over_copies, fill_integers(grads.batch, inputs.batch), specs)
        return replace(results, batch_grads=of_batch)

    def _gathers(self, model: RankModel) -> Gathers:
        return "chunks" if self.fns.gather == "chunk" and any(model.gathers.values()) else "none"

    def _trained(self, params: PipelineParams) -> Any:
        return trained_mask(self.fns.frozen, params)

    def _split_axes(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.mesh.shape.get(axis, 1) > 1)


def _drop(tree: Any) -> Any:
    """Drop the rank dimension: [C, 1, k, ...] -> [C, k, ...]."""
    return jax.tree.map(lambda leaf: leaf[:, 0], tree)


def _restore(tree: Any) -> Any:
    """Undo `_drop`."""
    return jax.tree.map(lambda leaf: leaf[:, None], tree)


def _sum(tree: Any, axes: tuple[str, ...]) -> Any:
    """Sum over axes in one all-reduce. Gradients of integers are zeros on every device and stay as they are."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    floats = [leaf for leaf, is_its in zip(leaves, is_float, strict=True) if is_its]
    # A sum over no axes would stay in the program as a copy.
    sums = iter(jax.lax.psum(floats, axes) if axes else floats)
    return jax.tree.unflatten(
        structure, [next(sums) if is_its else leaf for leaf, is_its in zip(leaves, is_float, strict=True)]
    )
