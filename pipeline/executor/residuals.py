"""The backward pass of a layer as data: what `jax.vjp` must keep of each microbatch, ready for a ring buffer.

Kept is only what depends on the layer's input, and each array once, however often it is reshaped. The rest (the weights
themselves, their casts, causal masks, rotary tables) is made again in the backward tick from parameters and microbatch,
which are at hand there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.extend.core import JaxprEqn, Var

from .buffers import add, read, type_of, vary, write
from .equations import depending_on, keeps_numbers, needed, read_by, run, value_of
from .prepare import transpose
from .traced_vjp import TracedVjp, trace_vjp

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

    Both are equations of one trace, so the layer's own code runs neither here nor there, and never on made-up values.

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
        self._plan: _Plan | None = None

    def plan(self, params: Any, x: jax.Array, microbatch: Any) -> list[jax.ShapeDtypeStruct]:
        """Find out what to keep, and return the shapes of that; call it before the other two.

        Only the types of the arguments matter.
        """

        def layer(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
            return vary(self._layer(params, x, microbatch))

        self._plan = _make_plan(trace_vjp(layer, params, x, microbatch, x))
        return [type_of(v) for v in self._plan.kept]

    def forward(self, params: Any, x: jax.Array, microbatch: Any) -> tuple[jax.Array, list[jax.Array]]:
        """Return layer(params, x, microbatch) and the residuals to keep."""
        plan = self._planned()
        env = plan.traced.env(params, x, microbatch)
        run(plan.forward, env)
        return value_of(env, plan.traced.y), [env[v] for v in plan.kept]

    def backward(
        self, params: Any, residuals: list[jax.Array], microbatch: Any, grad: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Return the gradients of params and x, given that of the output."""
        plan = self._planned()
        invars, num_params, num_x = plan.traced.closed.jaxpr.invars, len(jax.tree.leaves(params)), len(plan.traced.x)
        # x is not at hand, and has no value here.
        env = plan.traced.env(params) | {plan.traced.grad: grad}
        env |= zip(invars[num_params + num_x : -1], jax.tree.leaves(microbatch), strict=True)
        env |= zip(plan.kept, residuals, strict=True)
        env |= {copy: env[source].reshape(copy.aval.shape) for copy, source in plan.copies.items()}
        run([*plan.again, *plan.traced.backward], env)
        grads, dx = plan.traced.results(env)
        return self._unprepare(grads), dx

    def forward_stack(
        self, layers: Layers, x: jax.Array, saved: list[jax.Array], microbatch: Any, *, slot: Place
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Run layers in order; return what comes out, and the buffers with what each keeps at [*slot, layer]."""

        def layer(index: jax.Array, state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            x, saved = state
            y, residuals = self.forward(layers.own(index), x, microbatch)
            kept = zip(saved, residuals, strict=False)
            written = [write(buffer, leaf, *slot, index) for buffer, leaf in kept]
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
            return vary(dx), add(sums, d_params, (layers.chunk, index))

        return layers.loop(layer, (grad, sums))

    def _unprepare(self, grads: Any) -> Any:
        """Return gradients of the parameters, given those of what was made of them."""
        if self._prepare is None:
            return grads
        return transpose(self._prepare, self._own)(grads)

    def _planned(self) -> "_Plan":
        assert self._plan is not None, "plan() comes first"
        return self._plan


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is kept of a layer, and which equations run when.

    Args:
        copies: residuals that are another one in another shape, by that one.
        again: what the backward needs that depends on parameters and microbatch alone.
    """

    traced: TracedVjp
    kept: list[Any]
    copies: dict[Any, Any]
    forward: list[JaxprEqn]
    again: list[JaxprEqn]


def _make_plan(traced: TracedVjp) -> _Plan:
    read = read_by(traced.backward) | dict.fromkeys(v for v in traced.outs if isinstance(v, Var))
    dependent = depending_on(traced.forward, traced.x)
    made = (*traced.x, *(v for eqn in traced.forward for v in eqn.outvars))
    copies = _find_copies(traced.forward, [v for v in made if v in read and v in dependent])
    kept = [v for v in read if v in dependent and v not in copies]
    return _Plan(
        traced=traced,
        kept=kept,
        copies=copies,
        forward=needed(traced.forward, [traced.y, *kept], acts=True),
        again=needed(traced.forward, [v for v in read if v not in dependent]),
    )


def _find_copies(eqns: Iterable[JaxprEqn], residuals: Iterable[Any]) -> dict[Any, Any]:
    """Of some variables, those that have the numbers of an earlier one in the same order, by that one."""
    operands = {eqn.outvars[0]: eqn.invars[0] for eqn in eqns if keeps_numbers(eqn)}
    firsts: dict[Any, Any] = {}
    copies: dict[Any, Any] = {}
    for v in residuals:
        root = v
        while root in operands:
            root = operands[root]
        if (first := firsts.setdefault(root, v)) is not v:
            copies[v] = first
    return copies
