"""List the matrix products of a traced function by shape, with those of loops as often as they run.

    y = tanh(x @ up) @ down,  x[T, D]    ->    (m=T, n=F, k=D, weight), (m=T, n=D, k=F, weight)

A product is one with weights if an operand does not depend on x. Read `trace.py` next, which traces blocks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

_UNCOUNTED = ("while", "pallas_call", "ffi_call", "pure_callback", "io_callback")
"""Primitives that run their products, if they have some, a number of times that a trace does not tell."""


@dataclass(frozen=True, kw_only=True)
class TracedProduct:
    """`count` times `batch` products [m, k] x [k, n]; `is_weight` where [k, n] does not depend on x."""

    m: int
    n: int
    k: int
    batch: int
    is_weight: bool
    count: int = 1

    @property
    def flops(self) -> int:
        """Flops of all of them, 2 for each multiplication."""
        return 2 * self.m * self.n * self.k * self.batch * self.count


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The products of a jaxpr, which of its outputs depend on x, and the primitives whose products are not counted."""

    products: tuple[TracedProduct, ...]
    depends: tuple[bool, ...]
    uncounted: frozenset[str]


def list_products(jaxpr: Jaxpr, depends: Sequence[bool]) -> Traced:
    """Return the products of a jaxpr whose inputs depend on x as `depends` says."""
    known: dict[Var, bool] = dict(zip(jaxpr.invars, depends, strict=True))
    found: list[TracedProduct] = []
    uncounted: set[str] = set()

    def is_of_x(atom: Any) -> bool:
        return not isinstance(atom, Literal) and known.get(atom, False)

    for eqn in jaxpr.eqns:
        given = [is_of_x(atom) for atom in eqn.invars]
        name, out = eqn.primitive.name, [any(given)] * len(eqn.outvars)
        if name in _UNCOUNTED:
            uncounted.add(name)
        elif name == "dot_general":
            found.append(_product_of(eqn, given))
        elif name == "conv_general_dilated":
            found.append(_convolution_of(eqn))
        elif name == "scan":
            inner = _loop(eqn, given)
            found += [replace(own, count=own.count * eqn.params["length"]) for own in inner.products]
            out, uncounted = list(inner.depends), uncounted | inner.uncounted
        elif name == "cond":
            branches = [list_products(branch.jaxpr, given[1:]) for branch in eqn.params["branches"]]
            found += max((own.products for own in branches), key=lambda own: sum(each.flops for each in own))
            out = [given[0] or any(own) for own in zip(*(branch.depends for branch in branches), strict=True)]
            uncounted = uncounted.union(*(branch.uncounted for branch in branches))
        else:
            for inner_jaxpr in _jaxprs_in(eqn.params):
                inner = list_products(inner_jaxpr, given)
                found += inner.products
                out, uncounted = list(inner.depends), uncounted | inner.uncounted
        known |= {var: own for var, own in zip(eqn.outvars, out, strict=True) if isinstance(var, Var)}
    depends = tuple(is_of_x(atom) for atom in jaxpr.outvars)
    return Traced(products=tuple(found), depends=depends, uncounted=frozenset(uncounted))


def _loop(eqn: Any, given: list[bool]) -> Traced:
    """Return the products of one turn of a scan, whose carry depends on x if that of any turn does."""
    (body,) = _jaxprs_in({"jaxpr": eqn.params["jaxpr"]})
    # Inputs are constants, the carry, then what is scanned over; only the last have a dimension more outside.
    carries = _count_alike(eqn.outvars, body.outvars)
    consts = _count_alike(eqn.invars, body.invars) - carries
    while True:
        inner = list_products(body, given)
        carry = [own or new for own, new in zip(given[consts:], inner.depends[:carries], strict=False)]
        after = [*given[:consts], *carry, *given[consts + carries :]]
        if after == given:
            return inner
        given = after


def _count_alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Return how many arrays have as many dimensions outside of a loop as in one turn."""
    pairs = zip(outside, inside, strict=True)
    return sum(own.aval.ndim == turn.aval.ndim for own, turn in pairs)


def _jaxprs_in(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _product_of(eqn: Any, given: list[bool]) -> TracedProduct:
    (left_k, _), (left_batch, _) = eqn.params["dimension_numbers"]
    left, right = (atom.aval for atom in eqn.invars)
    batch, k = (math.prod(left.shape[dim] for dim in dims) for dims in (left_batch, left_k))
    m, n = (math.prod(own.shape) // max(1, batch * k) for own in (left, right))
    # The weight is the right operand of a `Product`.
    m, n = (m, n) if given[0] else (n, m)
    return TracedProduct(m=m, n=n, k=k, batch=batch, is_weight=not all(given))


def _convolution_of(eqn: Any) -> TracedProduct:
    """Return a convolution as a product: each output position and feature sums over a window of inputs."""
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    numbers = eqn.params["dimension_numbers"]
    n = kernel.shape[numbers.rhs_spec[0]]
    return TracedProduct(
        m=math.prod(out.shape) // max(1, n), n=n, k=math.prod(kernel.shape) // max(1, n), batch=1, is_weight=True
    )
