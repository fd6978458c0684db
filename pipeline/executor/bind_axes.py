"""What the executor makes of a user's functions: names of axes bound where there is one device, results marked.

Where data x pipe is 1, no manual axis has a size, and XLA compiles no collective over it ("IsManualSubgroup"). There
`vmap` binds the names, and makes of each collective what it is among one device: functions that name an axis,
`jax.lax.pmean(x, "data")` say, run on every mesh.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from ..model.stage import StageFns
from .buffers import vary


def bind_axes(fns: StageFns, axes: tuple[str, ...]) -> StageFns:
    """Return the functions with `axes` bound in them as axes of size 1; inside a `shard_map` without checks of axes."""
    if not axes:
        return fns

    def bind(fn: Callable[..., Any]) -> Callable[..., Any]:
        for axis in axes:
            fn = partial(_call_on_axis, fn, axis)
        return fn

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


def _call_on_axis(fn: Callable[..., Any], axis: str, *args: Any) -> Any:
    mapped = jax.vmap(fn, in_axes=None, axis_size=1, axis_name=axis)(*args)
    return jax.tree.map(lambda leaf: leaf[0], mapped)
