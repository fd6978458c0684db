"""Check host callbacks in the functions of a pipeline: none has an order, and gradients know how its result differs.

A callback runs on each device once for each layer and microbatch that the device has. jax gives its result the type of
an array that is the same on all devices, whatever it was made from. A `custom_vjp` or `custom_jvp` that returns it so
would have its gradient summed over devices, several times what it should be: there the result must be marked.
"""

from typing import Any

from jax.extend.core import JaxprEqn, Var, jaxprs_in_params

from ....meshes import ScheduleError
from ..backward.equations import nested_equations

_NAMES = {"pure_callback": "jax.pure_callback", "io_callback": "jax.experimental.io_callback"}
_CUSTOM = ("custom_vjp_call", "custom_jvp_call")


def check_callbacks(name: str, jaxpr: Any) -> None:
    """Raise if the function `name` has an ordered callback, or returns one's result from a gradient rule unmarked.

    Raises:
        ScheduleError: naming the callback.
    """
    for eqn in nested_equations(jaxpr):
        if eqn.params.get("ordered"):
            raise ScheduleError(
                f"{name}() calls {_NAMES.get(eqn.primitive.name, 'jax.debug')} with ordered=True; jax keeps an order "
                "on one device alone.",
                fix="leave ordered out, and pass what tells the order.",
            )
        lost = _lost_axes(eqn)
        if eqn.primitive.name in _CUSTOM and lost and (callback := _callback_in(eqn)):
            raise ScheduleError(
                f"{name}() calls {callback} in a function with its own gradient; jax takes the result for the same on "
                f"all devices, though its input differs along {' and '.join(lost)}: its gradient would be summed over "
                "these.",
                fix="mark the result, by layers.collectives: mark_varying(result, varying_axes(x)).",
            )


def _lost_axes(eqn: JaxprEqn) -> list[str]:
    """Return the axes over which an operand of an equation varies, and some result does not."""
    given = frozenset[str]().union(*(_varying(v) for v in eqn.invars))
    return sorted({axis for v in eqn.outvars for axis in given - _varying(v)})


def _callback_in(eqn: JaxprEqn) -> str | None:
    inner = (one for jaxpr in jaxprs_in_params(eqn.params) for one in nested_equations(jaxpr))
    return next((_NAMES[one.primitive.name] for one in inner if one.primitive.name in _NAMES), None)


def _varying(v: Any) -> frozenset[str]:
    aval: Any = v.aval
    return frozenset(aval.mat.varying) if isinstance(v, Var) else frozenset()
