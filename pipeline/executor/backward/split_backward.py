"""Split a layer's backward into its input gradient, which the rank before waits for, and its weight gradient.

Worked example, a dense layer y = tanh(x @ w) with residuals s = 1 - y, y and x, each [b, D] (see `residuals.py`):

    residuals         first half, `input_grad`            kept between          second half, `weight_grad`
    [s, y, x]   -->   h  = dy * s                  -->    [da, y, x]      -->   dw = x.T @ da, added to its sum
                      da = h + h * y
                      dx = da @ w.T  --> rank before

The backward's equations are sliced by what dx depends on (Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section
2), for any layer function. The second half needs da from the first; such a value is called a cut. The second half does
not read s, and da has its shape and dtype, so da takes the place of s in the residuals buffer: splitting this layer
costs no memory. A cut for which there is no such place gets a buffer of its own (`extra`).

Of y = x + sin(x) @ w, with residuals sin(x) and cos(x), dw = sin(x).T @ dy needs the output's gradient, so dy is a cut.
It takes the place of cos(x), which the first half reads last: dx = dy + (dy @ w.T) * cos(x). So dy is there too early,
and is written when dx is done (`early`): were it in no order, XLA would copy the whole buffer for the late reader.

Under `jax.checkpoint` a layer keeps only x; its first half recomputes the rest, and the part of it that the second half
reads becomes extra entries. docs/internals/split-backward.md has the memory that this takes, as measured. A scan or
loop inside the layer is one equation and runs where its input gradient is due; branches are split by
`split_branches.py`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Var, primitives

from ...model.protocol import Given
from ..buffers import type_of
from .equations import Env, cuts_between, is_heavy, needed, run, start_env, value_of, without
from .open_calls import open_calls
from .residuals import LayerVjp
from .split_branches import split_branches

_RUN_AGAIN = (primitives.reshape_p, primitives.all_gather_p)


class SplitBackward:
    """The two halves of a `LayerVjp`'s backward, from the types of its arguments.

    The first half returns the list of residuals with some entries replaced and some added at the end; the second half
    reads that list. Together they compute what `LayerVjp.backward` does, each equation in exactly one half, but for
    reshapes, which cost nothing, and gathers of what is split between layers.

    num_saved: number of residuals that the forward keeps.
    extra: types of the entries that the first half adds.
    early: for each residual that is replaced by a cut and may be read after the cut is made, its position, and what has
        to be made before the cut is written: the position of another cut, or None for dx.
    """

    def __init__(self, vjp: LayerVjp, params: Any, residuals: list[Any], given: Given, grad: list[Any]) -> None:
        example = (params, residuals, given, grad)
        self._grads_tree = jax.tree.structure(jax.eval_shape(vjp.backward, *example)[0])
        self._num_before = len(jax.tree.leaves(params))
        self.num_saved, self._num_x = len(residuals), len(grad)
        # The whole backward as one flat jaxpr: inputs (params, residuals, given, grad), outputs (*grads, *dx).
        traced = jax.make_jaxpr(lambda *args: jax.tree.leaves(vjp.backward(*args)))(*example)
        whole = open_calls(traced, example, barriers="drop")
        closed = split_branches(whole, example, first=whole.jaxpr.outvars[-self._num_x :])
        self._consts, self._jaxpr = closed.consts, closed.jaxpr
        grads, dx = self._jaxpr.outvars[: -self._num_x], self._jaxpr.outvars[-self._num_x :]
        # The first half is what dx needs, the second what gradients need besides.
        only_dx = needed(self._jaxpr.eqns, dx)
        rest = without(self._jaxpr.eqns, only_dx)
        # Gradients of biases and norm scales are sums over tokens. They run in the first half: put off, each would keep
        # an activation [b, T, D] for a vector [D].
        light = [grad for grad in grads if not any(map(is_heavy, needed(rest, [grad])))]
        self._first = needed(self._jaxpr.eqns, [*dx, *light], acts=True)
        second = without(needed(self._jaxpr.eqns, grads), self._first)
        self._second = [*_run_again_for(second, self._first), *second]
        self._cuts = self._find_cuts(grads)
        self._places, self.extra, self.early = self._place_cuts()

    def input_grad(
        self, params: Any, saved: list[jax.Array], given: Given, grad: list[jax.Array]
    ) -> tuple[list[jax.Array], list]:
        """Return dx, and the residuals with what `weight_grad` needs in them."""
        env = self._env(params, saved, given, grad)
        run(self._first, env)
        kept = [*saved, *[None] * len(self.extra)]
        for cut, place in zip(self._cuts, self._places, strict=True):
            value = value_of(env, cut)
            # A residual [B, T, D] may have the place of a cut [B * T, D], see `_flat`.
            kept[place] = value.reshape(saved[place].shape) if place < self.num_saved else value
        return [value_of(env, v) for v in self._jaxpr.outvars[-self._num_x :]], kept

    def weight_grad(self, params: Any, kept: list[jax.Array], given: Given) -> tuple[Any, Any]:
        """Return the gradients of (parameters, microbatch), given the list that `input_grad` returned."""
        env = self._env(params, kept[: self.num_saved], given)
        env |= {cut: kept[place].reshape(_shape(cut)) for cut, place in zip(self._cuts, self._places, strict=True)}
        run(self._second, env)
        return jax.tree.unflatten(self._grads_tree, [value_of(env, out) for out in self._jaxpr.outvars[: -self._num_x]])

    def _env(self, *args: Any) -> Env:
        # The second half gives no value for the last input, the output's gradient: where it is needed, it is a cut.
        return start_env(self._jaxpr, self._consts, jax.tree.leaves(args))

    def _find_cuts(self, grads: Iterable[Any]) -> list[Var]:
        """Return the values, made by the first half or the output's gradient itself, that the second half reads."""
        again = {out for eqn in self._second for out in eqn.outvars}
        cuts = cuts_between(self._first, self._second, grads, given=self._jaxpr.invars[-self._num_x :])
        return [v for v in cuts if v not in again]

    def _place_cuts(self) -> tuple[list[int], list[jax.ShapeDtypeStruct], dict[int, int | None]]:
        """Return a position for every cut, the types of the positions that are new, and those that are replaced early.

        A cut takes the place of a residual of its type that the second half does not read, if there is one; rather of
        one that has been read when the cut is made.
        """
        # Parameters come before the residuals among the inputs.
        saved = self._jaxpr.invars[self._num_before : self._num_before + self.num_saved]
        read = {v for eqn in self._second for v in eqn.invars if isinstance(v, Var)}
        free = {index: v for index, v in enumerate(saved) if v not in read}
        late = {cut: self._read_without(cut) for cut in self._cuts}
        places: dict[Var, int] = {}
        for may_wait in (False, True):
            for cut in self._cuts:
                fits = (n for n, v in free.items() if _is_like(v.aval, cut.aval) and (may_wait or v not in late[cut]))
                match = None if cut in places else next(fits, None)
                if match is not None:
                    places[cut] = match
                    del free[match]
        new = [cut for cut in self._cuts if cut not in places]
        places |= {cut: self.num_saved + number for number, cut in enumerate(new)}

        def made_after(v: Var) -> int | None:
            return next((places[other] for other in self._cuts if v not in late[other]), None)

        replaced = [(cut, place, saved[place]) for cut, place in places.items() if place < self.num_saved]
        early = {place: made_after(v) for cut, place, v in replaced if v in late[cut]}
        return [places[cut] for cut in self._cuts], [type_of(cut) for cut in new], early

    def _read_without(self, cut: Var) -> set[Var]:
        """Return what the equations of the first half read on which a cut does not depend."""
        others = without(self._first, needed(self._first, [cut]))
        return {v for eqn in others for v in eqn.invars if isinstance(v, Var)}


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _is_like(a: Any, b: Any) -> bool:
    """Return whether a value of type a can stand in the place of one of type b."""
    return (_flat(a.shape), a.dtype, a.mat.varying) == (_flat(b.shape), b.dtype, b.mat.varying)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return [B * T, D] for [B, T, D], and [B * T, N * H] for [B, T, N, H], the shapes in which matmuls read them.

    Other shapes stay as they are: the compiler may shard their dimensions in other ways.
    """
    return (math.prod(shape[:2]), math.prod(shape[2:])) if len(shape) in (3, 4) else shape


def _run_again_for(eqns: Sequence[JaxprEqn], others: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """Return the reshapes and gathers among the others that these equations read, to be run again.

    A reshape saves keeping two shapes. A gather of tokens, dy[B, T@tensor, D] -> [B, T, D], is sent again so that what
    is kept between the halves is a device's own part.
    """
    wanted = {v for eqn in eqns for v in eqn.invars if isinstance(v, Var)}
    found = []
    for eqn in reversed(others):
        if eqn.primitive in _RUN_AGAIN and not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted.update(v for v in eqn.invars if isinstance(v, Var))
    return found[::-1]
