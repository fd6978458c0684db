"""Check the functions of a pipeline by tracing each of them once on shapes, before anything runs.

They are traced in the same way on every mesh, also along axes of size 1, so that a function that one mesh refuses is
refused on all. Read `collectives.py` next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ....meshes import ScheduleError
from ...model.stage import PipelineParams, StageFns
from ...model.trees import on_mesh
from ..batch import batch_specs
from ..buffers import empty_buffer
from ..param_specs import param_specs
from .callbacks import check_callbacks
from .collectives import check_branches, check_collectives
from .user_errors import explain_errors


@dataclass(frozen=True, kw_only=True)
class FnFacts:
    """Facts about the functions of a pipeline, found by tracing.

    owners: name of the function that closes over a traced array, by the array's `id`.
    """

    owners: dict[int, str]


def check_fns(fns: StageFns, params: PipelineParams, batch: Any, *, mesh: Mesh) -> FnFacts:
    """Return facts about the functions; raise unless they fit each other. Nothing is computed.

    params.stages leaves [C, ranks, k, ...], batch leaves [M, B, ...].

    Raises:
        ScheduleError: `first` does not return one array, `layer` changes its shape or dtype, `last` does not return a
            scalar, or one of them has a collective that some devices would not run, or a callback with a result.
    """
    trace = _Trace(mesh=mesh, pipe=fns.axes.pipe)

    def region(params: PipelineParams, batch: Any) -> jax.Array:
        trace.check(fns, params, batch)
        return jnp.zeros(())

    specs = param_specs(fns, params, mesh), on_mesh(batch_specs(fns, batch), mesh)
    jax.eval_shape(jax.shard_map(region, mesh=mesh, in_specs=specs, out_specs=P()), params, batch)
    return FnFacts(owners=trace.owners)


@dataclass(frozen=True, kw_only=True)
class _Result:
    """The type of a function's result, and the mesh axes over which it varies."""

    value: Any
    varying: frozenset[str]


@dataclass(frozen=True)
class _Trace:
    """Trace the functions inside `shard_map`, and collect the arrays that they close over."""

    mesh: Mesh
    pipe: str
    owners: dict[int, str] = field(default_factory=dict)

    def check(self, fns: StageFns, params: PipelineParams, batch: Any) -> None:
        is_together, all_axes = fns.ends_together, (fns.axes.pipe, *fns.axes.batch)
        # The types that arguments have in the executor: microbatch and layers differ between all devices, the ends'
        # arguments only between data shards where all ranks run them together.
        ends, axes = ("all ranks", fns.axes.batch) if is_together else ("one rank", all_axes)
        shared, end_batch = _mark((params.shared, jax.tree.map(lambda leaf: leaf[0], batch)), axes)
        first = self._trace("first", fns.first, shared, end_batch, runs_on=ends)
        _check_activation(first.value)
        x = _like(first.value, all_axes)
        own, microbatch = _mark((jax.tree.map(lambda leaf: leaf[0, 0, 0], params.stages), end_batch), all_axes)
        if fns.prepare is not None:
            own = _like(self._trace("prepare", fns.prepare, own, runs_on="one rank").value, all_axes)
        _check_layer(self._trace("layer", fns.layer, own, x, microbatch, runs_on="one rank").value, first.value)
        last = self._trace("last", fns.last, shared, _like(first.value, axes), end_batch, runs_on=ends)
        _check_loss(last.value)
        for name, result in (("first", first), ("last", last)):
            if is_together and fns.axes.pipe in result.varying:
                raise ScheduleError(
                    f"{name}() gives every rank of the pipe another result, but with shared_specs all ranks run it "
                    "together.",
                    fix=f'sum what each rank made: jax.lax.psum(..., "{fns.axes.pipe}").',
                )

    def _trace(
        self, name: str, fn: Callable[..., Any], *args: Any, runs_on: Literal["all ranks", "one rank"]
    ) -> _Result:
        # Types and shapes alone: a trace runs the function's Python code, and none of its operations.
        with explain_errors(f"{name}()", self.mesh):
            jaxpr, value = jax.make_jaxpr(fn, return_shape=True)(*args)
        check_callbacks(name, jaxpr.jaxpr)
        check_collectives(name, jaxpr.jaxpr, pipe=self.pipe, runs_on=runs_on)
        check_branches(jaxpr.jaxpr, name=name)
        self.owners.update({id(const): name for const in jaxpr.consts if isinstance(const, jax.core.Tracer)})
        return _Result(value=value, varying=_varying(jaxpr))


def _check_activation(x: Any) -> None:
    if not isinstance(x, jax.ShapeDtypeStruct):
        raise ScheduleError(
            f"first() returns a {type(x).__name__}; what passes between layers is one array.",
            fix="concatenate what you need to pass on, or read it from the microbatch in every layer.",
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ScheduleError(
            f"first() returns {_array_text(x)}; gradients come back through what layers pass on, so it is floats.",
            fix="embed or cast it in first(), x.astype(jnp.float32) say; integers are read from the microbatch.",
        )


def _check_layer(y: Any, x: Any) -> None:
    if _array_text(y) != _array_text(x):
        raise ScheduleError(
            f"layer() turns {_array_text(x)} into {_array_text(y)}; every layer passes on what the first was given.",
            fix="return an array of the same shape and dtype, with y.astype(x.dtype) say.",
        )


def _check_loss(loss: Any) -> None:
    if _array_text(loss) != "float32[]":
        raise ScheduleError(
            f"last() returns {_array_text(loss)}; the loss is one float32 number.",
            fix="sum it, divide by the count of the whole batch, and .astype(jnp.float32).",
        )


def _varying(jaxpr: ClosedJaxpr) -> frozenset[str]:
    return frozenset().union(*(aval.mat.varying for aval in jaxpr.out_avals))


def _like(tree: Any, axes: tuple[str, ...]) -> Any:
    return _mark(jax.tree.map(empty_buffer, tree), axes)


def _mark(tree: Any, axes: tuple[str, ...]) -> Any:
    """Mark arrays as varying over these axes, also over those of size 1."""

    def one(leaf: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in jax.typeof(leaf).mat.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree)


def _array_text(value: Any) -> str:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return f"a {type(value).__name__}"
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
