"""Update kernels by Muon, each matrix whole on one device: layers are exchanged for the parts of their kernels.

Muon (Jordan 2024) sets the singular values of a kernel's momentum near 1 by five products of the matrix with itself,
scaled to the size of an AdamW update (Liu et al. 2025, section 2.2). On a mesh no device has a whole kernel:

    momentum     [layers, D, F@tensor]     a part of every layer's kernel
    exchanged    [layers@tensor, D, F]     whole kernels of some layers: one all-to-all
    orthogonal   [layers@tensor, D, F]     products of whole matrices on one device, nothing sent
    update       [layers, D, F@tensor]     one all-to-all back

For example 8B with tensor=4 and 16 layers on a device: of each layer's gate [4096, 14336] it has 3,584 columns, 0.94 GB
in all. Exchanged it has the whole gates of 4 layers, as many bytes, and sends three quarters of them back.

Axes along which kernels are whole divide the layers too, and gather the updates. Layers that do not divide evenly are
padded with zeros. Left to the compiler, D x D products of parts are summed over `tensor` five times a kernel, and every
device computes what follows a sum.
Read `optimizer.py` for the use.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import NamedSharding
from optax.contrib import MuonState

from ...layers.collectives import gather_blocks

_ADAMW_RMS = 0.2
"""Root mean square of an AdamW update over the learning rate, to which Muon's is scaled (Liu et al. 2025)."""

_MOMENTUM = 0.95
_AT_ONCE = 2**24
"""Entries of the matrices that are multiplied together: single ones of a small model would leave a GPU idle."""


def make_muon(
    rate: Callable[[Any], Any], *, weight_decay: float, shardings: Any = None
) -> optax.GradientTransformation:
    """Return Muon for kernels [chunks, ranks@pipe, layers, ..., D, F], with the state of `optax.contrib.muon`.

    Args:
        rate: step -> learning rate.
        shardings: a `NamedSharding` for each kernel's gradient, momentum and update, in a tree that has these kernels
            among others. Left out, kernels are whole.
    """
    parts = optax.chain(
        _nesterov_momentum(),
        optax.stateless(partial(_orthogonalize_all, shardings=shardings)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    # Named as `optax.contrib.muon` names its state, which also has an Adam for no parameters: saved runs have both.
    both: Any = {"muon": parts, "adam": optax.adamw(rate)}
    return optax.partition(both, lambda params: jax.tree.map(lambda _: "muon", params))


def _nesterov_momentum() -> optax.GradientTransformation:
    """Return the momentum of Muon, with Nesterov's look ahead and without the bias of its start from 0."""
    whole: Any = optax.contrib.scale_by_muon(beta=_MOMENTUM)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        moments = optax.tree.update_moment(updates, state.mu, _MOMENTUM, 1)
        ahead = jax.tree.map(
            lambda moment, grad: _MOMENTUM * moment + (1 - _MOMENTUM) * grad,
            optax.tree.bias_correction(moments, _MOMENTUM, optax.safe_increment(count)),
            optax.tree.bias_correction(updates, _MOMENTUM, count),
        )
        return ahead, MuonState(count=count, mu=moments, ns_coeffs=state.ns_coeffs)

    return optax.GradientTransformation(whole.init, update)


def _orthogonalize_all(kernels: Any, params: Any = None, *, shardings: Any) -> Any:
    """Return updates for a tree of momenta, one after another: a device has the matrices of one at a time."""
    del params
    sharding_of = dict(jax.tree_util.tree_leaves_with_path(shardings))
    leaves, structure = jax.tree_util.tree_flatten_with_path(kernels)
    found: list[jax.Array] = []
    for path, leaf in leaves:
        momentum = jax.lax.optimization_barrier((leaf, found[-1]))[0] if found else leaf
        found.append(_orthogonalize(momentum, sharding_of.get(path)))
    return jax.tree.unflatten(structure, found)


def _orthogonalize(momentum: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Return the update of a stack of kernels [chunks, ranks, layers, ..., D, F]."""
    if sharding is None:
        return _orthogonal_matrices(momentum.reshape(-1, *momentum.shape[-2:])).reshape(momentum.shape)
    mesh, spec = sharding.mesh, sharding.spec
    run = partial(_exchange_and_orthogonalize, **_divide_layers(sharding, momentum.ndim))
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)(momentum)


def _divide_layers(sharding: NamedSharding, ndim: int) -> dict[str, Any]:
    """Return how the layers of a device are divided: the axes that have them all, and (axis, its dim) of the others."""
    sizes = {axis: size for axis, size in sharding.mesh.shape.items() if size > 1}
    named = [() if own is None else own if isinstance(own, tuple) else (own,) for own in sharding.spec]
    named += [()] * (ndim - len(named))
    whole = {axis: size for axis, size in sizes.items() if not any(axis in own for own in named)}
    # A part is that of its major axis first; exchanged last axis first, it grows by its neighbours.
    split = [(axis, dim) for dim in (1, 2) for axis in reversed(named[ndim - 3 + dim]) if axis in sizes]
    return {"whole": whole, "split": split, "ways": math.prod([*whole.values(), *(sizes[axis] for axis, _ in split)])}


def _exchange_and_orthogonalize(
    block: jax.Array, *, whole: dict[str, int], split: list[tuple[str, int]], ways: int
) -> jax.Array:
    """Return a device's block of the update, inside `shard_map`; `ways` is by how many devices layers are divided."""
    own = block.reshape(-1, *block.shape[-2:])
    num_layers = own.shape[0]
    own = jnp.pad(own, ((0, -num_layers % ways), (0, 0), (0, 0)))
    for axis, size in whole.items():
        each = own.shape[0] // size
        own = jax.lax.dynamic_slice_in_dim(own, jax.lax.axis_index(axis) * each, each)
    for axis, dim in split:
        own = jax.lax.all_to_all(own, axis, split_axis=0, concat_axis=dim, tiled=True)
    own = _orthogonal_matrices(own)
    for axis, dim in reversed(split):
        own = jax.lax.all_to_all(own, axis, split_axis=dim, concat_axis=0, tiled=True)
    for axis in reversed(whole):
        own = gather_blocks(own, (axis,), dim=0)
    return own[:num_layers].reshape(block.shape)


def _orthogonal_matrices(matrices: jax.Array) -> jax.Array:
    """Return matrices [n, D, F] with their singular values near 1, times what makes them as large as AdamW's update."""
    at_once = max(1, _AT_ONCE // math.prod(matrices.shape[1:]))
    scale = _ADAMW_RMS * math.sqrt(max(matrices.shape[1:]))
    if matrices.shape[0] <= at_once:
        return scale * jax.vmap(_orthogonal)(matrices)
    return scale * jax.lax.map(_orthogonal, matrices, batch_size=at_once)


def _orthogonal(matrix: jax.Array) -> jax.Array:
    """Return a matrix [D, F] with its singular values near 1, by optax's five Newton-Schulz iterations."""
    # Without momentum that is all of it.
    alone: Any = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
    return alone.update(matrix, alone.init(matrix))[0]
