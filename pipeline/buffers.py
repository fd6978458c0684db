"""The few operations on buffers that the executor is made of."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

Carry = dict[str, Any]
"""What the loop carries: buffers and sums by name."""

Row = dict[str, jax.Array]
"""One turn: this rank's entry of every column of the tables."""


def vary(x: jax.Array, axes: tuple[str, ...] = ("pipe", "data")) -> jax.Array:
    """Return x marked as differing over those of the axes that are manual and of size > 1."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = [axis for axis, kind in kinds if kind == AxisType.Manual and mesh.shape[axis] > 1 and axis in axes]
    missing = tuple(axis for axis in manual if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros_for(param: jax.Array) -> jax.Array | None:
    """Return a float32 sum for the gradients of a parameter, differing over the same axes; none for whole numbers."""
    if not jnp.issubdtype(param.dtype, jnp.inexact):
        return None
    return vary(jnp.zeros(param.shape, jnp.float32), tuple(jax.typeof(param).mat.varying))


def read(tree: Any, *place: jax.Array | int) -> Any:
    """Return every leaf at the given position of its leading dimensions."""

    def one(leaf: jax.Array) -> jax.Array:
        starts = (*place, *[0] * (leaf.ndim - len(place)))
        inner = leaf.shape[len(place) :]
        return jax.lax.dynamic_slice(leaf, starts, (*[1] * len(place), *inner)).reshape(inner)

    return jax.tree.map(one, tree)


def write(buffer: jax.Array, value: jax.Array, *place: jax.Array | int) -> jax.Array:
    """Return the buffer with the value at the given position of its leading dimensions."""
    starts = (*place, *[0] * value.ndim)
    return jax.lax.dynamic_update_slice(buffer, value.reshape(*[1] * len(place), *value.shape), starts)


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

    def one(own: jax.Array | None, param: jax.Array) -> jax.Array:
        return jnp.zeros(param.shape, param.dtype) if own is None else own

    return jax.tree.map(one, sums, params, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def leave(carry: Carry, buffer: str, value: jax.Array, slot: jax.Array) -> Carry:
    """Return the carry with a result put where it waits, unless nobody wants it: slot is -1."""
    return carry | {buffer: jax.lax.cond(slot < 0, lambda b: b, lambda b: write(b, value, slot), carry[buffer])}
