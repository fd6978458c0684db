"""What the mesh in context says of its axes: which are manual, how many blocks they cut, over which a value differs.

The verbs of `../layers/collectives.py` ask, and layers and the executor where they need a number of blocks, a mark, or
a barrier between values of several types.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType

from .device_kind import is_nvidia


def block_index(axes: Sequence[str]) -> jax.Array | int:
    """Return the number of this device's block among those that the axes cut a dimension into; 0 for a whole one."""
    manual = manual_axes(axes)
    return jax.lax.axis_index(manual) if manual else 0


def num_blocks(axes: Sequence[str]) -> int:
    """Return the number of blocks that the axes cut a dimension into, on the mesh in context; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in _names(axes))


def num_manual_blocks(axes: Sequence[str]) -> int:
    """Return the number of blocks like this device's, inside `shard_map`: the whole is that many times as large."""
    return jax.lax.axis_size(manual) if (manual := manual_axes(axes)) else 1


def manual_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Return those of the axes that are manual in the mesh in context and have more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in _names(axes) if kinds.get(axis) == AxisType.Manual and mesh.shape[axis] > 1)


def _names(axes: Sequence[str]) -> Sequence[str]:
    """Return the names of axes; one name may be given by itself, as jax's collectives take it."""
    return (axes,) if isinstance(axes, str) else axes


def varying_axes(*arrays: jax.Array, without: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the manual axes over which any of these arrays varies; none outside `shard_map`."""
    found = (axis for array in arrays for axis in jax.typeof(array).mat.varying)
    return tuple(dict.fromkeys(axis for axis in found if axis not in without))


def mark_varying(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Return x with its type marked as varying over axes on which its value is the same: x -> x{V:axes}.

    Free; its transpose sums the gradient over the axes, one all-reduce.
    """
    known = varying_axes(x)
    missing = tuple(axis for axis in axes if axis not in known)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def sum_like(grad: jax.Array, primal: jax.Array) -> jax.Array:
    """Sum a gradient over the manual axes on which its primal does not vary: one all-reduce, or none.

    A `custom_vjp` owes this to each of its inputs; autodiff does it by itself.
    """
    axes = varying_axes(grad, without=varying_axes(primal))
    return jax.lax.psum(grad, axes) if axes else grad


def hold(values: Any, *, until: Any) -> tuple[Any, Any]:
    """Return both, of which XLA for GPUs computes nothing with the values before what is waited for is there too."""
    return end_together(values, until) if is_nvidia() else (values, until)


def end_together(one: Any, other: Any) -> tuple[Any, Any]:
    """Return two trees of which nothing is used before both are there."""
    # Before jax 0.12 a barrier takes values of one type alone. Delete with Python 3.11.
    is_mixed = len({frozenset(varying_axes(leaf)) for leaf in jax.tree.leaves((one, other))}) > 1
    return (one, other) if is_mixed and jax.__version_info__ < (0, 12) else jax.lax.optimization_barrier((one, other))
