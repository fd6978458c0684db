"""Check which derivatives of a pipeline are asked for, and raise a readable error for those it does not have.

first derivative in params and batch       computed by the schedule itself
second derivative in params and batch      taken by jax through the executor, with a limit (`check_second`)
any derivative in arrays that a function   refused: see below
closes over, or in the state of layers

Parameters and batch are marked as varying before the loop over turns, so their gradients are summed over devices once,
after it. An array that a function closes over is marked where the function uses it: jax would sum its gradient there,
in a branch that one rank takes alone, and that rank would wait for the others forever.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ...meshes import ScheduleError
from ...schedules import Schedule
from ..model.stage import PipelineParams, StageFns
from .microbatches import Inputs

Tangents = tuple[PipelineParams, Inputs, dict[int, Any]]
"""Tangents of the parameters, of the batch, and of arrays that functions close over (by `id`)."""


def watch_derivatives(inputs: Any, *, check: Callable[[Tangents], None]) -> Any:
    """Return the inputs unchanged; when they are differentiated, call `check` with their tangents."""

    @jax.custom_jvp
    def same(inputs: Any) -> Any:
        return inputs

    def rule(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        check(tangents[0])
        # Tangents that are numpy arrays become constants of the program, of a kind that jax does not compile.
        own = jax.tree.map(lambda tangent: tangent if _is_zero(tangent) else jnp.asarray(tangent), tangents[0])
        return primals[0], own

    same.defjvp(rule, symbolic_zeros=True)
    return same(inputs)


def check_first(tangents: Tangents, *, owners: Mapping[int, str]) -> None:
    """Raise unless the derivative is with respect to parameters and batch alone.

    Raises:
        ScheduleError: it is with respect to the state, or to an array that the function owners[id] closes over.
    """
    _, inputs, closed = tangents
    for path, tangent in jax.tree_util.tree_leaves_with_path(inputs.state):
        if not _is_zero(tangent):
            raise ScheduleError(
                f"state{jax.tree_util.keystr(path)} is differentiated; the state of layers has no gradients.",
                fix="move it into params.stages, or stop its gradient: jax.lax.stop_gradient(state).",
            )
    for place, tangent in closed.items():
        if not _is_zero(tangent):
            raise ScheduleError(
                f"{owners.get(place, 'a function')}() closes over an array that is differentiated, {tangent.dtype}"
                f"{list(tangent.shape)}; a pipeline has gradients of its parameters and batch alone.",
                fix="pass it in params.shared to first() and last(), or to all functions in the batch, once for each "
                "microbatch; or stop its gradient: jax.lax.stop_gradient(array).",
            )


def check_second(tangents: Tangents, *, owners: Mapping[int, str], fns: StageFns, schedule: Schedule) -> None:
    """Raise unless jax can differentiate the executor.

    It cannot differentiate a loop of a length unknown at trace time.

    Raises:
        ScheduleError: stages differ in their number of layers, or the derivative is not with respect to parameters and
            batch alone.
    """
    check_first(tangents, owners=owners)
    counts = fns.layers_per_stage
    if schedule.num_ranks > 1 and counts is not None and len(set(counts)) > 1:
        raise ScheduleError(
            f"gradients of a pipeline with layers_per_stage={list(counts)} are differentiated; jax does not "
            "differentiate a loop whose length differs between ranks.",
            fix="give all stages as many layers, or stop the gradient: jax.lax.stop_gradient(params).",
        )


def has_tangent(tree: Any) -> bool:
    """Return whether any leaf of a tree of tangents may be other than zero."""
    return not all(map(_is_zero, jax.tree.leaves(tree)))


def tangent_of_loss(tangents: Any, grads: Any) -> jax.Array:
    """Return the tangent of the loss: the sum of gradient times tangent over all leaves, float32 []."""

    def one(tangent: Any, grad: Any) -> Any:
        # A frozen parameter has no gradient.
        return 0.0 if grad is None or _is_zero(tangent) else jnp.sum(grad * tangent.astype(jnp.float32))

    return jax.tree.reduce(jnp.add, jax.tree.map(one, tangents, grads), jnp.float32(0))


def _is_zero(tangent: Any) -> bool:
    """Return whether a tangent is known to be zero, or belongs to integers, which have none."""
    return isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0
