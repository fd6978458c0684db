"""Sharding rules: the mesh axis, or axes, that each logical dimension is split over.

Layers name a dimension by its meaning ("heads"); this table maps the name to a mesh axis ("tensor"). Change the table
and the model is laid out differently, without a change to a layer. `ShardingRules.of` makes it for axes of other names,
by their roles. Read `sharding_table.py` next, or
`../layers/linear.py` for the use.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .axes import DEFAULT_AXES, MeshAxes, Role
from .build import check_axes
from .divisibility import check_divides
from .errors import ShardingError, suggest

Axes = str | tuple[str, ...] | None
"""Mesh axes that a dimension is split over: one, several with the first outermost, or None for no split."""

Dim = str | tuple[str, ...] | None
"""The name of an array dimension, several names where it is those dimensions merged, or None where it has no rule."""

_ROLES: dict[str, Role | None] = {
    "batch": "batch",  # and over those of experts, which hold other sequences too
    "tokens": "context",
    "stream_tokens": "context",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "latent": None,
    "lora": None,
    "attention_heads": "tensor",  # heads while attention mixes tokens
    "kept_keys": "context",  # tokens whose keys and values are kept for the backward
    "ffn": "tensor",
    "experts": "expert",
    "router": None,
    "vocab": "tensor",
    "positions": None,
    "chunk": None,
    "stage": "pipe",
    "layer": None,
    "microbatch": None,
}
"""The role of the axes that each dimension is split over; None where it is whole on every device."""


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """An immutable table from logical dimensions to mesh axes, and the roles of these axes.

    >>> DEFAULT_RULES.spec(("embed", "ffn"))
    P(None, 'tensor')
    >>> DEFAULT_RULES.replace(vocab=("pipe", "tensor")).spec(("vocab", "embed"))
    P(('pipe', 'tensor'), None)
    >>> ShardingRules.of(MeshAxes.of(pp="pipe", dp="batch", tp="tensor")).spec(("embed", "ffn"))
    P(None, 'tp')

    Raises:
        ShardingError: a rule names an axis that the mesh does not have.
    """

    table: tuple[tuple[str, Axes], ...]
    mesh_axes: MeshAxes = DEFAULT_AXES

    def __post_init__(self) -> None:
        for dim, value in self.table:
            for axis in _as_tuple(value):
                if axis not in self.mesh_axes.names:
                    raise ShardingError(
                        f"rule {dim!r} -> {axis!r}: unknown mesh axis {axis!r}; a mesh has {self.mesh_axes.listed}."
                        f"{suggest(axis, self.mesh_axes.names)}"
                    )

    @classmethod
    def of(cls, axes: MeshAxes) -> "ShardingRules":
        """Return the default rules for axes of any names: each dimension over the axes of its role.

        Two batch axes split the batch over both. With the default names these are `DEFAULT_RULES`.
        """
        # Axes that split experts split sequences or their tokens too.
        shared: dict[Role, tuple[str, ...]] = {"batch": axes.batch, "context": axes.context, "expert": axes.expert}
        own = {dim: shared.get(role, axes.having(role)) if role else () for dim, role in _ROLES.items()}
        table = {dim: _as_entry(names) for dim, names in own.items()}
        return cls(table=tuple(table.items()), mesh_axes=axes)

    def replace(self, **axes: Axes) -> "ShardingRules":
        """Return the rules with the given dimensions moved to other axes, or added."""
        return replace(self, table=tuple((dict(self.table) | axes).items()))

    def split_stream(self) -> "ShardingRules":
        """Return the rules with sequence parallelism: between layers, tokens are split over the axes that split heads.

        An all-gather before and a reduce-scatter behind the split layers take the place of all-reduces (Korthikanti et
        al. 2022, section 4.2.2). The number of tokens must divide.

        >>> DEFAULT_RULES.split_stream().spec(("batch", "stream_tokens", "embed"))
        P('data', 'tensor', None)
        """
        return self.replace(stream_tokens=_as_entry((*self.axes("tokens"), *self.axes("heads"))))

    def exchange_heads(self) -> "ShardingRules":
        """Return the rules with heads split over the axes of tokens too while attention mixes tokens.

        All-to-alls around attention of whole sequences take the place of gathers of keys and values (Jacobs et al.
        2023, section 3.1). The heads of a tensor rank must divide.
        """
        return self.replace(attention_heads=_as_entry((*self.axes("heads"), *self.axes("tokens"))))

    def keep_keys(self) -> "ShardingRules":
        """Return the rules with keys and values of all tokens kept for the backward, which else gathers them again."""
        return self.replace(kept_keys=None)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes over which layers gather and scatter tokens: those that split them between layers alone."""
        return tuple(axis for axis in self.axes("stream_tokens") if axis not in self.axes("tokens"))

    def check_axes(self, sizes: Mapping[str, int]) -> None:
        """Raise unless each axis of a mesh with several devices has a role.

        Raises:
            MeshError: with the axis.
        """
        check_axes(sizes, axes=self.mesh_axes)

    def axes(self, dim: Dim) -> tuple[str, ...]:
        """Return the mesh axes that a logical dimension is split over, the outermost first; usually one or none.

        Raises:
            ShardingError: the dimension has no rule.
        """
        if dim is None:
            return ()
        if isinstance(dim, tuple):
            return tuple(axis for own in dim for axis in self.axes(own))
        table = dict(self.table)
        if dim not in table:
            raise ShardingError(
                f"unknown dimension {dim!r}; the rules have {', '.join(table)}.{suggest(dim, table)}",
                fix=f"add it with rules.replace({dim}=None) or with a mesh axis.",
            )
        return _as_tuple(table[dim])

    def num_parts(self, dim: Dim, sizes: Mapping[str, int]) -> int:
        """Return the number of parts that a logical dimension is split into on a mesh of these sizes.

        >>> DEFAULT_RULES.num_parts("vocab", {"data": 2, "tensor": 4})
        4
        """
        return math.prod(sizes.get(axis, 1) for axis in self.axes(dim))

    def spec(self, dims: Sequence[Dim]) -> PartitionSpec:
        """Return the partition spec of an array with these logical dimensions.

        Raises:
            ShardingError: two dimensions are split over the same mesh axis, or one has no rule.
        """
        axes = [self.axes(dim) for dim in dims]
        # jax would refuse such a spec too, by the axis alone; here both dimensions are named.
        owner: dict[str, Dim] = {}
        for dim, axis in ((dim, axis) for dim, own in zip(dims, axes, strict=True) for axis in own):
            if axis in owner:
                raise ShardingError(
                    f"dimensions {owner[axis]!r} and {dim!r} of {tuple(dims)} are both split over {axis!r}; "
                    "an axis can split an array once.",
                    fix=f"map one of them to None with rules.replace({dim}=None).",
                )
            owner[axis] = dim
        return PartitionSpec(*map(_as_entry, axes))

    def sharding(self, dims: Sequence[Dim], *, shape: Sequence[int], mesh: Mesh, name: str = "array") -> NamedSharding:
        """Return the sharding of an array of `shape` with these logical dimensions, checked to divide evenly.

        Raises:
            ShardingError: a dimension is not a multiple of its mesh axis, or the number of dimensions differs.
        """
        self.check(dims, shape=shape, sizes=mesh.shape, name=name)
        return NamedSharding(mesh, self.spec(dims))

    def check(self, dims: Sequence[Dim], *, shape: Sequence[int], sizes: Mapping[str, int], name: str) -> None:
        """Raise unless every dimension of `shape` is a multiple of the size of its mesh axis.

        Raises:
            ShardingError: with the name of the array, the dimension and the equation.
        """
        if len(dims) != len(shape):
            raise ShardingError(
                f"{name} has {len(shape)} dimensions {tuple(shape)} but {len(dims)} names {tuple(dims)}.",
                fix="name every dimension once, None for one that has no rule.",
            )
        for dim, size in zip(dims, shape, strict=True):
            parts = self.num_parts(dim, sizes)
            check_divides(
                f"{name}: dimension {dim!r}",
                size,
                over=" x ".join(self.axes(dim)),
                parts=parts,
                error=ShardingError,
                fix=f"use a size that is a multiple of {parts}, or rules.replace({dim}=None) to replicate it.",
            )

    def constrain(self, x: jax.Array, dims: Sequence[Dim]) -> jax.Array:
        """Constrain the sharding of x on the mesh in context; without a mesh, return x.

        Axes that are manual here (inside `shard_map`) or of size 1 are left out: along them x is already a block.

        Raises:
            ShardingError: a dimension is not a multiple of its mesh axis.
        """
        self.check_in_context(dims, shape=x.shape, name="an activation")
        spec = [_as_entry(self.auto_axes(dim)) for dim in dims]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x

    def check_in_context(self, dims: Sequence[Dim], *, shape: Sequence[int], name: str) -> None:
        """Raise unless an array of `shape` splits evenly over the Auto axes of the mesh in context.

        Raises:
            ShardingError: a dimension is not a multiple of its mesh axis, or the number of dimensions differs.
        """
        mesh = jax.sharding.get_abstract_mesh()
        sizes = {axis: mesh.shape[axis] for dim in dims for axis in self.auto_axes(dim)}
        self.check(dims, shape=shape, sizes=sizes, name=name)

    def auto_axes(self, dim: Dim) -> tuple[str, ...]:
        """Return the axes of `dim` that are Auto in the mesh in context, left to the compiler; none of size 1."""
        mesh = jax.sharding.get_abstract_mesh()
        # Without a mesh in context, as in plain eager code, no axis splits anything.
        kinds = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        return tuple(axis for axis in self.axes(dim) if kinds.get(axis) == AxisType.Auto and mesh.shape[axis] > 1)


