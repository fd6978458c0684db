"""The backward pass of a layer as data: what `jax.vjp` must keep of each microbatch, ready for a ring buffer.

Kept is only what depends on the layer's input, and each array once, however often it is reshaped. The rest (the weights
themselves, their casts, causal masks, rotary tables) is made again in the backward tick from parameters and microbatch,
which are at hand there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import Literal as Constant

from .buffers import accumulate, read, vary, write
from .prepare import transpose

Place = tuple[jax.Array | int, ...]
"""Positions of the leading dimensions of a buffer."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of one stage of this rank: chunk `chunk` of `stages` [C, k, ...], the first `count` of its k."""

    stages: Any
    chunk: jax.Array | int
    count: jax.Array | int
    unroll: Literal["off", "on"] = "off"

    def own(self, index: jax.Array | int) -> Any:
        """Return the parameters of one layer."""
        return read(self.stages, self.chunk, index)

    def loop(self, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
        """Return the state after body(0, ...) to body(count - 1, ...)."""
        is_written_out = self.unroll == "on" and isinstance(self.count, int)
        return jax.lax.fori_loop(0, self.count, body, state, unroll=is_written_out or None)


class LayerVjp:
    """A layer's forward that also returns its residuals as a list of arrays, and a backward that takes them back.

    Args:
        prepare: makes what the layer is given of its parameters; gradients are those of the parameters.
        own: the parameters of one layer, for their shapes.
    """

    def __init__(
        self,
        layer: Callable[[Any, jax.Array, Any], jax.Array],
        *,
        prepare: Callable[[Any], Any] | None = None,
        own: Any = None,
    ) -> None:
        self._layer, self._prepare, self._own = layer, prepare, own
        self._is_kept: list[bool] = []
        self._copies: dict[int, _Copy] = {}

    def plan(self, params: Any, x: jax.Array, microbatch: Any) -> list[jax.ShapeDtypeStruct]:
        """Find out which residuals depend on x, and return the shapes of those; call it before the other two."""

        def residuals(params: Any, x: jax.Array, microbatch: Any) -> list[jax.Array]:
            return self._trace(params, x, microbatch)[1]

        jaxpr, shapes = jax.make_jaxpr(residuals, return_shape=True)(params, x, microbatch)
        num_params, num_x = len(jax.tree.leaves(params)), len(jax.tree.leaves(x))
        tainted = set(jaxpr.jaxpr.invars[num_params : num_params + num_x])
        for equation in jaxpr.jaxpr.eqns:
            if any(not isinstance(v, Constant) and v in tainted for v in equation.invars):
                tainted.update(equation.outvars)
        outvars = jaxpr.jaxpr.outvars
        depends = [not isinstance(v, Constant) and v in tainted for v in outvars]
        self._copies = _find_copies(jaxpr.jaxpr, [index for index, on_x in enumerate(depends) if on_x])
        self._is_kept = [on_x and index not in self._copies for index, on_x in enumerate(depends)]
        return [shape for shape, kept in zip(shapes, self._is_kept, strict=True) if kept]

    def forward(self, params: Any, x: jax.Array, microbatch: Any) -> tuple[jax.Array, list[jax.Array]]:
        """Return layer(params, x, microbatch) and the residuals to keep."""
        y, leaves, _ = self._trace(params, x, microbatch)
        return y, [leaf for leaf, kept in zip(leaves, self._is_kept, strict=True) if kept]

    def backward(
        self, params: Any, residuals: list[jax.Array], microbatch: Any, grad: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Return the gradients of params and x, given that of the output."""
        # x is a dummy of the same type as its gradient: whatever depends on it is replaced, so the compiler drops it.
        _, leaves, tree = self._trace(params, jnp.zeros_like(grad), microbatch)
        kept = iter(residuals)
        leaves = [next(kept) if is_kept else leaf for leaf, is_kept in zip(leaves, self._is_kept, strict=True)]
        for index, copy in self._copies.items():
            leaves[index] = copy.make(leaves)
        grads, dx = jax.tree.unflatten(tree, leaves)(grad)
        return self._unprepare(grads), dx

    def forward_stack(
        self, layers: Layers, x: jax.Array, saved: list[jax.Array], microbatch: Any, *, slot: Place
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Run layers in order; return what comes out, and the buffers with what each keeps at [*slot, layer]."""

        def layer(index: jax.Array, state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            x, saved = state
            y, residuals = self.forward(layers.own(index), x, microbatch)
            kept = zip(saved, residuals, strict=False)
            written = [write(buffer, vary(leaf), *slot, index) for buffer, leaf in kept]
            return vary(y), [*written, *saved[len(residuals) :]]

        return layers.loop(layer, (x, saved))

    def backward_stack(
        self, layers: Layers, grad: jax.Array, saved: list[jax.Array], microbatch: Any, sums: Any, *, slot: Place
    ) -> tuple[jax.Array, Any]:
        """Run the backward of layers in reverse; return dx, and the sums with their gradients added in place."""

        def layer(turn: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            grad, sums = state
            index = layers.count - 1 - turn
            residuals = [read(buffer, *slot, index) for buffer in saved]
            d_params, dx = self.backward(layers.own(index), residuals, microbatch, grad)
            add = partial(accumulate, place=(layers.chunk, index))
            return vary(dx), jax.tree.map(add, sums, d_params)

        return layers.loop(layer, (grad, sums))

    def _unprepare(self, grads: Any) -> Any:
        """Return gradients of the parameters, given those of what was made of them."""
        if self._prepare is None:
            return grads
        return transpose(self._prepare, self._own)(grads)

    def _trace(self, params: Any, x: jax.Array, microbatch: Any) -> tuple[jax.Array, list[jax.Array], Any]:
        y, vjp = jax.vjp(lambda params, x: self._layer(params, x, microbatch), params, x)
        leaves, tree = jax.tree.flatten(vjp)
        return y, leaves, tree


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """A residual that is another one, `source`, in another shape."""

    source: int
    shape: tuple[int, ...]

    def make(self, leaves: list[jax.Array]) -> jax.Array:
        return leaves[self.source].reshape(self.shape)


_SAME = ("reshape", "sharding_constraint")
"""Operations that change no number, nor the order of numbers."""


def _find_copies(jaxpr: Jaxpr, candidates: list[int]) -> dict[int, _Copy]:
    """Of some outputs, those that have the numbers of an earlier one."""
    makers: dict[Any, JaxprEqn] = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive.name in _SAME}
    sources: dict[Any, int] = {}
    copies: dict[int, _Copy] = {}
    for index in candidates:
        var: Any = jaxpr.outvars[index]
        shape = var.aval.shape
        while (maker := makers.get(var)) is not None:
            var = maker.invars[0]
        if (source := sources.setdefault(var, index)) != index:
            copies[index] = _Copy(source=source, shape=shape)
    return copies
