"""Trace a function and its pullback together, as two lists of equations of one jaxpr.

Worked example, y = tanh(x @ w) called as fn(params={"w": w}, x, given) -> Output(x=y):

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
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from ...model.protocol import Given, Output
from ..buffers import floats_of
from .equations import Env, needed, run, start_env, value_of
from .float32_grads import is_half, widen_products
from .open_calls import open_calls


@dataclass(frozen=True, kw_only=True)
class TracedVjp:
    """The trace of out = fn(params, x, given) and of its pullback, gradient of out.x -> gradients.

    closed: jaxpr whose inputs are the leaves of (params, x, given, gradient of out.x).
    forward: equations that make `out` and what the backward reads.
    backward: equations after those, without any that no gradient needs.
    x: input variables of x.
    grad: variables of the gradient of out.x as the backward reads them, one for each floating-point leaf.
    out, out_tree: variables of `out`, and its tree.
    grads, grads_tree: variables of the gradients, and the tree ((of params, of the microbatch), list of those of x).
    """

    closed: ClosedJaxpr
    forward: list[JaxprEqn]
    backward: list[JaxprEqn]
    x: list[Var]
    grad: list[Var]
    out: list[Any]
    out_tree: Any
    grads: list[Any]
    grads_tree: Any

    def env(self, *args: Any) -> Env:
        """Return values by variable for the leading inputs: params, then x and given if they are at hand."""
        return start_env(self.closed.jaxpr, self.closed.consts, jax.tree.leaves(args))

    def output(self, env: Env) -> Any:
        """Return `out` from the values of equations that have run."""
        return jax.tree.unflatten(self.out_tree, [value_of(env, v) for v in self.out])

    def gradients(self, env: Env) -> tuple[tuple[Any, Any], list[Any]]:
        """Return ((gradients of params, of the microbatch), gradients of x) from the values of equations."""
        return jax.tree.unflatten(self.grads_tree, [value_of(env, v) for v in self.grads])


def trace_vjp(
    fn: Callable[[Any, Any, Given], Output],
    params: Any,
    x: Any,
    given: Given,
    grad: list[Any],
    *,
    wants_batch: bool,
    trained: Any = None,
) -> TracedVjp:
    """Return the trace of fn(params, x, given) and of its pullback; only the types of the arguments matter.

    What is not floating-point has no gradient: `None` stands in its place. So it does for parameters that are false in
    the tree `trained`, if one is given, and for the microbatch unless `wants_batch`. A loss among the outputs has the
    gradient 1: it is added to the loss of the step.
    """
    example = (params, x, given, grad)
    closed, (out_tree, grads_tree) = _trace_whole(fn, example, wants_batch=wants_batch, trained=trained)
    mark, *rest = closed.jaxpr.outvars
    out, grads = rest[: out_tree.num_leaves], rest[out_tree.num_leaves :]
    # The barrier's equation divides the list; it belongs to neither part, since `run` is given a value for `mark`.
    position = next(index for index, eqn in enumerate(closed.jaxpr.eqns) if mark in eqn.outvars)
    num_params = len(jax.tree.leaves(params))
    # Without dead equations, but with prints and callbacks of a custom backward, whose results nothing reads.
    backward = needed(closed.jaxpr.eqns[position + 1 :], grads, acts=True)
    return TracedVjp(
        closed=closed,
        forward=closed.jaxpr.eqns[:position],
        backward=widen_products(backward, grads[: len(split_floats(params, trained)[0])]),
        x=closed.jaxpr.invars[num_params : num_params + len(jax.tree.leaves(x))],
        grad=[mark, *closed.jaxpr.invars[len(closed.jaxpr.invars) - len(grad) + 1 :]],
        out=out,
        out_tree=out_tree,
        grads=grads,
        grads_tree=grads_tree,
    )


def _trace_whole(fn: Any, example: Any, *, wants_batch: bool, trained: Any) -> tuple[ClosedJaxpr, list[Any]]:
    """Return the jaxpr of (mark, fn(params, x, given), gradients), and the trees of the last two."""
    trees: list[Any] = []

    def whole(params: Any, x: Any, given: Given, grad: list[jax.Array]) -> tuple[Any, ...]:
        mark, out, grads = _run_and_pull_back(fn, (params, x, given), grad, wants_batch=wants_batch, trained=trained)
        (out, out_tree), (grads, grads_tree) = jax.tree.flatten(out), jax.tree.flatten(grads)
        trees.extend((out_tree, grads_tree))
        return mark, out, grads

    closed = jax.make_jaxpr(whole)(*example)
    if any(is_half(v.aval.dtype) for v in closed.jaxpr.outvars[1 + trees[0].num_leaves :]):
        # Products inside calls, such as `jax.checkpoint`, are to be found.
        closed = open_calls(closed, example, barriers="keep")
    return closed, trees


def _run_and_pull_back(
    fn: Callable[[Any, Any, Given], Output],
    args: tuple[Any, Any, Given],
    grad: list[Any],
    *,
    wants_batch: bool,
    trained: Any,
) -> tuple[jax.Array, Output, Any]:
    """Return the mark that divides forward from backward, fn(*args), and the tree of gradients."""
    params, x, given = args
    parts = (params, x, given.microbatch if wants_batch else ())
    floats, merge = zip(*map(split_floats, parts, (trained, None, None)), strict=True)

    def run(*floats: list[Any]) -> tuple[Any, Output]:
        own, x, microbatch = (one(values) for one, values in zip(merge, floats, strict=True))
        out = fn(own, x, replace(given, microbatch=microbatch) if wants_batch else given)
        return (floats_of(out.x), out.loss), out

    (_, loss), pull, out = jax.vjp(run, *floats, has_aux=True)
    # All equations before this one are forward, all after it are backward: only they can read the gradient.
    mark = jax.lax.optimization_barrier(grad[0])
    d_params, dx, d_batch = pull(([mark, *grad[1:]], None if loss is None else jnp.ones_like(loss)))
    d_batch = merge[2](d_batch, others="none") if wants_batch else None
    return mark, out, ((merge[0](d_params, others="none"), d_batch), dx)


def split_floats(tree: Any, trained: Any = None) -> tuple[list[Any], Callable[..., Any]]:
    """Return the leaves that have gradients, and `merge`, which puts such a list back into the tree.

    Those are of floating-point numbers, and true in the tree `trained` if one is given.

    merge(floats) fills the other places with the tree's own leaves, merge(floats, others="none") with None.
    """
    leaves, structure = jax.tree.flatten(tree)
    wanted = [True] * len(leaves) if trained is None else jax.tree.leaves(trained)
    pairs = zip(leaves, wanted, strict=True)
    is_float = [is_its and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf, is_its in pairs]
    floats = [leaf for leaf, is_its in zip(leaves, is_float, strict=True) if is_its]

    def merge(floats: list[Any], *, others: Literal["same", "none"] = "same") -> Any:
        merged = list(leaves) if others == "same" else [None] * len(leaves)
        places = [place for place, is_its in enumerate(is_float) if is_its]
        for place, leaf in zip(places, floats, strict=True):
            merged[place] = leaf
        return jax.tree.unflatten(structure, merged)

    return floats, merge


def pull_back(
    fn: Callable[[Any, Given], Any],
    params: Any,
    given: Given,
    grad: list[Any],
    *,
    wants_batch: bool,
    trained: Any = None,
) -> tuple[Any, Any]:
    """Return the gradients of (params, microbatch), given that of fn(params, given), with no residuals.

    The forward runs again as far as the gradients need it, without its prints.
    """
    wanted: dict[str, Any] = {"wants_batch": wants_batch, "trained": trained}
    traced = trace_vjp(lambda params, _, given: Output(x=fn(params, given)), params, (), given, grad, **wanted)
    env = traced.env(params, (), given) | dict(zip(traced.grad, grad, strict=True))
    made = {v for eqn in traced.forward for v in eqn.outvars}
    read = [v for eqn in traced.backward for v in eqn.invars if isinstance(v, Var) and v in made]
    run([*needed(traced.forward, read), *traced.backward], env)
    return traced.gradients(env)[0]
