"""Choose a layer's residuals, the values kept for its backward, and cut forward and backward out of one trace.

Worked example, a dense layer y = tanh(x @ w) with x[b, D] and w[D, D]. `trace_vjp` gives one jaxpr of both passes:

    forward     a = x @ w                backward    h  = dy * s
                y = tanh(a)                          da = h + h * y
                s = 1 - y                            dw = x.T @ da
                                                     dx = da @ w.T

The backward reads s, y, x and w. The first three depend on the layer's input, so they differ between microbatches and
are kept; w does not, and is read from the parameters again:

               +------- forward turn --------+            +------ backward turn ------+
    x, w  ---> |  x @ w -> tanh -> 1 - y     | ---> y     |  dx, and dw to its sum    | <--- dy, w
               +-----------------------------+            +---------------------------+
                       |                                              ^
                       +--- s, y, x ---> buffers [slot, layer] -------+

Values of parameters and microbatch alone (casts of weights, causal masks, rotary tables) are computed again in the
backward turn, so they take no room in the buffer. An array that the backward reads in two shapes is kept once. The
backward of a layer under `jax.checkpoint` reads less, so less is kept: rematerialisation (Chen et al. 2016, section 4)
is the layer's choice. Read `split_backward.py` next.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Var

from ....meshes.device_axes import mark_varying
from ...model.protocol import Given, Output
from ..buffers import floats_of, type_of
from ..prepare import trained_after, transpose_trained
from ..split_weights.sharded import LayerGather
from .equations import depending_on, keeps_numbers, needed, read_by, run
from .traced_vjp import TracedVjp, trace_vjp


@dataclass(frozen=True, kw_only=True)
class LayerVjp:
    """A layer's forward that also returns its residuals as a list of arrays, and a backward that reads them.

    Both run equations of one trace. The layer's own Python code does not run again.

    residuals: variables that the backward reads and that depend on the layer's input.
    copies: residuals that are another one in another shape, by that one: made again by a reshape.
    forward_eqns: equations that make the output and the residuals.
    again_eqns: equations that the backward turn runs again, of parameters and microbatch alone.
    unprepare: maps gradients of prepared parameters to those of the parameters.
    """

    traced: TracedVjp
    residuals: list[Any]
    copies: dict[Any, Any]
    forward_eqns: list[JaxprEqn]
    again_eqns: list[JaxprEqn]
    unprepare: Callable[[Any], Any]

    @property
    def kept(self) -> list[jax.ShapeDtypeStruct]:
        """Types of the residuals, with the mesh axes over which each varies."""
        return [type_of(v) for v in self.residuals]

    def forward(self, params: Any, x: Any, given: Given) -> tuple[Output, list[jax.Array]]:
        """Return layer(params, x, given) and the residuals."""
        env = self.traced.env(params, x, given)
        run(self.forward_eqns, env)
        return self.traced.output(env), [env[v] for v in self.residuals]

    def backward(
        self, params: Any, residuals: list[jax.Array], given: Given, grad: list[jax.Array]
    ) -> tuple[tuple[Any, Any], list[jax.Array]]:
        """Return gradients of (parameters, microbatch) and of x, given the residuals and the gradient of the output."""
        traced = self.traced
        invars, num_params, num_x = traced.closed.jaxpr.invars, len(jax.tree.leaves(params)), len(traced.x)
        # The inputs are (params, x, given, grad). x gets no value, unless it is a residual itself.
        env = traced.env(params) | dict(zip(traced.grad, grad, strict=True))
        env |= zip(invars[num_params + num_x : len(invars) - len(grad)], jax.tree.leaves(given), strict=True)
        env |= zip(self.residuals, residuals, strict=True)
        env |= {copy: _restore(env[source], copy) for copy, source in self.copies.items()}
        run([*self.again_eqns, *traced.backward], env)
        (d_params, d_batch), dx = traced.gradients(env)
        return (self.unprepare(d_params), d_batch), dx


def plan_layer(
    layer: Callable[[Any, Any, Given], Output],
    params: Any,
    x: Any,
    given: Given,
    *,
    prepare: Callable[[Any], Any] | None = None,
    unprepared: Any = None,
    gather: LayerGather | None = None,
    wants_batch: bool = False,
    trained: Any = None,
) -> LayerVjp:
    """Return the forward and backward of layer(params, x, given) -> Output, with residuals chosen.

    Only the types of the arguments matter; nothing is computed.

    Args:
        prepare: makes `params` of the parameters of one layer; gradients are those of the parameters then.
        unprepared: the parameters of one layer, where `prepare` or `gather` is given.
        gather: makes `params` whole where this device keeps a part; gradients are those of the part then, summed.
        wants_batch: whether the backward also returns the gradient of the microbatch.
        trained: a tree of bools like the parameters of one layer, without those of `prepare`; all if left out.
    """
    own = trained if prepare is None or trained is None else trained_after(prepare, unprepared, trained)
    traced = trace_vjp(layer, params, x, given, floats_of(x), wants_batch=wants_batch, trained=own)
    # A gradient may be a forward value itself, such as x, and then no backward equation reads it.
    read = read_by(traced.backward) | dict.fromkeys(v for v in traced.grads if isinstance(v, Var))
    dependent = depending_on(traced.forward, traced.x)
    made = (*traced.x, *(v for eqn in traced.forward for v in eqn.outvars))
    # Sought in the order in which the values are made, so that an original comes before its reshapes.
    copies = _find_copies(traced.forward, [v for v in made if v in read and v in dependent])
    residuals = [v for v in read if v in dependent and v not in copies]
    return LayerVjp(
        traced=traced,
        residuals=residuals,
        copies=copies,
        forward_eqns=needed(traced.forward, [*traced.out, *residuals], acts=True),
        again_eqns=needed(traced.forward, [v for v in read if v not in dependent]),
        unprepare=_unprepare(prepare, unprepared, gather, trained),
    )


def _unprepare(
    prepare: Callable[[Any], Any] | None, unprepared: Any, gather: LayerGather | None, trained: Any
) -> Callable[[Any], Any]:
    """Return the map from gradients of a layer's whole, prepared parameters to those of the parameters as kept."""
    whole = unprepared if gather is None else gather.gather_kept(unprepared)
    back = (lambda grads: grads) if prepare is None else transpose_trained(prepare, whole, trained)
    # Summed as float32 parameters, whatever dtype they were sent in.
    return back if gather is None else (lambda grads: gather.scatter(back(grads)))


def _restore(source: jax.Array, copy: Any) -> jax.Array:
    """Return the residual `copy`, given another one with the same numbers in another shape or type."""
    return mark_varying(source.reshape(copy.aval.shape), sorted(copy.aval.mat.varying))


def _find_copies(eqns: Iterable[JaxprEqn], residuals: Iterable[Any]) -> dict[Any, Any]:
    """Map each residual that has the numbers of an earlier one in the same order to that one.

    y[b, T, D] and y.reshape(b * T, D), say: both come from y through reshapes alone.
    """
    operands = {eqn.outvars[0]: eqn.invars[0] for eqn in eqns if keeps_numbers(eqn)}
    firsts: dict[Any, Any] = {}
    copies: dict[Any, Any] = {}
    for v in residuals:
        root = v
        while root in operands:
            root = operands[root]
        first = firsts.setdefault(root, v)
        if first is not v:
            copies[v] = first
    return copies
