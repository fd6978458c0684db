"""Sum over mesh axes inside layers, in the forward or in the backward.

Tensor parallelism leaves most sums to the compiler, which sees that a matmul's contracted dimension is split. Inside
`shard_map` nothing is left to it along manual axes, and there an array's type says over which of them its value varies
(`jax.typeof(x).mat.varying`). Such a type changes in two ways, each the other's transpose:

                        forward                          backward
    mark_varying        x is the same everywhere: free   dx is summed over the axes: an all-reduce
    psum                partial sums become one sum      dy is the same everywhere: free

Read `linear.py` next.
"""

import jax
import jax.numpy as jnp


def varying_axes(*arrays: jax.Array, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the manual axes over which any of these arrays varies; none outside `shard_map`."""
    found = (axis for array in arrays for axis in jax.typeof(array).mat.varying)
    return tuple(dict.fromkeys(axis for axis in found if axis not in without))


def mark_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return x with its type marked as varying over manual axes on which its value is still the same.

    The forward costs nothing. The gradient is summed over the axes, one all-reduce, in float32: XLA's CPU backend
    aborts on bfloat16 sums over manual axes.
    """
    known = varying_axes(x)
    missing = tuple(axis for axis in axes if axis not in known)
    return jax.lax.pcast(x.astype(jnp.float32), missing, to="varying").astype(x.dtype) if missing else x


def sum_like(grad: jax.Array, primal: jax.Array) -> jax.Array:
    """Sum a gradient over the manual axes on which its primal does not vary: one all-reduce, or none.

    A `custom_vjp` owes this to each of its inputs; autodiff does it by itself.
    """
    axes = varying_axes(grad, without=varying_axes(primal))
    return jax.lax.psum(grad, axes) if axes else grad


@jax.custom_vjp
def hide_reduction(x_BTD: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x and a column-split kernel unchanged, and tie their gradients so that XLA overlaps them.

    The gradient of x is all-reduced; that of the kernel is a product that does not depend on the all-reduce. With a
    barrier on both, XLA schedules the product between the start and the end of the all-reduce, as Megatron-LM's layers
    do by hand. Without it, the product is scheduled elsewhere and the all-reduce is exposed.
    """
    return x_BTD, kernel


hide_reduction.defvjp(lambda *both: (both, None), lambda _, grads: jax.lax.optimization_barrier(grads))
