"""Have the products that make weight gradients write them in float32, as they are summed.

    bfloat16 x, dy     dw = x.T @ dy -> bfloat16 -> float32, added to its sum         as jax transposes a product
                       dw = x.T @ dy -> float32, added to its sum                     here

A tensor core sums in float32 anyway: rounding its result to bfloat16 loses accuracy, and costs a pass over dw in
memory, since only a product that writes what is summed can add to the sum itself (beta = 1 of a GEMM). Read
`residuals.py` for the use.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var

from .equations import keeps_numbers, run, start_env, value_of
from .open_calls import open_calls

_CAST = "convert_element_type"
_MOVES = ("transpose", "squeeze", "expand_dims", "copy", _CAST)
_WRITES = {"dot_general": "preferred_element_type", _CAST: "new_dtype"}
"""Primitives that may write their result in another type, and the parameter that says in which."""


def widen_products(eqns: Sequence[JaxprEqn], grads: Iterable[Any]) -> list[JaxprEqn]:
    """Return the equations with those products in float32 whose results are gradients, and nothing else.

    Values between a product and its gradient become float32 when the equations run; variables keep their types.
    """
    makers = {out: eqn for eqn in eqns for out in eqn.outvars}
    grads = [v for v in grads if isinstance(v, Var)]
    uses = Counter([*grads, *(v for eqn in eqns for v in eqn.invars if isinstance(v, Var))])
    changed: dict[int, JaxprEqn] = {}
    for grad in grads:
        v: Any = grad
        while isinstance(v, Var) and uses[v] == 1 and (eqn := makers.get(v)) is not None:
            if eqn.primitive.name in _WRITES and is_half(_dtype(v)):
                wide = {_WRITES[eqn.primitive.name]: jnp.dtype("float32")}
                changed[id(eqn)] = eqn.replace(params=eqn.params | wide)
            v = _moved(eqn, v)
    return [changed.get(id(eqn), eqn) for eqn in eqns]


def _moved(eqn: JaxprEqn, v: Var) -> Any:
    """Return the operand whose numbers are those of the result v, in any type and order; None if there is none."""
    if eqn.primitive.name == "optimization_barrier":
        return eqn.invars[eqn.outvars.index(v)]
    is_move = eqn.primitive.name in _MOVES or keeps_numbers(eqn)
    return eqn.invars[0] if is_move else None


def _dtype(v: Any) -> Any:
    return v.aval.dtype


def is_half(dtype: Any) -> bool:
    """Return whether a type is a floating-point type of fewer than 32 bits."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize < 4


def without_rounding(fn: Callable[[Any], Any], own: Any) -> Callable[[Any], Any]:
    """Return a function of one tree without its casts from float32 to smaller types, own the types of the tree."""
    closed, tree = jax.make_jaxpr(fn, return_shape=True)(own)
    opened = open_calls(closed, (own,), barriers="drop")

    def run_wide(own: Any) -> Any:
        env = start_env(opened.jaxpr, opened.consts, jax.tree.leaves(own))
        for eqn in opened.jaxpr.eqns:
            if _rounds(eqn):
                env[eqn.outvars[0]] = value_of(env, eqn.invars[0])
            else:
                run([eqn], env)
        return jax.tree.unflatten(jax.tree.structure(tree), [value_of(env, v) for v in opened.jaxpr.outvars])

    return run_wide


def _rounds(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != _CAST:
        return False
    return _dtype(eqn.invars[0]) == jnp.float32 and is_half(eqn.params["new_dtype"])
