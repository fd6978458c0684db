"""Check trees given by users, leaf by leaf: arrays, and the partition specs that belong to them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ...meshes import ScheduleError, ShardingError
from ...meshes.axes import MeshAxes


def check_arrays(name: str, tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by name, such as `batch['x']`, after checking that each is an array of numbers.

    Raises:
        ScheduleError: a leaf is a Python number, a string or an array of objects.
    """
    leaves = {f"{name}{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for each, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise ScheduleError(
                f"{each} is a {type(leaf).__name__}, not an array.", fix="make it one: jnp.asarray(...)."
            )
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "OSUMm":
            raise ScheduleError(f"{each} is an array of {leaf.dtype}, not of numbers.", fix="give numbers.")
    return leaves


def mesh_axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """Return the mesh axes that a partition spec names, in order."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    return tuple(axis for entry in entries for axis in entry if axis is not None)


def kept_axes(entry: Any, axes: MeshAxes) -> tuple[str, ...]:
    """Return the axes over which an entry of a spec keeps a dimension split that is gathered for use.

    Those are axes over which gradients are summed, ("data", "expert") say. An entry of expert axes alone names the
    device's own experts, which it uses as they are.
    """
    named = mesh_axes_of(PartitionSpec(entry))
    is_own = set(named) <= set(axes.expert)
    return () if is_own else tuple(axis for axis in named if axis in axes.summed)


def spread_specs(name: str, specs: Any, tree: Any, *, of: str) -> Any:
    """Return a partition spec for every leaf of the tree, given a prefix of it.

    Raises:
        ShardingError: the specs are not a prefix of the tree, or not of type `PartitionSpec`.
    """
    is_spec = lambda node: isinstance(node, PartitionSpec) or node is None  # noqa: E731
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec):
        if not isinstance(spec, PartitionSpec):
            raise ShardingError(
                f"{name}{jax.tree_util.keystr(path)} is {spec!r}, not a PartitionSpec.", fix="write P() for whole."
            )
    try:
        return jax.tree.broadcast(specs, tree, is_leaf=is_spec)
    except ValueError as error:
        raise ShardingError(
            f"{name} has the tree {jax.tree.structure(specs, is_leaf=is_spec)}, but {of} has "
            f"{jax.tree.structure(tree)}.",
            fix=f"give a PartitionSpec for every leaf of {of}, or one for all.",
        ) from error


def on_mesh(specs: Any, mesh: Mesh) -> Any:
    """Return partition specs without axes that the mesh lacks or has one device of."""

    def one(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(_keep_split(entry, mesh) for entry in spec))

    return jax.tree.map(one, specs, is_leaf=lambda node: isinstance(node, PartitionSpec))


def _keep_split(entry: Any, mesh: Mesh) -> Any:
    axes = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(axis for axis in axes if axis is not None and mesh.shape.get(axis, 1) > 1)
    return kept or None
