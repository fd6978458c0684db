"""Inline the calls of a jaxpr: `jit`, `jax.checkpoint`, `custom_jvp` and `custom_vjp`.

    dx, dw = jit(f)(dy)      ->      dx = ...;  dw = ...

A call that computes both gradients would otherwise belong to the first half of a split backward as a whole. Inlining
`jax.checkpoint` undoes no rematerialisation here: in a backward turn nothing of the forward is left to merge with.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from .equations import run, start_env, value_of

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
"""Primitives that run a jaxpr, and the name of the parameter that holds it."""


Barriers = Literal["keep", "drop"]


def open_calls(closed: ClosedJaxpr, example: Any, *, barriers: Barriers) -> ClosedJaxpr:
    """Return the jaxpr with calls inlined; the leaves of `example` have the types of its inputs.

    Args:
        barriers: a barrier ties values of one backward together. Halves that run in different turns are without.
    """

    def flat(*args: Any) -> list[Any]:
        return _run_open(closed.jaxpr, closed.consts, jax.tree.leaves(args), barriers)

    return jax.make_jaxpr(flat)(*example)


def _run_open(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], barriers: Barriers) -> list[Any]:
    env = start_env(jaxpr, consts, args)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "optimization_barrier" and barriers == "drop":
            env.update(zip(eqn.outvars, [value_of(env, v) for v in eqn.invars], strict=True))
            continue
        inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if inner is None:
            run([eqn], env)
            continue
        values = [value_of(env, v) for v in eqn.invars]
        if eqn.params.get("prevent_cse") and barriers == "keep":
            # As jax lowers it; each value by itself, since a barrier of jax 0.10 takes values of one type.
            values = [jax.lax.optimization_barrier(value) for value in values]
        body, inner_consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        results = _run_open(body, inner_consts, values, barriers)
        env.update(zip(eqn.outvars, results, strict=True))
    return [value_of(env, v) for v in jaxpr.outvars]
