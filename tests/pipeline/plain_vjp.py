"""Plan the backward of a plain layer(params, x, microbatch) -> y, as the executor plans that of its own form of layers.

x and y are one array here, where the executor has trees and lists of their floating-point leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from trellax.pipeline import Output
from trellax.pipeline.executor.backward.residuals import LayerVjp, plan_layer
from trellax.pipeline.executor.backward.split_backward import SplitBackward
from trellax.pipeline.model.protocol import Given

Layer = Callable[[Any, Any, Any], Any]


def given(microbatch: Any) -> Given:
    """Return what a layer is given in the executor: a microbatch and its number."""
    return Given(microbatch=microbatch, number=jnp.int32(0))


@dataclass(frozen=True, kw_only=True)
class PlainVjp:
    """The forward and backward of a layer, as planned for the executor."""

    own: LayerVjp

    @property
    def kept(self) -> list[jax.ShapeDtypeStruct]:
        """Types of the residuals."""
        return self.own.kept

    def forward(self, params: Any, x: Any, microbatch: Any) -> tuple[Any, list[jax.Array]]:
        """Return (y, residuals)."""
        out, residuals = self.own.forward(params, x, given(microbatch))
        return out.x, residuals

    def backward(self, params: Any, residuals: list[jax.Array], microbatch: Any, grad: Any) -> tuple[Any, Any]:
        """Return the gradients of params and of x."""
        (d_params, _), (dx,) = self.own.backward(params, residuals, given(microbatch), [grad])
        return d_params, dx

    def halves(self, params: Any, x: Any, microbatch: Any) -> "PlainHalves":
        """Return the backward in two halves."""
        return PlainHalves(own=SplitBackward(self.own, params, self.kept, given(microbatch), [x]))


@dataclass(frozen=True, kw_only=True)
class PlainHalves:
    """The halves of a layer's backward, as planned for the executor."""

    own: SplitBackward

    @property
    def extra(self) -> list[jax.ShapeDtypeStruct]:
        """Types of what the first half keeps besides the residuals."""
        return self.own.extra

    def input_grad(self, params: Any, saved: list[Any], microbatch: Any, grad: Any) -> tuple[Any, list[Any]]:
        """Return the gradient of x, and what the second half needs."""
        (dx,), kept = self.own.input_grad(params, saved, given(microbatch), [grad])
        return dx, kept

    def weight_grad(self, params: Any, kept: list[Any], microbatch: Any) -> Any:
        """Return the gradients of params."""
        return self.own.weight_grad(params, kept, given(microbatch))[0]


def plan_plain(layer: Layer, params: Any, x: Any, microbatch: Any) -> PlainVjp:
    """Return the forward and backward of layer(params, x, microbatch) -> y, with residuals chosen."""
    run = lambda params, x, given: Output(x=layer(params, x, given.microbatch))  # noqa: E731
    return PlainVjp(own=plan_layer(run, params, x, given(microbatch)))