def split_first_free_dim(
    spec: PartitionSpec, *, shape: Sequence[int], axis: str | tuple[str, ...], size: int, start: int = 0
) -> PartitionSpec:
    """Return the spec with the first dimension split over `axis` that is not split yet and that `size` divides.

    Where there is none the array stays as it is, whole over that axis. The result has an entry for every dimension.

    >>> split_first_free_dim(PartitionSpec(None, "tensor"), shape=(6, 8), axis="data", size=2)
    P('data', 'tensor')

    Args:
        axis: the axis, or several that split the dimension together.
        size: number of devices along the axis, or along all of them.
        start: the first dimension that may be split.
    """
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    entry = _as_entry(_as_tuple(axis))
    free = (dim for dim in range(start, len(shape)) if entries[dim] is None and shape[dim] % size == 0)
    first = next(free, None)
    return PartitionSpec(*(entry if dim == first else own for dim, own in enumerate(entries)))


def _as_tuple(axes: Axes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes


def _as_entry(axes: tuple[str, ...]) -> Axes:
    """Return an entry of a partition spec: None for no axis, the axis itself for one."""
    if len(axes) > 1:
        return axes
    return axes[0] if axes else None


DEFAULT_RULES = ShardingRules.of(DEFAULT_AXES)
"""Batch over data; heads, feed-forward and vocabulary over tensor; stages over pipe; the rest replicated."""
