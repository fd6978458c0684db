"""A layer's backward in two: the input gradient, for which the rank before waits, and the weight gradient, which can.

The backward's jaxpr is sliced by what the input gradient needs (Qi et al. 2024, section 2, for any layer function).
What the weight gradient needs of the first half, the gradients of matmul outputs above all, is kept between the two. It
is put where residuals were that only the first half needed, so that splitting costs little memory where residuals are
kept. A layer that recomputes all of itself keeps none: what its first half recomputed waits for the second, in all as
much as with "dots" about (work R1: 52 MiB where a whole backward takes 17; without remat 105 beside 140). A scan or a
loop inside the layer is one piece of work, done where its input's gradient is due; branches are cut in two.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Var, primitives

from .buffers import type_of
from .equations import Env, cuts_between, is_heavy, needed, run, start_env, value_of, without
from .open_calls import open_calls
from .residuals import LayerVjp
from .split_branches import split_branches


class SplitBackward:
    """The two halves of a planned `LayerVjp`'s backward.

    `saved` is the list of kept residuals. The first half returns it changed: some entries replaced, some added at the
    end; `extra` has the shapes of those. The second half reads that list.
    """

    def __init__(self, vjp: LayerVjp, params: Any, residuals: list[Any], microbatch: Any, grad: Any) -> None:
        example = (params, residuals, microbatch, grad)
        self._grads_tree = jax.tree.structure(jax.eval_shape(vjp.backward, *example)[0])
        self._num_before = len(jax.tree.leaves(params))
        self.num_saved = len(residuals)
        whole = open_calls(jax.make_jaxpr(lambda *args: jax.tree.leaves(vjp.backward(*args)))(*example), example)
        closed = split_branches(whole, example, first=whole.jaxpr.outvars[-1:])
        self._consts, self._jaxpr = closed.consts, closed.jaxpr
        *grads, dx = self._jaxpr.outvars
        only_dx = needed(self._jaxpr.eqns, [dx])
        rest = without(self._jaxpr.eqns, only_dx)
        # Sums over tokens (biases, norm scales) are done at once: put off, each would keep an activation for a vector.
        light = [grad for grad in grads if not any(map(is_heavy, needed(rest, [grad])))]
        self._first = needed(self._jaxpr.eqns, [dx, *light], acts=True)
        second = without(needed(self._jaxpr.eqns, grads), self._first)
        self._second = [*_reshapes_for(second, self._first), *second]
        self._cuts = self._find_cuts(grads)
        self._places, self.extra = self._place_cuts()

    def input_grad(
        self, params: Any, saved: list[jax.Array], microbatch: Any, grad: jax.Array
    ) -> tuple[jax.Array, list]:
        """Return dx, and what `weight_grad` needs in place of the saved residuals."""
        env = self._env(params, saved, microbatch, grad)
        run(self._first, env)
        kept = [*saved, *[None] * len(self.extra)]
        for cut, place in zip(self._cuts, self._places, strict=True):
            value = value_of(env, cut)
            kept[place] = value.reshape(saved[place].shape) if place < self.num_saved else value
        return value_of(env, self._jaxpr.outvars[-1]), kept

    def weight_grad(self, params: Any, kept: list[jax.Array], microbatch: Any) -> Any:
        """Return the gradients of the parameters."""
        env = self._env(params, kept[: self.num_saved], microbatch)
        env |= {cut: kept[place].reshape(_shape(cut)) for cut, place in zip(self._cuts, self._places, strict=True)}
        run(self._second, env)
        return jax.tree.unflatten(self._grads_tree, [value_of(env, out) for out in self._jaxpr.outvars[:-1]])

    def _env(self, *args: Any) -> Env:
        # The last input, the output's gradient, is left out by the second half: it is a cut where it is needed.
        return start_env(self._jaxpr, self._consts, jax.tree.leaves(args))

    def _find_cuts(self, grads: Iterable[Any]) -> list[Var]:
        """Values of the first half, and the output's gradient, that the second half or a result needs."""
        again = {out for eqn in self._second for out in eqn.outvars}
        cuts = cuts_between(self._first, self._second, grads, given=self._jaxpr.invars[-1:])
        return [v for v in cuts if v not in again]

    def _place_cuts(self) -> tuple[list[int], list[jax.ShapeDtypeStruct]]:
        """For every cut an entry of `saved` of its rows that the second half does not read, or a new one."""
        saved = self._jaxpr.invars[self._num_before : self._num_before + self.num_saved]
        read = {v for eqn in self._second for v in eqn.invars if isinstance(v, Var)}
        free = [(index, v.aval) for index, v in enumerate(saved) if v not in read]
        places, extra = [], []
        for cut in self._cuts:
            aval: Any = cut.aval
            match = next((entry for entry in free if _is_like(entry[1], aval)), None)
            if match is not None:
                free.remove(match)
                places.append(match[0])
            else:
                places.append(self.num_saved + len(extra))
                extra.append(type_of(cut))
        return places, extra


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _is_like(a: Any, b: Any) -> bool:
    return (_flat(a.shape), a.dtype, a.mat.varying) == (_flat(b.shape), b.dtype, b.mat.varying)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[B, T, D] or [B, T, N, H] as products take it, [B T, D]. Other shapes stay: devices may split them unlike."""
    return (math.prod(shape[:2]), math.prod(shape[2:])) if len(shape) in (3, 4) else shape


def _reshapes_for(eqns: Sequence[JaxprEqn], others: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """The reshapes among the others that these equations read: done twice, so that an array is kept in one shape."""
    wanted = {v for eqn in eqns for v in eqn.invars if isinstance(v, Var)}
    found = []
    for eqn in reversed(others):
        if eqn.primitive is primitives.reshape_p and not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted.update(v for v in eqn.invars if isinstance(v, Var))
    return found[::-1]
