"""The backward pass of a stage as data: what `jax.vjp` keeps, without the parameters, ready for a ring buffer."""

from collections.abc import Callable
from typing import Any

import jax


class StageVjp:
    """A stage's forward that returns its residuals as a list of arrays, and a backward that takes them back.

    Residuals that are the parameters themselves are left out, since the parameters are at hand in the backward tick:
    otherwise every microbatch in flight would keep a copy of the weights.
    """

    def __init__(self, stage: Callable[[Any, jax.Array, Any], jax.Array]) -> None:
        self._stage = stage
        self._tree: Any = None
        self._param_of_leaf: list[int | None] = []

    def forward(self, params: Any, x: jax.Array, microbatch: Any) -> tuple[jax.Array, list[jax.Array]]:
        """Return stage(params, x, microbatch) and the residuals of its gradient in params and x."""
        y, vjp = jax.vjp(lambda params, x: self._stage(params, x, microbatch), params, x)
        leaves, self._tree = jax.tree.flatten(vjp)
        # By identity: a scan over layers forwards its stacked weights to the residuals unchanged.
        place = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(params))}
        self._param_of_leaf = [place.get(id(leaf)) for leaf in leaves]
        return y, [leaf for leaf, param in zip(leaves, self._param_of_leaf, strict=True) if param is None]

    def backward(self, params: Any, residuals: list[jax.Array], grad: jax.Array) -> tuple[Any, jax.Array]:
        """Return the gradients of params and x, given that of the output; `forward` must have been traced before."""
        weights, kept = jax.tree.leaves(params), iter(residuals)
        leaves = [next(kept) if param is None else weights[param] for param in self._param_of_leaf]
        return jax.tree.unflatten(self._tree, leaves)(grad)
