"""Trace a function and its pullback together, as two lists of equations of one jaxpr.

Worked example, y = tanh(x @ w) called as fn(params={"w": w}, x, microbatch) -> y:

    { w, x, dy =>
        a = x @ w                            forward
        y = tanh(a)
        s = 1 - y                            a part of the derivative that does not need dy: forward too
        mark = optimization_barrier(dy)      divides the trace: only equations after it can read dy
        h = mark * s                         backward
        da = h + h * y                       = dy * (1 - y) * (1 + y)
        dw = x.T @ da
        dx = da @ w.T
        return y, mark, dw, dx }

Nothing is executed while tracing. A caller runs only the equations it needs: no value is invented for an input that is
not at hand, and a print in the function does not print twice. The gradient is jax's own (`jax.vjp`: Radul et al. 2023,
"You Only Linearize Once"); only its equations are sorted here. Read `residuals.py` next.
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
    """The trace of y = fn(params, x, microbatch) and of its pullback, gradient of y -> gradients of (params, x).

    closed: jaxpr whose inputs are the leaves of (params, x, microbatch, grad).
    forward: equations that make y and what the backward reads.
    backward: equations after those, without any that no gradient needs.
    x: input variables of x.
    grad: variable of the gradient of y as the backward reads it.
    y: variable of y.
    outs, outs_tree: variables of the gradients, and the tree of (gradients of params, gradient of x).
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
        """Return values by variable for the leading inputs: params, then x and microbatch if they are given."""
        return start_env(self.closed.jaxpr, self.closed.consts, jax.tree.leaves(args))

    def results(self, env: Env) -> tuple[Any, Any]:
        """Return (gradients of params, gradient of x) from the values of equations that have run."""
        return jax.tree.unflatten(self.outs_tree, [value_of(env, out) for out in self.outs])


def trace_vjp(fn: Callable[[Any, Any, Any], jax.Array], params: Any, x: Any, microbatch: Any, grad: Any) -> TracedVjp:
    """Return the trace of fn(params, x, microbatch) and of its pullback; only the types of the arguments matter.

    Integer parameters have no gradient: `None` stands in their place.
    """
    trees: list[Any] = []

    def whole(params: Any, x: Any, microbatch: Any, grad: jax.Array) -> tuple[Any, ...]:
        floats, merge = _split_floats(params)
        y, pull = jax.vjp(lambda floats, x: fn(merge(floats), x, microbatch), floats, x)
        # All equations before this one are forward, all after it are backward: only they can read `mark`.
        mark = jax.lax.optimization_barrier(grad)
        d_floats, dx = pull(mark)
        outs, tree = jax.tree.flatten((merge(d_floats, others="none"), dx))
        trees.append(tree)
        return y, mark, *outs

    closed = jax.make_jaxpr(whole)(params, x, microbatch, grad)
    y, mark, *outs = closed.jaxpr.outvars
    # The barrier's equation divides the list; it belongs to neither part, since `run` is given a value for `mark`.
    position = next(index for index, eqn in enumerate(closed.jaxpr.eqns) if mark in eqn.outvars)
    num_params = len(jax.tree.leaves(params))
    return TracedVjp(
        closed=closed,
        forward=closed.jaxpr.eqns[:position],
        # Without dead equations, but with prints and callbacks of a custom backward, whose results nothing reads.
        backward=needed(closed.jaxpr.eqns[position + 1 :], outs, acts=True),
        x=closed.jaxpr.invars[num_params : num_params + len(jax.tree.leaves(x))],
        grad=mark,
        y=y,
        outs=outs,
        outs_tree=trees[0],
    )


def _split_floats(params: Any) -> tuple[list[Any], Callable[..., Any]]:
    """Return the leaves that have gradients, and `merge`, which puts such a list back into the tree.

    merge(floats) fills the other places with the integers of `params`, merge(floats, others="none") with None.
    """
    leaves, tree = jax.tree.flatten(params)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    floats = [leaf for leaf, is_its in zip(leaves, is_float, strict=True) if is_its]

    def merge(floats: list[Any], *, others: Literal["same", "none"] = "same") -> Any:
        merged = list(leaves) if others == "same" else [None] * len(leaves)
        places = [place for place, is_its in enumerate(is_float) if is_its]
        for place, leaf in zip(places, floats, strict=True):
            merged[place] = leaf
        return jax.tree.unflatten(tree, merged)

    return floats, merge


def pull_back(fn: Callable[[Any, Any], jax.Array], params: Any, microbatch: Any, grad: jax.Array) -> Any:
    """Return the gradients of params, given the gradient of fn(params, microbatch), with no residuals.

    The forward runs again as far as the gradients need it, without its prints.
    """
    traced = trace_vjp(lambda params, _, microbatch: fn(params, microbatch), params, (), microbatch, grad)
    env = traced.env(params, (), microbatch) | {traced.grad: grad}
    made = {v for eqn in traced.forward for v in eqn.outvars}
    read = [v for eqn in traced.backward for v in eqn.invars if isinstance(v, Var) and v in made]
    run([*needed(traced.forward, read), *traced.backward], env)
    return traced.results(env)[0]
