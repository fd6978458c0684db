"""Refuse collectives in the functions of a pipeline that some of the devices they need would not run.

    turn     rank 0                  rank 1
     3       layer: psum over pipe   idle         a deadlock: rank 0 waits for rank 1 inside its layer, and
             (waiting)               exchange     rank 1 waits for rank 0 at the end of the turn

A layer runs in a branch that one pipeline rank takes with all its data shards and tensor ranks. So it may sum and
gather over data and tensor, but not over pipe. A `ppermute` in it is always wrong: XLA lets all devices of the mesh
take part in one, and pairs devices that run different turns. The result is a deadlock, or values of another microbatch.
"""

from collections.abc import Iterator
from typing import Any, Literal

from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxprs_in_params

from ....meshes import ScheduleError
from ..backward.equations import nested_equations

_GROUPED = (
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
    "all_gather",
    "all_gather_invariant",
    "reduce_scatter",
    "all_to_all",
)
"""Collectives for which the devices of one group need no other devices."""

_LOCAL = ("axis_index", "pvary", "pcast")
"""Primitives that name an axis and send nothing."""


def check_collectives(name: str, jaxpr: Jaxpr, *, pipe: str, runs_on: Literal["all ranks", "one rank"]) -> None:
    """Raise for a collective in the function `name` that some of its devices would not run.

    `pipe` is the mesh axis of the pipeline.

    Raises:
        ScheduleError: naming the collective and its axes.
    """
    for eqn in nested_equations(jaxpr):
        axes = _axes_of(eqn)
        if not axes or eqn.primitive.name in _LOCAL or runs_on == "all ranks":
            continue
        what = f"{name}() runs {_public_name(eqn)} over {' and '.join(axes)}"
        if pipe in axes:
            hint = f"; first and last are run by all ranks where StageFns(shared_specs=...) names {pipe}"
            raise ScheduleError(
                f"{what}, but one rank of the pipe runs it alone: it would wait for the others forever.",
                fix=f"leave it out: a rank has what it needs{'' if name in ('layer', 'prepare') else hint}.",
            )
        if eqn.primitive.name not in _GROUPED:
            raise ScheduleError(
                f"{what}, but one rank of the pipe runs it alone, and XLA lets all devices take part in one: it would "
                "hang, or give numbers of another microbatch.",
                fix="use jax.lax.all_gather or jax.lax.all_to_all, in which each group of devices is on its own.",
            )


def check_branches(jaxpr: Jaxpr, *, name: str | None = None) -> None:
    """Raise for a collective in a branch or loop that not all of its devices take.

    A function may branch on its rank itself. The whole program (name=None) also holds the backward of the functions.

    Raises:
        ScheduleError: naming the collective and its axes.
    """
    for eqn, differs in _branched_equations(jaxpr, frozenset()):
        axes = frozenset(_axes_of(eqn))
        if not axes or not differs or eqn.primitive.name in _LOCAL:
            continue
        # Over axes along which the devices decide alike a grouped collective is fine: its whole group arrives.
        if axes & differs or eqn.primitive.name not in _GROUPED:
            what = "the gradient of a function" if name is None else f"{name}()"
            raise ScheduleError(
                f"{what} runs {_public_name(eqn)} over {' and '.join(sorted(axes))} in a branch or loop for which "
                f"devices along {' and '.join(sorted(differs))} may decide differently: those that take another way "
                "never reach it.",
                fix="move it out of the branch, so that all of them run it.",
            )


def _branched_equations(jaxpr: Jaxpr, differs: frozenset[str]) -> Iterator[tuple[JaxprEqn, frozenset[str]]]:
    """Yield all equations, each with the axes along which devices may differ in whether they run it."""
    for eqn in jaxpr.eqns:
        yield eqn, differs
        inside = differs | _decides_by(eqn)
        for inner in jaxprs_in_params(eqn.params):
            yield from _branched_equations(inner, inside)


def _decides_by(eqn: JaxprEqn) -> frozenset[str]:
    """Return the axes along which the choice of a branch, or the length of a loop, may differ."""
    if eqn.primitive.name == "cond":
        return _varying(eqn.invars[0])
    if eqn.primitive.name == "while":
        return _varying(eqn.params["cond_jaxpr"].jaxpr.outvars[0])
    return frozenset()


def _varying(v: Any) -> frozenset[str]:
    aval: Any = v.aval
    return frozenset(aval.mat.varying) if isinstance(v, Var) else frozenset()


def _axes_of(eqn: JaxprEqn) -> tuple[str, ...]:
    """Return the mesh axes that an equation names."""
    axes = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    entries = axes if isinstance(axes, tuple | list) else (axes,)
    # Sums over array dimensions have integers in the same parameter.
    return tuple(axis for axis in entries if isinstance(axis, str))


def _public_name(eqn: JaxprEqn) -> str:
    name = eqn.primitive.name.removesuffix("_invariant")
    return "psum_scatter" if name == "reduce_scatter" else name
