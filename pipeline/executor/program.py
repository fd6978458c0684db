"""A function of parameters and batch, traced once, with the arrays that it closes over made inputs.

A user's function may close over arrays that jax is tracing: an argument of an outer `jit`, or the very array that an
outer `grad` differentiates. As inputs, jax's transformations see them, and so do our checks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

Closed = dict[int, jax.Array]
"""Traced arrays that a function closes over, by `id`."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a function of (params, batch) computes, and the traced arrays that it closes over."""

    jaxpr: ClosedJaxpr
    tree: Any
    closed: Closed

    def run(self, params: Any, batch: Any, closed: Closed) -> Any:
        """Return what the function returns, with these values for the arrays that it closes over."""
        consts = [closed.get(id(const), const) for const in self.jaxpr.consts]
        outs = jaxpr_as_fun(ClosedJaxpr(self.jaxpr.jaxpr, consts))(*jax.tree.leaves((params, batch)))
        return jax.tree.unflatten(self.tree, outs)


def trace_program(fn: Callable[[Any, Any], Any], params: Any, batch: Any) -> Program:
    """Return the program of fn(params, batch); nothing is computed."""
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(params, batch)
    closed: Any = {id(const): const for const in jaxpr.consts if isinstance(const, jax.core.Tracer)}
    return Program(jaxpr=jaxpr, tree=jax.tree.structure(shapes), closed=closed)
