"""The few operations on buffers that the executor is made of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType


def vary(x: jax.Array, axes: tuple[str, ...] = ("pipe", "data")) -> jax.Array:
    """Return x marked as differing over those of the axes that are manual; over none if there is a single device.

    A manual axis of size 1 counts, so that functions may name it; alone it cannot, since XLA would compile no sum over
    it ("IsManualSubgroup").
    """
    sizes = _manual_sizes(axes=("pipe", "data"))
    return _mark(x, [axis for axis in sizes if axis in axes] if max(sizes.values(), default=1) > 1 else [])


def vary_among_devices(x: jax.Array, axes: tuple[str, ...] = ("pipe", "data")) -> jax.Array:
    """Return x marked as differing over those of the axes that are manual and of several devices."""
    return _mark(x, [axis for axis, size in _manual_sizes(axes=axes).items() if size > 1])


def type_of(v: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a traced value, with the axes over which it differs: a sum over data does not over that."""
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, manual_axis_type=v.aval.mat)


def room_for(kept: jax.ShapeDtypeStruct, *slots: int, fill: float = 0) -> jax.Array:
    """Return a buffer [*slots, ...] for arrays of a type, marked as they are: equations take them as they were made."""
    differs: Any = kept.manual_axis_type
    return vary(jnp.full((*slots, *kept.shape), fill, kept.dtype), tuple(differs.varying))


def _manual_sizes(*, axes: tuple[str, ...]) -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in kinds if kind == AxisType.Manual and axis in axes}


def _mark(x: jax.Array, axes: list[str]) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros_for(param: jax.Array) -> jax.Array | None:
    """Return a float32 sum for the gradients of a parameter, differing over the same axes; none for whole numbers."""
    if not jnp.issubdtype(param.dtype, jnp.inexact):
        return None
    return vary(jnp.zeros(param.shape, jnp.float32), tuple(jax.typeof(param).mat.varying))


def read(tree: Any, *place: jax.Array | int) -> Any:
    """Return every leaf at the given position of its leading dimensions."""

    def one(leaf: jax.Array) -> jax.Array:
        starts = _starts(place, leaf.ndim)
        inner = leaf.shape[len(place) :]
        return jax.lax.dynamic_slice(leaf, starts, (*[1] * len(place), *inner)).reshape(inner)

    return jax.tree.map(one, tree)


def write(buffer: jax.Array, value: jax.Array, *place: jax.Array | int) -> jax.Array:
    """Return the buffer with the value at the given position of its leading dimensions."""
    starts = _starts(place, len(place) + value.ndim)
    return jax.lax.dynamic_update_slice(buffer, value.reshape(*[1] * len(place), *value.shape), starts)


def _starts(place: tuple[jax.Array | int, ...], ndim: int) -> list[Any]:
    """Of one integer type, also where jax_enable_x64 makes Python's numbers and loop counters 64 bits wide."""
    starts = (*place, *[0] * (ndim - len(place)))
    # Constants stay constants: jax guards against negative ones where it cannot see them.
    return [np.int32(start) if isinstance(start, int) else start.astype(jnp.int32) for start in starts]


def _accumulate(sums: jax.Array, grad: jax.Array, place: tuple[jax.Array | int, ...] = ()) -> jax.Array:
    """Return the sums with a gradient added at the given position, in the precision of the sums."""
    return write(sums, read(sums, *place) + grad.astype(sums.dtype), *place)


def add(sums: Any, grads: Any, place: tuple[jax.Array | int, ...] = ()) -> Any:
    """Return the sums with gradients added to them; whole numbers have neither, their sum is `None`."""

    def one(own: jax.Array | None, grad: Any) -> jax.Array | None:
        return None if own is None else _accumulate(own, grad, place)

    return jax.tree.map(one, sums, grads, is_leaf=_is_none)


def fill_whole(sums: Any, params: Any) -> Any:
    """Return the sums with zeros of their own type for whole numbers: a gradient for every parameter."""

    def one(own: jax.Array | None, param: jax.Array | None) -> jax.Array | None:
        # A `None` of the user's own, for a bias that is not there say, stays one.
        return jnp.zeros(param.shape, param.dtype) if own is None and param is not None else own

    return jax.tree.map(one, sums, params, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None
