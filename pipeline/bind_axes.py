"""A user's functions where the axes pipe and data have size 1: they may name them all the same.

The executor leaves such axes out, since XLA need not hear of them, and it runs every function as it is. Functions that
name one, `jax.lax.pmean(x, "data")` say, run inside of what binds the name here:

    pipe=1 data=4    the axis pipe is manual too; what a function is given differs over it, what it returns does not
    pipe=1 data=1    no axis is manual that has a size, and XLA compiles no collective ("IsManualSubgroup"): vmap binds
                     both names, and makes of each collective what it is for one device
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .buffers import vary
from .stage import StageFns


def bind_axes(fns: StageFns, axes: tuple[str, ...], *, by: Literal["manual", "vmap"]) -> StageFns:
    """Return the functions with `axes`, all of size 1, bound in them; the same functions for no axes.

    Args:
        by: "manual" inside a `shard_map` that is manual over them; "vmap" inside one that checks no varying axes.
    """
    if not axes:
        return fns
    bind = partial(_bind_manual if by == "manual" else _bind_vmap, axes=axes)
    prepare = None if fns.prepare is None else bind(fns.prepare)
    return replace(fns, first=bind(fns.first), layer=bind(fns.layer), last=bind(fns.last), prepare=prepare)


def mark_results(fns: StageFns) -> StageFns:
    """Return the functions with results marked as differing between the devices that have copies of them.

    What a function has summed over data, its loss say, every data shard counts: only so marked, its gradient does too.
    """
    axes = ("pipe", "data") if fns.shared_specs is None else ("data",)

    def mark(fn: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
        return lambda *args: vary(fn(*args), axes)

    layer = mark(fns.layer, ("pipe", "data"))
    return replace(fns, first=mark(fns.first, axes), layer=layer, last=mark(fns.last, axes))


def _bind_manual(fn: Callable[..., Any], *, axes: tuple[str, ...]) -> Callable[..., Any]:
    def bound(*args: Any) -> Any:
        given = jax.tree.map(partial(_cross, partial(jax.lax.pcast, axis_name=axes, to="varying")), args)
        return jax.tree.map(drop, fn(*given))

    def drop(leaf: jax.Array) -> jax.Array:
        own = tuple(axis for axis in axes if axis in jax.typeof(leaf).mat.varying)
        return _cross(partial(jax.lax.psum, axis_name=own), leaf) if own else leaf

    return bound


def _bind_vmap(fn: Callable[..., Any], *, axes: tuple[str, ...]) -> Callable[..., Any]:
    for axis in axes:
        fn = partial(_vmap_one, fn, axis)
    return fn


def _vmap_one(fn: Callable[..., Any], axis: str, *args: Any) -> Any:
    mapped = jax.vmap(fn, in_axes=None, axis_size=1, axis_name=axis)(*args)
    return jax.tree.map(lambda leaf: leaf[0], mapped)


def _cross(move: Callable[[jax.Array], jax.Array], leaf: jax.Array) -> jax.Array:
    """Change the axes over which a leaf differs, in float32: XLA's CPU backend aborts on sums of fewer bits."""
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4:
        return move(leaf.astype(jnp.float32)).astype(leaf.dtype)
    return move(leaf)
