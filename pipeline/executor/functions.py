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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..model.protocol import Given, Output, asks_for_info
from ..model.stage import StageFns
from .buffers import vary


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
    axes = (*pipe, *batch)
    end_axes = batch if fns.ends_together else axes
    mark = partial(_mark, keeps_trivial=keeps_trivial)

    def bind(fn: Callable[..., Any], axes: tuple[str, ...], result: Callable[[Any], Any]) -> Callable[..., Any]:
        asks = asks_for_info(fn)

        def run(*args: Any) -> Any:
            *own, given = args
            info = {"info": given.info} if asks else {}
            return mark(result(fn(*own, given.microbatch, **info)), axes)

        return run

    layers, prepares = fns.by_kind(fns.layer), fns.by_kind(fns.prepare)
    return Functions(
        first=bind(fns.first, end_axes, lambda x: x),
        layers={kind: bind(fn, axes, lambda out: _output(out, "x")) for kind, fn in layers.items()},
        last=bind(fns.last, end_axes, lambda out: _output(out, "loss")),
        prepares={kind: fn and (lambda params, fn=fn: mark(fn(params), axes)) for kind, fn in prepares.items()},
        asks_info=any(map(asks_for_info, (fns.first, *layers.values(), fns.last))),
        fns=fns,
        axes=axes,
        end_axes=end_axes,
    )


def _output(result: Any, field: Literal["x", "loss"]) -> Output:
    """Return the result of a function as an `Output`, of which it may be a single field, in float32 beside x."""
    out = result if isinstance(result, Output) else Output(**{field: result})
    sums = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"metrics": dict(out.metrics), "stats": out.stats})
    return replace(out, **jax.lax.stop_gradient(sums))


def _mark(tree: Any, axes: tuple[str, ...], *, keeps_trivial: bool) -> Any:
    """Mark arrays as varying over axes; marks over axes of size 1, which only a function itself can make, may go."""
    mesh = jax.sharding.get_abstract_mesh()

    def one(leaf: jax.Array) -> jax.Array:
        alone = tuple(axis for axis in sorted(jax.typeof(leaf).mat.varying) if mesh.shape[axis] == 1)
        return vary(jax.lax.psum(leaf, alone) if alone and not keeps_trivial else leaf, axes)

    return jax.tree.map(one, tree)
