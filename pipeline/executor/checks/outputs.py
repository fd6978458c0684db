"""Check what layers and `last` return: the kind of each part, and that devices which should agree on it do.

    part                  may differ between devices of
    x                     pipe, data, and what the x that it was made from differs over
    loss, metrics, stats  pipe and data: they are summed over these, and counted once for the devices of tensor

A result that differs over tensor where it should not is a sum that was forgotten: the type of an array says so.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ....meshes import ScheduleError
from ...model.protocol import Output

_ARRAYS = jax.Array | np.ndarray | np.generic | float | int


def read_output(name: Literal["layer", "last"], result: Any) -> Output:
    """Return what a layer or `last` returned as an `Output`.

    Raises:
        ScheduleError: metrics are not named arrays, or `last` returns parts that a layer alone has.
    """
    if not isinstance(result, Output):
        result = Output(x=result) if name == "layer" else Output(loss=result)
    if not isinstance(result.metrics, Mapping):
        raise ScheduleError(
            f"{name}() returns metrics that are a {type(result.metrics).__name__}; metrics have names.",
            fix='give a dict of arrays: Output(metrics={"load": load}).',
        )
    for key, value in result.metrics.items():
        if not isinstance(key, str):
            raise ScheduleError(
                f"{name}() returns a metric with the name {key!r}, which is not text.",
                fix=f'use text: Output(metrics={{"{key}": ...}}).',
            )
        if not isinstance(value, _ARRAYS):
            raise ScheduleError(
                f"{name}() returns metrics[{key!r}], which is a {type(value).__name__}; a metric is one array.",
                fix="give each array a name of its own.",
            )
    for part in ("x", "loss", "metrics", "stats"):
        check_leaves(f"{name}()", getattr(result, part), part=part)
    if name == "last" and jax.tree.leaves((result.x, result.stats)):
        raise ScheduleError(
            "last() returns an Output with x or stats; both are a layer's alone, and would be lost.",
            fix="leave them out, and return what is to be seen as metrics.",
        )
    return result


def check_leaves(name: str, tree: Any, *, part: str) -> None:
    """Raise unless the leaves of what a function returns are arrays of numbers, and those that are summed real.

    Raises:
        ScheduleError: naming the leaf.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = part + jax.tree_util.keystr(path)
        kind = None
        if isinstance(leaf, _ARRAYS):
            kind = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
        if kind is None or not (any(jnp.issubdtype(kind, own) for own in (jnp.number, jnp.bool_))):
            what = f"a {type(leaf).__name__}" if kind is None else kind
            raise ScheduleError(
                f"{name} returns {where}, which is {what}, not numbers.",
                fix="return arrays of numbers alone.",
            )
        if part != "x" and jnp.issubdtype(kind, jnp.complexfloating):
            raise ScheduleError(
                f"{name} returns {where}, which is {kind}; it is summed in float32.",
                fix="return real and imaginary part as two arrays.",
            )


def check_same_on_copies(name: Literal["layer", "last"], out: Output, *, x: Any, axes: Iterable[str]) -> None:
    """Raise where a result differs between devices that should have the same; leaves are types.

    Args:
        x: what the function was given, of the same tree as `out.x`.
        axes: the mesh axes over which every result may differ.

    Raises:
        ScheduleError: naming the part and the axes.
    """
    pairs = zip(jax.tree.leaves(out.x), jax.tree.leaves(x), strict=True) if name == "layer" else ()
    for leaf, given in pairs:
        _check_part(
            name,
            "an x",
            _varying(leaf).difference(axes, _varying(given)),
            what="but the x that it was given is the same on all of them: each would go on with a part of a sum",
        )
    for part in ("loss", "metrics", "stats"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(out, part)):
            _check_part(
                name,
                {"loss": "a loss"}.get(part, part + jax.tree_util.keystr(path)),
                _varying(leaf).difference(axes),
                what="but it is counted once for all of them",
            )


def check_names(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless metrics of one name have one shape, as they are added; given by function, values are types.

    Raises:
        ScheduleError: naming the metric and the functions.
    """
    owners: dict[str, tuple[str, Any]] = {}
    for function, own in metrics.items():
        for name, kind in own.items():
            other, first = owners.setdefault(name, (function, kind))
            if first.shape != kind.shape:
                raise ScheduleError(
                    f"metrics[{name!r}] has shape {first.shape} in {other} and {kind.shape} in {function}; metrics "
                    "of one name are added.",
                    fix="give one of them another name.",
                )


def _check_part(name: str, part: str, axes: frozenset[str], *, what: str) -> None:
    if not axes:
        return
    over = " and ".join(sorted(axes))
    raise ScheduleError(
        f"{name}() returns {part} that differs between devices along {over}, {what}.",
        fix=f"sum what each of them made: layers.collectives.sum_blocks(y, {sorted(axes)}), or jax.lax.psum.",
    )


def _varying(kind: Any) -> frozenset[str]:
    return frozenset(kind.manual_axis_type.varying)
