"""Translate jax's errors about axes and shardings in a user's function into ours, with a fix."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jax.sharding import Mesh

from ....meshes import ScheduleError, ShardingError
from ....meshes.errors import suggest


@contextmanager
def explain_errors(name: str, mesh: Mesh) -> Iterator[None]:
    """Translate errors that jax raises about mesh axes in this context, while a function `name` is traced.

    Other errors of the function are passed on, with a note of what it was given.

    Raises:
        ScheduleError: the function names an axis that the mesh has not, or sums over axes along which its operand is
            the same on all devices beside some along which it differs.
        ShardingError: it constrains a sharding.
    """
    try:
        yield
    except (TypeError, ValueError, NameError, AssertionError) as error:
        explained = _explain(error, name, mesh)
        if explained is not None:
            raise explained from error
        error.add_note(f"Raised in {name}, which a pipeline traces on one device's blocks of its arguments.")
        raise


def _explain(error: Exception, name: str, mesh: Mesh) -> ScheduleError | ShardingError | None:
    text = str(error)
    if isinstance(error, NameError) and (unbound := re.search(r"unbound axis name: (\w+)", text)):
        return _unbound(name, unbound[1], mesh)
    if isinstance(error, AssertionError) and (axis := _asserted_axis(error, mesh)):
        return _unbound(name, axis, mesh)
    if mixed := _MIXED.search(text):
        return _mixed(name, mixed, mesh)
    if isinstance(error, ValueError) and any(words in text for words in _ABOUT_SHARDING):
        return ShardingError(
            f"{name} constrains a sharding; inside a pipeline every axis of the mesh is manual: an array is one "
            "device's block, and the compiler splits and sends nothing by itself.",
            fix="leave the constraint out; split parameters by StageFns(stage_specs=...), and sum or gather blocks by "
            "the verbs of layers.collectives, sum_blocks(y, ['tensor']) say.",
        )
    return None


_ABOUT_SHARDING = (
    "with_sharding_constraint",
    "Axes mentioned in `manual_axis_type` field",
    "is not found in mesh",
)
"""Parts of jax's messages about a sharding constraint inside `shard_map`."""


_MIXED = re.compile(r"lax\.(\w+) can only accept .*input type: (.*?\])(?:\{V:\(?([\w,]*)\)?\})?, axes: \((.*?)\) and")
"""jax's message about a sum over axes along some of which the operand is the same: verb, type, varying axes, axes."""


def _asserted_axis(error: AssertionError, mesh: Mesh) -> str | None:
    """Return the axis that is not the mesh's where jax asserts, without words, that it knows the axes of a mark."""
    # So do psum, pmax, ppermute and pcast in jax 0.10 and 0.12; other collectives raise a NameError.
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    axes = trace.tb_frame.f_locals.get("axes", ()) if trace is not None else ()
    return next((axis for axis in axes if isinstance(axis, str) and axis not in mesh.axis_names), None)


def _mixed(name: str, found: re.Match[str], mesh: Mesh) -> ScheduleError:
    verb, kind, varying, asked = found.groups(default="")
    axes = re.findall(r"\w+", asked)
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown:
        return _unbound(name, unknown[0], mesh)
    same = [axis for axis in axes if axis not in varying.split(",")]
    others = tuple(axis for axis in axes if axis not in same)
    sizes = " ".join(f"{axis}={mesh.shape[axis]}" for axis in same)
    return ScheduleError(
        f"{name} runs {verb} over {' and '.join(axes)} of a {kind} that differs along {' and '.join(others)} alone; it "
        f"is the same on all devices along {sizes}.",
        fix=f"name {' and '.join(others)} alone, or use layers.collectives.sum_blocks, which leaves out axes of one "
        "device.",
    )


def _unbound(name: str, axis: str, mesh: Mesh) -> ScheduleError:
    return ScheduleError(
        f"{name} names an axis {axis!r} in a collective; inside a pipeline there are {', '.join(mesh.axis_names)}."
        f"{suggest(axis, mesh.axis_names)}",
        fix="name one of these, or bind the axis with jax.vmap(..., axis_name=...).",
    )
