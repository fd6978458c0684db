"""Translate jax's errors about axes and shardings in a user's function into ours, with a fix."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jax.sharding import Mesh

from ....meshes import ScheduleError, ShardingError, suggest


@contextmanager
def explain_errors(name: str, mesh: Mesh) -> Iterator[None]:
    """Translate errors that jax raises about mesh axes in this context, while a function `name` is traced.

    Raises:
        ScheduleError: the function names an axis in a collective that is unknown, or that is left to the compiler.
        ShardingError: it constrains a sharding on another mesh, or over axes that are manual.
    """
    try:
        yield
    except NameError as error:
        unbound = re.search(r"unbound axis name: (\w+)", str(error))
        if unbound is None:
            raise
        raise _unbound(name, unbound[1], mesh) from error
    except ValueError as error:
        if not any(words in str(error) for words in _ABOUT_SHARDING):
            raise
        raise ShardingError(
            f"{name} constrains a sharding on a mesh of its own, or over an axis that is manual in a pipeline: pipe "
            "and data are manual, where each device sees its own layers and microbatch, and only tensor is left to the "
            "compiler.",
            fix="write jax.lax.with_sharding_constraint(x, PartitionSpec(...)) without a mesh, and name tensor alone.",
        ) from error


_ABOUT_SHARDING = (
    "with_sharding_constraint",
    "Axes mentioned in `manual_axis_type` field",
    "is not found in mesh",
)
"""Parts of jax's messages about a sharding constraint inside `shard_map` that names another mesh or a manual axis."""


def _unbound(name: str, axis: str, mesh: Mesh) -> ScheduleError:
    if axis in mesh.axis_names:
        return ScheduleError(
            f"{name} names the mesh axis {axis!r} in a collective; a pipeline leaves that axis to the compiler, "
            "which adds what must be sent.",
            fix=f"write the sharding instead: jax.lax.with_sharding_constraint(x, PartitionSpec(..., {axis!r})).",
        )
    return ScheduleError(
        f"{name} names an axis {axis!r} in a collective; inside a pipeline there are "
        f"{' and '.join(mesh.axis_names)}.{suggest(axis, mesh.axis_names)}",
        fix="name one of these, or bind the axis with jax.vmap(..., axis_name=...).",
    )
