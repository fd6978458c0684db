"""Checks of the three functions of a pipeline, by tracing them over shapes before anything runs."""

from collections.abc import Callable
from typing import Any

import jax

from ..meshes import ScheduleError
from .buffers import vary
from .check_callbacks import check_callbacks
from .stage import PipelineParams, StageFns


def check_fns(fns: StageFns, params: PipelineParams, batch: Any) -> None:
    """Raise unless the three functions fit each other; for use inside `shard_map` over pipe and data.

    params.stages leaves [C, k, ...], batch leaves [M, b, ...]; nothing is computed.

    Raises:
        ScheduleError: `first` gives no single array, `layer` changes its shape or dtype, `last` gives no scalar,
            or one of them asks the host for a result.
    """
    first, layer, last, varies = _probe(fns, params, batch)
    x = _shape_of("first", first)
    if not isinstance(x, jax.ShapeDtypeStruct):
        raise ScheduleError(
            f"first() returns a {type(x).__name__}; what passes between layers is one array.",
            fix="concatenate what you need to pass on, or read it from the microbatch in every layer.",
        )
    y = _shape_of("layer", layer)
    if _array_text(y) != _array_text(x):
        raise ScheduleError(
            f"layer() turns {_array_text(x)} into {_array_text(y)}; every layer passes on what the first was given.",
            fix="return an array of the same shape and dtype, with y.astype(x.dtype) say.",
        )
    loss = _shape_of("last", last)
    if _array_text(loss) != "float32[]":
        raise ScheduleError(
            f"last() returns {_array_text(loss)}; the loss is one float32 number.",
            fix="sum it, divide by the count of the whole batch, and .astype(jnp.float32).",
        )
    _check_summed(varies)


def _probe(
    fns: StageFns, params: PipelineParams, batch: Any
) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any], dict[str, bool]]:
    """The three functions on what they are given, and, once they ran, whether the ends differ between ranks.

    The arrays are made inside them, so that under eval_shape they keep their varying axes, which user code may need.
    """
    is_together = fns.shared_specs is not None
    varies: dict[str, bool] = {}

    def microbatch(axes: tuple[str, ...]) -> Any:
        return jax.tree.map(lambda leaf: vary(leaf[0], axes), batch)

    def end(name: str, *args: Any) -> jax.Array:
        shared = params.shared if is_together else jax.tree.map(vary, params.shared)
        y = getattr(fns, name)(shared, *args, microbatch(("data",) if is_together else ("pipe", "data")))
        varies[name] = is_together and isinstance(y, jax.Array) and "pipe" in jax.typeof(y).mat.varying
        return y

    def first() -> jax.Array:
        return end("first")

    def layer() -> jax.Array:
        own = jax.tree.map(lambda leaf: vary(leaf[0, 0]), params.stages)
        own = own if fns.prepare is None else fns.prepare(own)
        return fns.layer(own, vary(first()), microbatch(("pipe", "data")))

    def last() -> jax.Array:
        return end("last", first() if is_together else layer())

    return first, layer, last, varies


def _shape_of(name: str, fn: Callable[[], Any]) -> Any:
    jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)()
    check_callbacks(name, jaxpr.jaxpr)
    return shape


def _check_summed(varies: dict[str, bool]) -> None:
    for name in (name for name, is_varying in varies.items() if is_varying):
        raise ScheduleError(
            f"{name}() gives every rank of the pipe another result, but with shared_specs all ranks run it together.",
            fix='sum what each rank made: jax.lax.psum(..., "pipe").',
        )


def _array_text(value: Any) -> str:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return f"a {type(value).__name__}"
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
