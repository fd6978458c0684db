"""Sum the squared norms of the gradients that each data shard has by itself, before they are summed over shards.

The noise of gradients is told by their norms at two batch sizes (McCandlish et al. 2018, appendix A.1), and a shard's
own gradient is that of a smaller batch. With two shards, of gradients g0 and g1:

    what is returned   |g0|^2 + |g1|^2                 from the sums that each shard has before `sum_once`
    the whole batch    |g0 + g1|^2

Each device squares what it holds. A parameter that tensor ranks hold in parts is squared in parts; one that they all
hold whole is squared by all, and counts by its share. Read `sharded.py` for the sums themselves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ....meshes import ScheduleError
from ....meshes.device_axes import mark_varying
from ...model.frozen import keep_trained, trained_mask
from ...model.stage import PipelineParams, StageFns
from ...model.trees import mesh_axes_of
from .sharded import is_float, specs_of


def check_shard_squares(fns: StageFns, mesh: Mesh) -> None:
    """Raise unless each data shard has a gradient of its own, whole before it is summed over the shards.

    Raises:
        ScheduleError: there is one shard, or gradients are never there shard by shard.
    """
    sizes, axes = mesh.shape, fns.axes
    apart = {axis: sizes.get(axis, 1) for axis in (*axes.context, *axes.expert)}
    split = [f"{axis}={size}" for axis, size in apart.items() if size > 1]
    if math.prod(sizes.get(axis, 1) for axis in axes.batch) == 1:
        problem, fix = "one data shard has the gradient of the whole batch, and none of a smaller one", "use two shards"
    elif split:
        problem = f"with {' '.join(split)} no device has the whole gradient of its own sequences"
        fix = "use a mesh without these axes"
    elif fns.gather != "step":
        problem, fix = f"gather={fns.gather!r} sums gradients over the shards layer by layer", "use gather='step'"
    elif sizes.get(axes.pipe, 1) > 1 and not fns.ends_together:
        problem = (
            "embedding and head are whole on every rank, and their gradients are summed over ranks and shards at once"
        )
        fix = f"split a leaf of params.shared over {axes.pipe}"
    else:
        return
    raise ScheduleError(f"shard_squares='on': {problem}.", fix=f"leave shard_squares out, or {fix}.")


def sum_shard_squares(
    fns: StageFns,
    grads: PipelineParams,
    *,
    params: PipelineParams,
    sizes: Mapping[str, int],
    summed: Sequence[str],
    tokens: Sequence[str],
) -> jax.Array:
    """Return the sum over data shards of the squared norm of a shard's gradient, float32[], the same on all devices.

    grads.stages [C, k, ...] and grads.shared are those that `sum_once` takes. Costs an all-reduce of one number; where
    tokens are split over tensor, also one over it of the gradients of what is whole there (norms, biases).

    Args:
        sizes: of the mesh axes with more than one device.
    """
    specs = keep_trained(specs_of(fns, params), trained_mask(fns.frozen, params))
    pipe = tuple(axis for axis in (fns.axes.pipe,) if axis in sizes)
    parts = [(grads.stages, specs.stages, pipe), (grads.shared, specs.shared, ())]
    given: dict[str, Any] = {"sizes": sizes, "summed": summed, "tokens": tokens}
    total = sum((_sum_squares(*part, **given) for part in parts), jnp.zeros((), jnp.float32))
    return jax.lax.psum(mark_varying(total, tuple(sizes)), tuple(sizes))


def _sum_squares(
    tree: Any, specs: Any, own: Sequence[str], *, sizes: Mapping[str, int], summed: Sequence[str], tokens: Sequence[str]
) -> jax.Array:
    """Return this device's share of the squares of the leaves, which differ along the axes `own` and their specs'."""
    total = jnp.zeros((), jnp.float32)
    for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True):
        # Gradients of integers are zeros.
        if not is_float(leaf):
            continue
        named = (*own, *mesh_axes_of(spec))
        over = tuple(axis for axis in tokens if axis not in named)
        whole = (jax.lax.psum(leaf, over) if over else leaf).astype(jnp.float32)
        copies = math.prod(size for axis, size in sizes.items() if axis not in (*named, *summed))
        total = total + jnp.sum(whole * whole) / copies
    return total


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)
