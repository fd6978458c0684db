"""A function and its pullback, traced once over types: two lists of equations of one jaxpr.

Nothing is executed while tracing. Whoever wants a part of the two runs the equations that it needs: no value is made up
for what is not at hand, and what the function prints is not printed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from .equations import Env, needed, run, start_env, value_of


@dataclass(frozen=True, kw_only=True)
class TracedVjp:
    """y = function(params, x, microbatch), and (gradients of params, of x) from the gradient of y.

    Args:
        closed: invars are all leaves of (params, x, microbatch, grad).
        forward: the equations that make y, and what the backward reads.
        backward: those after them, that read `grad`.
    """

    closed: ClosedJaxpr
    forward: list[JaxprEqn]
    backward: list[JaxprEqn]
    x: list[Var]
    grad: Var
    y: Any
    outs: list[Any]
    outs_tree: Any

    def env(self, *args: Any) -> Env:
        """Return the values of params and of as many of (x, microbatch) as are given, by variable."""
        return start_env(self.closed.jaxpr, self.closed.consts, jax.tree.leaves(args))

    def results(self, env: Env) -> tuple[Any, Any]:
        """Return (gradients of params, gradient of x), once their equations ran."""
        return jax.tree.unflatten(self.outs_tree, [value_of(env, out) for out in self.outs])


def trace_vjp(fn: Callable[[Any, Any, Any], jax.Array], params: Any, x: Any, microbatch: Any, grad: Any) -> TracedVjp:
    """Return fn(params, x, microbatch) and its pullback; arguments, and the gradient of the result, give their types.

    Whole numbers among the parameters have no gradient: `None` stands in their place.
    """
    trees: list[Any] = []

    def whole(params: Any, x: Any, microbatch: Any, grad: jax.Array) -> tuple[Any, ...]:
        floats, merge = _split_floats(params)
        y, pull = jax.vjp(lambda floats, x: fn(merge(floats), x, microbatch), floats, x)
        # This equation parts the trace: all before it is forward, all after it backward.
        mark = jax.lax.optimization_barrier(grad)
        d_floats, dx = pull(mark)
        outs, tree = jax.tree.flatten((_split_floats(params, others="none")[1](d_floats), dx))
        trees.append(tree)
        return y, mark, *outs

    closed = jax.make_jaxpr(whole)(params, x, microbatch, grad)
    y, mark, *outs = closed.jaxpr.outvars
    position = next(index for index, eqn in enumerate(closed.jaxpr.eqns) if mark in eqn.outvars)
    num_params = len(jax.tree.leaves(params))
    return TracedVjp(
        closed=closed,
        forward=closed.jaxpr.eqns[:position],
        backward=needed(closed.jaxpr.eqns[position + 1 :], outs, acts=True),
        x=closed.jaxpr.invars[num_params : num_params + len(jax.tree.leaves(x))],
        grad=mark,
        y=y,
        outs=outs,
        outs_tree=trees[0],
    )


def _split_floats(
    params: Any, *, others: Literal["same", "none"] = "same"
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the leaves that have gradients, and what puts others like them in their places."""
    leaves, tree = jax.tree.flatten(params)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def merge(floats: list[Any]) -> Any:
        own = iter(floats)
        rest = leaves if others == "same" else [None] * len(leaves)
        return jax.tree.unflatten(tree, [next(own) if one else leaf for leaf, one in zip(rest, is_float, strict=True)])

    return [leaf for leaf, one in zip(leaves, is_float, strict=True) if one], merge


def pull_back(fn: Callable[[Any, Any], jax.Array], params: Any, microbatch: Any, grad: jax.Array) -> Any:
    """Return the gradients of params, given that of fn(params, microbatch), of which nothing was kept.

    The forward runs again as far as they need it. What it prints it does not print again.
    """
    traced = trace_vjp(lambda params, _, microbatch: fn(params, microbatch), params, (), microbatch, grad)
    env = traced.env(params, (), microbatch) | {traced.grad: grad}
    made = {v for eqn in traced.forward for v in eqn.outvars}
    read = [v for eqn in traced.backward for v in eqn.invars if isinstance(v, Var) and v in made]
    run([*needed(traced.forward, read), *traced.backward], env)
    return traced.results(env)[0]
