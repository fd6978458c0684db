"""Select equations of a jaxpr by their dependencies, and run a selection.

A layer's forward, its backward and the two halves of the backward are lists of equations cut out of one trace. Running
`needed(eqns, [dx])`, for example, computes dx and nothing else.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params, primitives

Env = dict[Var, Any]
"""Values by variable."""


def needed(
    eqns: Sequence[JaxprEqn], results: Iterable[Any], *, given: Collection[Var] = (), acts: bool = False
) -> list[JaxprEqn]:
    """Return the equations that results depend on, in order.

    Args:
        given: variables whose values are known already; equations that make only those are left out.
        acts: whether equations with a side effect, such as a print, are needed too.
    """
    # Backwards from the results: an equation is met after all that read it, so one pass is enough.
    wanted = {v for v in results if isinstance(v, Var)}.difference(given)
    kept = []
    for eqn in reversed(eqns):
        if not wanted.isdisjoint(eqn.outvars) or (acts and is_acting(eqn)):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if isinstance(v, Var) and v not in given)
    return kept[::-1]


def without(eqns: Iterable[JaxprEqn], others: Iterable[JaxprEqn]) -> list[JaxprEqn]:
    """Return the equations that are not among the others (compared by identity), in order."""
    gone = set(map(id, others))
    return [eqn for eqn in eqns if id(eqn) not in gone]


def read_by(eqns: Iterable[JaxprEqn]) -> dict[Var, None]:
    """Return the variables that equations read, as an ordered set."""
    return dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, Var))


def cuts_between(
    first: Iterable[JaxprEqn], second: Iterable[JaxprEqn], results: Iterable[Any], *, given: Iterable[Var] = ()
) -> list[Var]:
    """Return the variables, made by the first equations or given, that the second equations or results read."""
    made = {out for eqn in first for out in eqn.outvars}.union(given)
    read = read_by(second) | dict.fromkeys(v for v in results if isinstance(v, Var))
    return [v for v in read if v in made]


def depending_on(eqns: Iterable[JaxprEqn], sources: Iterable[Var]) -> set[Var]:
    """Return the sources, all variables that depend on them, and results of equations that must not run twice."""
    found = set(sources)
    for eqn in eqns:
        if is_acting(eqn) or any(isinstance(v, Var) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def nested_equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield all equations, those inside calls, loops and branches too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from nested_equations(inner)


def is_acting(eqn: JaxprEqn) -> bool:
    """Return whether an equation has a side effect, such as a print or a callback."""
    # The effect of a collective only names its axis; the class of that effect is not public.
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


_HEAVY = {"dot_general", "conv_general_dilated", "ragged_dot_general", "scan", "while", "custom_vjp_call"}


def is_heavy(eqn: JaxprEqn) -> bool:
    """Return whether an equation, or one inside it, is a matmul, a loop or the like: work worth delaying."""
    inner = (one for jaxpr in jaxprs_in_params(eqn.params) for one in jaxpr.eqns)
    return eqn.primitive.name in _HEAVY or any(map(is_heavy, inner))


def keeps_numbers(eqn: JaxprEqn) -> bool:
    """Return whether the result is the operand in another shape, sharding or type, its elements in the same order."""
    if eqn.primitive is primitives.sharding_constraint_p or eqn.primitive.name in ("pvary", "pcast"):
        return True
    # With `dimensions` a reshape transposes first: `jnp.ravel(x, order="F")`.
    return eqn.primitive is primitives.reshape_p and eqn.params["dimensions"] is None


def run(eqns: Iterable[JaxprEqn], env: Env) -> None:
    """Run equations, and add their results to `env`. Named scopes of the trace are kept, for profiles."""
    for eqn in eqns:
        names = source_info_util.current_name_stack() + eqn.source_info.name_stack
        values = [value_of(env, v) for v in eqn.invars]
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
            results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        env.update(zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True))


def value_of(env: Env, v: Any) -> Any:
    """Return the value of a variable or of a constant."""
    return v.val if isinstance(v, Literal) else env[v]


def start_env(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> Env:
    """Return the values of constants and of the leading inputs by variable; trailing inputs may be left out."""
    env = dict(zip(jaxpr.invars[: len(args)], args, strict=True))
    return env | dict(zip(jaxpr.constvars, consts, strict=True))
