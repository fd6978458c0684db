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
from typing import Any

import jax
import jax.numpy as jnp

from ...meshes.device_axes import mark_varying
from ..model.protocol import Given, Output, asks_for_info
from ..model.stage import StageFns
from .buffers import vary_like
from .checks.outputs import check_leaves, read_output


@dataclass(frozen=True, kw_only=True)
class Functions:
    """A model's functions, bound to the axes over which their results differ between devices.

    layers, prepares: by kind of layer; one kind without a name unless there are several.
    axes: pipe and the axes that loss and gradients are summed over, those with more than one device.
    end_axes: the same for `first` and `last`; without pipe where all ranks run them together.
    token_axes: axes with more than one device that split the tokens of x.
    """

    first: Callable[[Any, Given], Any]
    layers: dict[str, Callable[[Any, Any, Given], Output]]
    last: Callable[[Any, Any, Given], Output]
    prepares: dict[str, Callable[[Any], Any] | None]
    asks_info: bool
    fns: StageFns
    axes: tuple[str, ...]
    end_axes: tuple[str, ...]
    token_axes: tuple[str, ...]


def bind_functions(
    fns: StageFns,
    *,
    pipe: tuple[str, ...],
    summed: tuple[str, ...],
    tokens: tuple[str, ...],
    keeps_trivial: bool = False,
) -> Functions:
    """Return the functions in one form, for use inside `shard_map` with these axes of more than one device.

    Args:
        tokens: those of `fns.token_axes`.
        keeps_trivial: whether results may be marked as varying over axes of one device, as in checks.
    """
    axes, own_axes = (*pipe, *summed), (*pipe, *summed, *tokens)
    end_axes = summed if fns.ends_together else axes
    mark = partial(_mark, keeps_trivial=keeps_trivial)

    def bind(fn: Callable[..., Any], axes: tuple[str, ...], read: Callable[[Any, list[Any]], Any]) -> Any:
        asks = asks_for_info(fn)

        def run(*args: Any) -> Any:
            *own, given = args
            info = {"info": given.info} if asks else {}
            return mark(read(fn(*own, given.microbatch, **info), own), axes)

        return run

    layers, prepares = fns.by_kind(fns.layer), fns.by_kind(fns.prepare)
    return Functions(
        first=bind(fns.first, end_axes, _first_output),
        layers={kind: bind(fn, axes, _layer_output) for kind, fn in layers.items()},
        last=bind(fns.last, end_axes, lambda result, _: _sums_in_float32(read_output("last", result))),
        prepares={kind: fn and (lambda params, fn=fn: mark(fn(params), own_axes)) for kind, fn in prepares.items()},
        asks_info=any(map(asks_for_info, (fns.first, *layers.values(), fns.last))),
        fns=fns,
        axes=axes,
        end_axes=end_axes,
        token_axes=tokens,
    )


def _first_output(x: Any, _: list[Any]) -> Any:
    """Return the result of `first`; an Output is an error of the checks."""
    if not isinstance(x, Output):
        check_leaves("first()", x, part="x")
    return x


def _layer_output(result: Any, own: list[Any]) -> Output:
    """Return the output of a layer that was given (params, x): what it passes on is marked as x is."""
    out, (_, x) = _sums_in_float32(read_output("layer", result)), own
    # It may be the same on devices where x differs, over tensor say. Trees that differ are an error of the checks.
    is_alike = jax.tree.structure(out.x) == jax.tree.structure(x)
    return replace(out, x=vary_like(out.x, x)) if is_alike else out


def _sums_in_float32(out: Output) -> Output:
    sums = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"metrics": dict(out.metrics), "stats": out.stats})
    return replace(out, **jax.lax.stop_gradient(sums))


def _mark(tree: Any, axes: tuple[str, ...], *, keeps_trivial: bool) -> Any:
    """Mark arrays as varying over axes; marks over axes of size 1, which only a function itself can make, may go."""
    mesh = jax.sharding.get_abstract_mesh()

    def one(leaf: jax.Array) -> jax.Array:
        if not isinstance(leaf, jax.Array):
            leaf = jnp.asarray(leaf, jnp.result_type(leaf))  # a Python number, say, whose type is fixed here
        alone = tuple(axis for axis in sorted(jax.typeof(leaf).mat.varying) if mesh.shape[axis] == 1)
        return mark_varying(jax.lax.psum(leaf, alone) if alone and not keeps_trivial else leaf, axes)

    return jax.tree.map(one, tree)
