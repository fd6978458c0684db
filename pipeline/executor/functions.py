"""The functions of a model in one form, whichever form the user wrote them in.

    user's                                          here
    first(shared, microbatch[, info]) -> x          first(shared, given) -> x
    layer(params, x, microbatch[, info])            layer(params, x, given) -> Output
        -> x or Output
    last(shared, x, microbatch[, info])             last(shared, x, given) -> Output
        -> loss or Output

Results are marked as varying over the devices that have copies of them. A result that a function has summed over data
is counted once by every data shard; only when it is marked as varying is its gradient counted the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..model.protocol import Given, Output, asks_for_info
from ..model.stage import StageFns
from .buffers import vary, vary_like
from .checks.outputs import read_output


@dataclass(frozen=True, kw_only=True)
class Functions:
    """A model's functions, bound to the axes over which their results differ between devices.

    layers, prepares: by kind of layer; one kind without a name unless there are several.
    axes: pipe and batch axes with more than one device.
    end_axes: the same for `first` and `last`; without pipe where all ranks run them together.
    """

    first: Callable[[Any, Given], Any]
    layers: dict[str, Callable[[Any, Any, Given], Output]]
    last: Callable[[Any, Any, Given], Output]
    prepares: dict[str, Callable[[Any], Any] | None]
    asks_info: bool
    fns: StageFns
    axes: tuple[str, ...]
    end_axes: tuple[str, ...]


def bind_functions(
    fns: StageFns, *, pipe: tuple[str, ...], batch: tuple[str, ...], keeps_trivial: bool = False
) -> Functions:
    """Return the functions in one form, for use inside `shard_map` with these axes of more than one device.

    Args:
        keeps_trivial: whether results may be marked as varying over axes of one device, as in checks.
    """
    mark = partial(_mark, keeps_trivial=keeps_trivial)
    axes = (*pipe, *batch)
    end_axes = batch if fns.ends_together else axes
    first, last = _with_given(fns.first), _with_given(fns.last)

    def bind_layer(fn: Callable[..., Any]) -> Callable[[Any, Any, Given], Output]:
        layer = _with_given(fn)

        def run(params: Any, x: Any, given: Given) -> Output:
            out = read_output("layer", layer(given, params, x))
            return mark(Output(x=_vary_like(out.x, x), loss=out.loss, **_without_gradients(out)), axes)

        return run

    def bind_prepare(fn: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        return None if fn is None else lambda params: mark(fn(params), axes)

    def run_last(shared: Any, x: Any, given: Given) -> Output:
        out = read_output("last", last(given, shared, x))
        return mark(Output(loss=out.loss, metrics=jax.lax.stop_gradient(_as_float32(out.metrics))), end_axes)

    layers = fns.by_kind(fns.layer)
    return Functions(
        first=lambda shared, given: mark(first(given, shared), end_axes),
        layers={kind: bind_layer(fn) for kind, fn in layers.items()},
        last=run_last,
        prepares={kind: bind_prepare(fn) for kind, fn in fns.by_kind(fns.prepare).items()},
        asks_info=any(map(asks_for_info, (fns.first, *layers.values(), fns.last))),
        fns=fns,
        axes=axes,
        end_axes=end_axes,
    )


def _with_given(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of (given, *args) that calls fn(*args, microbatch), with info if it asks for it."""
    if asks_for_info(fn):
        return lambda given, *args: fn(*args, given.microbatch, info=given.info)
    return lambda given, *args: fn(*args, given.microbatch)


def _vary_like(y: Any, x: Any) -> Any:
    """Mark what a layer passes on as what it was given: it may be the same where that differs, over tensor say."""
    # Trees that differ are an error, which the checks explain.
    return vary_like(y, x) if jax.tree.structure(y) == jax.tree.structure(x) else y


def _without_gradients(out: Output) -> dict[str, Any]:
    return jax.lax.stop_gradient(_as_float32({"metrics": dict(out.metrics), "stats": out.stats}))


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def _mark(tree: Any, axes: tuple[str, ...], *, keeps_trivial: bool) -> Any:
    """Mark arrays as varying over axes; marks over axes of size 1, which only a function itself can make, may go."""
    mesh = jax.sharding.get_abstract_mesh()

    def one(leaf: jax.Array) -> jax.Array:
        if not isinstance(leaf, jax.Array):
            leaf = jnp.asarray(leaf, jnp.result_type(leaf))  # a Python number, say, whose type is fixed here
        alone = tuple(axis for axis in sorted(jax.typeof(leaf).mat.varying) if mesh.shape[axis] == 1)
        return vary(jax.lax.psum(leaf, alone) if alone and not keeps_trivial else leaf, axes)

    return jax.tree.map(one, tree)
