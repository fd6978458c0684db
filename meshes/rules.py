"""Sharding rules: which mesh axis each logical dimension is split over.

Layers say what a dimension *is* ("heads"); this table says where it *lives* ("tensor"). Change the table and the
model moves, without touching a layer. Read `describe.py` next, or `../layers/linear.py` for the use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from .errors import ShardingError, suggest
from .spec import AXES

_DEFAULT = {
    "batch": "data",
    "tokens": None,
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffn": "tensor",
    "vocab": "tensor",
    "positions": None,
    "chunk": None,
    "stage": "pipe",
    "layer": None,
    "microbatch": None,
}


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """An immutable table from logical dimension to mesh axis, or to None for "not split".

    >>> DEFAULT_RULES.spec(("embed", "ffn"))
    PartitionSpec(None, 'tensor')

    Raises:
        ShardingError: a rule names an axis that no mesh has.
    """

    table: tuple[tuple[str, str | None], ...]

    def __post_init__(self) -> None:
        for dim, axis in self.table:
            if axis is not None and axis not in AXES:
                raise ShardingError(
                    f"rule {dim!r} -> {axis!r}: unknown mesh axis {axis!r}; a mesh has data, tensor, pipe."
                    f"{suggest(axis, AXES)}"
                )

    def replace(self, **axes: str | None) -> "ShardingRules":
        """Return the rules with the given dimensions moved to other axes, or added."""
        return ShardingRules(table=tuple((dict(self.table) | axes).items()))

    def axis(self, dim: str | None) -> str | None:
        """Return the mesh axis that a logical dimension is split over, or None.

        Raises:
            ShardingError: no rule has this name.
        """
        if dim is None:
            return None
        table = dict(self.table)
        if dim not in table:
            raise ShardingError(
                f"unknown dimension {dim!r}; the rules have {', '.join(table)}.{suggest(dim, table)}",
                fix=f"add it with rules.replace({dim}=None) or with a mesh axis.",
            )
        return table[dim]

    def spec(self, dims: Sequence[str | None]) -> PartitionSpec:
        """Return the partition spec of an array with these logical dimensions.

        Raises:
            ShardingError: two dimensions want the same mesh axis, or one has no rule.
        """
        axes = [self.axis(dim) for dim in dims]
        for i, axis in enumerate(axes):
            if axis is not None and axis in axes[:i]:
                other = dims[axes.index(axis)]
                raise ShardingError(
                    f"dimensions {other!r} and {dims[i]!r} of {tuple(dims)} are both split over {axis!r}; "
                    "an axis can split an array once.",
                    fix=f"map one of them to None with rules.replace({dims[i]}=None).",
                )
        return PartitionSpec(*axes)

    def sharding(
        self, dims: Sequence[str | None], *, shape: Sequence[int], mesh: Mesh, name: str = "array"
    ) -> NamedSharding:
        """Return the sharding of an array of `shape` with these logical dimensions, checked to divide evenly.

        Raises:
            ShardingError: a dimension is no multiple of its mesh axis, or the number of dimensions differs.
        """
        self.check(dims, shape=shape, sizes=mesh.shape, name=name)
        return NamedSharding(mesh, self.spec(dims))

    def check(self, dims: Sequence[str | None], *, shape: Sequence[int], sizes: Mapping[str, int], name: str) -> None:
        """Raise unless every dimension of `shape` is a multiple of the size of its mesh axis.

        Raises:
            ShardingError: with the name of the array, the dimension and the equation.
        """
        if len(dims) != len(shape):
            raise ShardingError(
                f"{name} has {len(shape)} dimensions {tuple(shape)} but {len(dims)} names {tuple(dims)}.",
                fix="name every dimension once, None for one that has no rule.",
            )
        for dim, size, axis in zip(dims, shape, self.spec(dims), strict=True):
            parts = 1 if axis is None else sizes.get(axis, 1)
            if size % parts:
                raise ShardingError(
                    f"{name}: dimension {dim!r} of size {size} is split over {axis}={parts}, "
                    f"but {size} / {parts} = {size / parts:.2f}.",
                    fix=f"use a size that is a multiple of {parts}, or rules.replace({dim}=None) to replicate it.",
                )

    def constrain(self, x: jax.Array, dims: Sequence[str | None]) -> jax.Array:
        """Return x with the compiler told where its dimensions live, on the mesh of the context if there is one.

        Axes that are manual here (inside `shard_map`) or of size 1 are left out: on them x is already a block.
        """
        spec = [self.axis_in_context(dim) for dim in dims]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x

    def axis_in_context(self, dim: str | None) -> str | None:
        """Return the axis of `dim` if the mesh of the context leaves it to the compiler and it has several devices."""
        axis, mesh = self.axis(dim), jax.sharding.get_abstract_mesh()
        return axis if axis in _auto_axes(mesh) and mesh.shape[axis] > 1 else None

    def parts_in_context(self, dim: str) -> int:
        """Return into how many parts the compiler splits `dim` on the mesh of the context; 1 without a mesh."""
        axis = self.axis_in_context(dim)
        return 1 if axis is None else jax.sharding.get_abstract_mesh().shape[axis]


def _auto_axes(mesh: AbstractMesh) -> set[str]:
    if mesh.empty:
        return set()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


DEFAULT_RULES = ShardingRules(table=tuple(_DEFAULT.items()))
"""Batch over data; heads, feed-forward and vocabulary over tensor; stages over pipe; the rest replicated."""
