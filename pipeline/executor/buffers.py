"""Operations on buffers and gradient sums inside `shard_map`, and marks of the mesh axes over which arrays vary.

Inside `shard_map` with `check_vma=True` every array has a type that says over which manual axes its value differs. The
carry of a loop must keep that type, so buffers and sums are marked as varying before the loop starts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...meshes.device_axes import mark_varying


def vary_like(tree: Any, other: Any) -> Any:
    """Return every leaf marked as varying over the axes over which its like in another tree varies, besides its own."""
    return jax.tree.map(lambda x, like: mark_varying(x, sorted(jax.typeof(like).mat.varying)), tree, other)


def type_of(v: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and varying axes of a traced value. A sum over data, say, does not vary over data."""
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, manual_axis_type=v.aval.mat)


def type_like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and varying axes of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).mat)


def empty_buffer(kept: jax.ShapeDtypeStruct, *slots: int, fill: float = 0) -> jax.Array:
    """Return a buffer [*slots, ...] for arrays of a type, varying over the same axes as they do."""
    differs: Any = kept.manual_axis_type
    return mark_varying(jnp.full((*slots, *kept.shape), fill, kept.dtype), sorted(differs.varying))


def floats_of(tree: Any) -> list[Any]:
    """Return the leaves of a tree that have gradients, those of floating-point numbers."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def zeros_for(param: jax.Array, is_trained: bool = True) -> jax.Array | None:
    """Return zeros in float32 to sum the gradients of a parameter in, varying over its axes; None if it has none."""
    if not is_trained or not jnp.issubdtype(param.dtype, jnp.inexact):
        return None
    return mark_varying(jnp.zeros(param.shape, jnp.float32), sorted(jax.typeof(param).mat.varying))


def read(tree: Any, *place: jax.Array | int) -> Any:
    """Return every leaf [..., *inner] at a position of its leading dimensions, as [*inner]."""
    return jax.tree.map(lambda leaf: _slice(leaf, place).reshape(leaf.shape[len(place) :]), tree)


def write(tree: Any, values: Any, *place: jax.Array | int) -> Any:
    """Return every leaf [..., *inner] with a value [*inner] at a position of its leading dimensions."""
    return jax.tree.map(
        lambda leaf, value: _update(leaf, value.reshape(*[1] * len(place), *value.shape), place), tree, values
    )


def write_if(is_written: jax.Array, tree: Any, values: Any, *place: jax.Array | int) -> Any:
    """Return every leaf with a value [*inner] at a position, as `write`, or unchanged where a bool [] says so."""

    def one(leaf: jax.Array, value: jax.Array) -> jax.Array:
        own = _slice(leaf, place)
        return _update(leaf, jnp.where(is_written, value.reshape(own.shape), own), place)

    return jax.tree.map(one, tree, values)


def _slice(leaf: jax.Array, place: tuple[jax.Array | int, ...]) -> jax.Array:
    """Return a leaf [..., *inner] at a position of its leading dimensions, as [1, ..., *inner]."""
    sizes = (*[1] * len(place), *leaf.shape[len(place) :])
    return jax.lax.dynamic_slice(leaf, _starts(place, leaf.ndim), sizes, allow_negative_indices=False)


def _update(leaf: jax.Array, value: jax.Array, place: tuple[jax.Array | int, ...]) -> jax.Array:
    """Return a leaf [..., *inner] with a value [1, ..., *inner] at a position of its leading dimensions."""
    return jax.lax.dynamic_update_slice(leaf, value, _starts(place, leaf.ndim), allow_negative_indices=False)


def _starts(place: tuple[jax.Array | int, ...], ndim: int) -> list[Any]:
    """Return start indices of one integer type, also where jax_enable_x64 makes Python integers 64 bits wide."""
    starts = (*place, *[0] * (ndim - len(place)))
    return [np.int32(start) if isinstance(start, int) else start.astype(jnp.int32) for start in starts]


def _accumulate(sums: jax.Array, grad: jax.Array, place: tuple[jax.Array | int, ...] = ()) -> jax.Array:
    """Return the sums with a gradient added at a position, in the dtype of the sums."""
    # The gradient gets the shape of the slice, not the slice that of the gradient: with a reshape between its read and
    # its write XLA writes the slice out, and this sum takes twice the time.
    own = _slice(sums, place)
    return _update(sums, own + grad.reshape(own.shape).astype(sums.dtype), place)


def add(sums: Any, grads: Any, place: tuple[jax.Array | int, ...] = ()) -> Any:
    """Return the sums with gradients added at a position; None stays None, where there is no gradient."""

    def one(own: jax.Array | None, grad: Any) -> jax.Array | None:
        return None if own is None else _accumulate(own, grad, place)

    return jax.tree.map(one, sums, grads, is_leaf=_is_none)


def fill_integers(sums: Any, params: Any) -> Any:
    """Return the sums with zeros in place of None for integer parameters: a gradient for every parameter."""

    def one(own: jax.Array | None, param: jax.Array | None) -> jax.Array | None:
        # A None of the user's own tree, say for an absent bias, stays None.
        return jnp.zeros(param.shape, param.dtype) if own is None and param is not None else own

    return jax.tree.map(one, sums, params, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None
