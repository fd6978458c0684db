"""Wrap a user's functions: bind axis names where there is one device, and mark results as varying.

Where data x pipe is 1, XLA compiles no collective over a manual axis ("IsManualSubgroup"). There `vmap` binds the axis
names instead, and turns each collective into what it is for one device, so that a function that names an axis, say
`jax.lax.pmean(x, "data")`, runs on every mesh.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from ..model.stage import StageFns
from .buffers import vary


def bind_axes(fns: StageFns, axes: tuple[str, ...]) -> StageFns:
    """Return the functions with `axes` bound as axes of size 1; for use in a `shard_map` with `check_vma=False`."""
    if not axes:
        return fns

    def bind(fn: Callable[..., Any]) -> Callable[..., Any]:
        for axis in axes:
            fn = partial(_call_on_axis, fn, axis)
        return fn

    prepare = None if fns.prepare is None else bind(fns.prepare)
    return replace(fns, first=bind(fns.first), layer=bind(fns.layer), last=bind(fns.last), prepare=prepare)


def mark_results(fns: StageFns) -> StageFns:
    """Return the functions with results marked as varying over the devices that have copies of them.

    A result that a function has summed over data is counted once by every data shard. Only when it is marked as varying
    is its gradient counted the same way.
    """
    axes = ("pipe", "data") if fns.shared_specs is None else ("data",)

    def mark(fn: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
        return lambda *args: vary(fn(*args), axes)

    layer = mark(fns.layer, ("pipe", "data"))
    return replace(fns, first=mark(fns.first, axes), layer=layer, last=mark(fns.last, axes))


def _call_on_axis(fn: Callable[..., Any], axis: str, *args: Any) -> Any:
    mapped = jax.vmap(fn, in_axes=None, axis_size=1, axis_name=axis)(*args)
    return jax.tree.map(lambda leaf: leaf[0], mapped)
