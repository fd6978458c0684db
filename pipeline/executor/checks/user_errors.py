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
        ScheduleError: the function names an axis that the mesh has not.
        ShardingError: it constrains a sharding.
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
            f"{name} constrains a sharding; inside a pipeline every axis of the mesh is manual: an array is one "
            "device's block, and the compiler splits and sends nothing by itself.",
            fix="leave the constraint out; split parameters by StageFns(stage_specs=...), and sum or gather blocks by "
            "the verbs of layers.collectives, sum_blocks(y, ['tensor']) say.",
        ) from error


_ABOUT_SHARDING = (
    "with_sharding_constraint",
    "Axes mentioned in `manual_axis_type` field",
    "is not found in mesh",
)
"""Parts of jax's messages about a sharding constraint inside `shard_map`."""


def _unbound(name: str, axis: str, mesh: Mesh) -> ScheduleError:
    return ScheduleError(
        f"{name} names an axis {axis!r} in a collective; inside a pipeline there are {', '.join(mesh.axis_names)}."
        f"{suggest(axis, mesh.axis_names)}",
        fix="name one of these, or bind the axis with jax.vmap(..., axis_name=...).",
    )
