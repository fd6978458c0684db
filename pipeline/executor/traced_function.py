"""Trace a function of (params, batch) once, and turn the arrays that it closes over into inputs.

A user's function may close over an array that jax is tracing: an argument of an outer `jit`, or an array that an outer
`grad` differentiates. As inputs these arrays are visible to jax's transformations, and to our checks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

ClosedOver = dict[int, jax.Array]
"""Traced arrays that a function closes over, by `id`."""


@dataclass(frozen=True, kw_only=True)
class TracedFunction:
    """The jaxpr of a function of (params, batch), the tree of its result, and the traced arrays it closes over."""

    jaxpr: ClosedJaxpr
    tree: Any
    closed_over: ClosedOver

    def run(self, params: Any, batch: Any, closed_over: ClosedOver) -> Any:
        """Return the result of the function, with these values for the arrays that it closes over."""
        consts = [closed_over.get(id(const), const) for const in self.jaxpr.consts]
        outs = jaxpr_as_fun(ClosedJaxpr(self.jaxpr.jaxpr, consts))(*jax.tree.leaves((params, batch)))
        return jax.tree.unflatten(self.tree, outs)


def trace_function(fn: Callable[[Any, Any], Any], params: Any, batch: Any) -> TracedFunction:
    """Return the trace of fn(params, batch). Nothing is computed: only the types of the arguments matter."""
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(params, batch)
    closed_over: Any = {id(const): const for const in jaxpr.consts if isinstance(const, jax.core.Tracer)}
    return TracedFunction(jaxpr=jaxpr, tree=jax.tree.structure(shapes), closed_over=closed_over)
