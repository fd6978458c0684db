"""Check the functions of a pipeline by tracing each of them once on shapes, before anything runs.

They are traced in the same way on every mesh, also along axes of size 1, so that a function that one mesh refuses is
refused on all. Read `collectives.py` next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ....meshes import ScheduleError
from ....meshes.device_axes import mark_varying
from ...model.param_specs import param_specs
from ...model.protocol import Output
from ...model.stage import PipelineParams, StageFns
from ...model.trees import on_mesh
from ..batch import batch_specs
from ..buffers import empty_buffer, floats_of
from ..functions import bind_functions
from ..microbatches import Inputs, microbatches_of
from ..split_weights.sharded import Splits, gather
from .callbacks import check_callbacks
from .collectives import check_branches, check_collectives
from .outputs import check_names, check_same_on_copies
from .user_errors import explain_errors

RunsOn = Literal["all ranks", "one rank"]
"""Who runs a function at the same time."""


@dataclass(frozen=True, kw_only=True)
class FnFacts:
    """Facts about the functions of a pipeline, found by tracing.

    owners: name of the function that closes over a traced array, by the array's `id`.
    """

    owners: dict[int, str]


def check_fns(fns: StageFns, params: PipelineParams, inputs: Inputs, *, mesh: Mesh) -> FnFacts:
    """Return facts about the functions; raise unless they fit each other. Nothing is computed.

    params.stages leaves [C, ranks, k, ...], batch leaves [M, B, ...].

    Raises:
        ScheduleError: `first` returns nothing that has gradients, `layer` changes its shapes or dtypes, `last` does not
            return a scalar, a result differs between devices that should agree, or one of the functions has a
            collective that some devices would not run, or a callback with an order.
    """
    trace = _Trace(mesh, fns.axes.pipe)

    def region(params: PipelineParams, inputs: Inputs) -> jax.Array:
        trace.check(fns, params, inputs)
        return jnp.zeros(())

    of_layers = on_mesh(P(None, fns.axes.pipe), mesh)
    of_inputs = Inputs(batch=on_mesh(batch_specs(fns, inputs.batch), mesh), state=of_layers, key=P())
    run = jax.shard_map(region, mesh=mesh, in_specs=(param_specs(fns, params, mesh), of_inputs), out_specs=P())
    jax.eval_shape(run, params, inputs)
    return FnFacts(owners=trace.owners)


@dataclass(frozen=True)
class _Trace:
    """Trace the functions inside `shard_map`, and collect the arrays that they close over."""

    mesh: Mesh
    pipe: str
    owners: dict[int, str] = field(default_factory=dict)

    def check(self, fns: StageFns, params: PipelineParams, inputs: Inputs) -> None:
        # The types that arguments have in the executor, also along axes of size 1: microbatch and layers differ between
        # all devices, the ends' arguments only between data shards where all ranks run them together.
        split = {"pipe": (fns.axes.pipe,), "summed": fns.axes.summed, "tokens": (tokens := fns.token_axes)}
        functions = bind_functions(fns, **split, keeps_trivial=True)
        is_together, axes = fns.ends_together, functions.axes
        ends: RunsOn = "all ranks" if is_together else "one rank"
        params = self._gathered(fns, params)
        shared = _mark(params.shared, (*functions.end_axes, *tokens))
        at_ends = microbatches_of(functions, inputs)
        first = self._trace("first", functions.first, shared, at_ends.read(0).at(-1), runs_on=ends)
        _check_activation(first)
        x = _like(first, axes)
        own = _mark(params.stages, (*axes, *tokens))
        state = _mark(jax.tree.map(lambda leaf: leaf[0, 0, 0], inputs.state), axes)
        metrics = {}
        for kind, layer in functions.layers.items():
            params_of_one, prepare = fns.by_kind(own)[kind], functions.prepares[kind]
            if prepare is not None:
                params_of_one = self._trace("prepare", prepare, params_of_one, runs_on="one rank")
                params_of_one = _like(params_of_one, (*axes, *tokens))
            given = at_ends.marked(axes).read(0)
            if given.info is not None:
                given = replace(given, info=replace(given.info, state=fns.by_kind(state)[kind]))
            out = self._trace("layer", layer, params_of_one, x, given, runs_on="one rank")
            _check_layer(out, first)
            check_same_on_copies("layer", out, x=first, axes=axes)
            metrics[f"layer {kind}".strip()] = out.metrics
        y = _like(first, functions.end_axes)
        last = self._trace("last", functions.last, shared, y, at_ends.read(0).at(-2), runs_on=ends)
        _check_loss("last", last.loss)
        check_same_on_copies("last", last, x=None, axes=axes)
        check_names(metrics | {"last": last.metrics})
        for name, result in (("first", first), ("last", last)):
            if is_together and fns.axes.pipe in _varying(result):
                raise ScheduleError(
                    f"{name}() gives every rank of the pipe another result, but all ranks run it together, since "
                    f"shared_specs name {fns.axes.pipe}.",
                    fix=f'sum what each rank made: jax.lax.psum(..., "{fns.axes.pipe}").',
                )

    def _gathered(self, fns: StageFns, params: PipelineParams) -> PipelineParams:
        """Return the parameters of one layer, and those of the ends, whole over the batch axes."""
        one_layer = replace(params, stages=jax.tree.map(lambda leaf: leaf[0, 0, 0], params.stages))
        summed = [axis for axis in fns.axes.summed if self.mesh.shape.get(axis, 1) > 1]
        splits = Splits.of(fns, params, summed=summed)
        return PipelineParams(
            stages=gather(one_layer.stages, splits.stages), shared=gather(one_layer.shared, splits.shared)
        )

    def _trace(self, name: str, fn: Callable[..., Any], *args: Any, runs_on: RunsOn) -> Any:
        # Types and shapes alone: a trace runs the function's Python code, and none of its operations.
        with explain_errors(f"{name}()", self.mesh):
            jaxpr, value = jax.make_jaxpr(fn, return_shape=True)(*args)
        check_callbacks(name, jaxpr.jaxpr)
        check_collectives(name, jaxpr.jaxpr, pipe=self.pipe, runs_on=runs_on)
        check_branches(jaxpr.jaxpr, name=name)
        self.owners.update({id(const): name for const in jaxpr.consts if isinstance(const, jax.core.Tracer)})
        return value


def _check_activation(x: Any) -> None:
    if isinstance(x, Output):
        raise ScheduleError(
            "first() returns an Output; it has no loss, metrics or stats of its own.",
            fix="return x itself, and add to the loss in layer() or last().",
        )
    for leaf in jax.tree.leaves(x):
        if not hasattr(leaf, "dtype"):
            raise ScheduleError(
                f"first() returns a {type(leaf).__name__}; layers pass on arrays.", fix="make it one: jnp.asarray(...)."
            )
    if not floats_of(x):
        raise ScheduleError(
            f"first() returns {_text(x)}; gradients come back through what layers pass on, so some of it is floats.",
            fix="embed or cast it in first(), x.astype(jnp.float32) say; integers are read from the microbatch.",
        )


def _check_layer(out: Output, x: Any) -> None:
    if _text(out.x) != _text(x):
        raise ScheduleError(
            f"layer() turns {_text(x)} into {_text(out.x)}; every layer passes on what the first was given.",
            fix="return an array of the same shape and dtype, with y.astype(x.dtype) say.",
        )
    if out.loss is not None:
        _check_loss("layer", out.loss)


def _check_loss(name: str, loss: Any) -> None:
    if _text(loss) != "float32[]":
        raise ScheduleError(
            f"{name}() returns {'the loss ' if name == 'layer' else ''}{_text(loss)}; the loss is one float32 number.",
            fix="sum it, divide by the count of the whole batch, and .astype(jnp.float32).",
        )


def _varying(tree: Any) -> frozenset[str]:
    return frozenset().union(*(leaf.manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def _like(tree: Any, axes: tuple[str, ...]) -> Any:
    return _mark(jax.tree.map(empty_buffer, tree), axes)


def _mark(tree: Any, axes: tuple[str, ...]) -> Any:
    """Mark arrays as varying over these axes, also over those of size 1."""
    return jax.tree.map(lambda leaf: mark_varying(leaf, axes), tree)


def _text(tree: Any) -> str:
    """Return a tree of shapes as text, `float32[2, 8]` or `{'h': float32[2, 8]}`."""
    named = jax.tree.map(lambda leaf: _Text(f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"), tree)
    return repr(named) if jax.tree.leaves(tree) else f"a {type(tree).__name__}"


class _Text(str):
    """A string that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)
