"""Refuse host callbacks that return a result in the functions of a pipeline; `jax.debug` callbacks are allowed.

XLA compiles a `pure_callback` or an `io_callback` only where every axis of the mesh is manual, and `tensor` is not.
`jax.debug.print` and `jax.debug.callback` run on each device of pipe x data, once for each microbatch and layer.
"""

from typing import Any

from ....meshes import ScheduleError
from ..backward.equations import nested_equations

_ANSWERING = ("pure_callback", "io_callback")


def check_callbacks(name: str, jaxpr: Any) -> None:
    """Raise if the function `name` reads a result from the host, or has an ordered callback.

    Raises:
        ScheduleError: naming the callback.
    """
    for eqn in nested_equations(jaxpr):
        primitive = eqn.primitive.name
        if primitive in _ANSWERING:
            raise ScheduleError(
                f"{name}() calls jax.{'experimental.' * (primitive == 'io_callback')}{primitive}; XLA compiles it only "
                "where all axes of a mesh are manual, and a pipeline leaves tensor to the compiler.",
                fix="compute it in jax, or before the step and pass it in the batch; jax.debug.callback may watch.",
            )
        if eqn.params.get("ordered"):
            raise ScheduleError(
                f"{name}() calls jax.debug with ordered=True; jax keeps an order on one device alone.",
                fix="leave ordered out, and print with it what tells the order.",
            )
