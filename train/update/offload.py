"""Update parameters part by part, with the optimizer's moments in host memory: each part's are copied in and out.

A part is an eighth of the layers, the embedding or the head. Its moments are on the device while it is updated, and
XLA copies those of other parts meanwhile, on streams of their own:

    copy in    | 0 | 1 | 2 | 3 | ...
    update         | 0 | 1 | 2 | 3 | ...
    copy out           | 0 | 1 | 2 | 3 | ...

Layers are sliced at constant places, outside of loops. Read `../step.py` for the use.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ...meshes.host_memory import to_device, to_host
from ...pipeline import PipelineParams
from ...pipeline.model.frozen import keep_trained, merge_trained
from ...plan.costs.memory_model import UPDATE_PARTS

_LAYERS = 2
"""The dimension of layers in a stage parameter [chunks, ranks, layers, ...]."""


def update_by_parts(
    optimizer: Any, *, grads: PipelineParams, opt_state: Any, params: PipelineParams, good: jax.Array
) -> tuple[PipelineParams, Any]:
    """Return what `apply_update` returns, for an optimizer state whose copies of the parameters are in host memory.

    Args:
        optimizer: an `optax.GradientTransformation` that updates each matrix from its own gradients and moments.
    """
    # Not before the gradients: the first part would lie on the device while the layers run, and take their memory.
    held, new_state = jax.lax.optimization_barrier((opt_state, good))[0], opt_state
    for part in _list_parts(params):
        state = map_params(lambda node, part=part: jax.tree.map(to_device, part.take(node)), held)
        given = {"grads": part.take(grads), "opt_state": state, "params": part.take(params)}
        own, new_state = jax.lax.optimization_barrier(apply_update(optimizer, **given, good=good))
        params = part.put(params, own)
        held = map_params(lambda old, new, part=part: part.put(old, jax.tree.map(to_host, new)), held, new_state)
    # The moments of all parts; counts of steps, which every part advances from the same old ones, of the last.
    return params, join_params(held, new_state)


def apply_update(
    optimizer: Any, *, grads: PipelineParams, opt_state: Any, params: PipelineParams, good: jax.Array
) -> tuple[PipelineParams, Any]:
    """Return updated parameters and optimizer state; both unchanged where `good`, bool[], is false.

    Frozen parameters, whose gradient is None, are unknown to the optimizer and stay as they are.
    """
    is_trained = jax.tree.map(lambda grad: grad is not None, grads, is_leaf=lambda grad: grad is None)
    trained = keep_trained(params, is_trained)
    updates, new_state = optimizer.update(grads, opt_state, trained)
    # A select, not a product with 0: where the step is bad, NaN * 0 would still be NaN.
    trained = jax.tree.map(lambda p, u: jnp.where(good, p + u, p), trained, updates)
    opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), new_state, opt_state)
    return merge_trained(trained, params), opt_state


def zero_moments(shapes: Any) -> Any:
    """Return zeros of these shapes and shardings, made one after another: no device holds more than one of them."""
    return jax.tree.map(lambda leaf: _zeros(leaf.shape, leaf.dtype, leaf.sharding)(), shapes)


@lru_cache(maxsize=256)
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def map_params(change: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return a tree with `change` applied to every parameter tree in it: the parameters and the optimizer's moments.

    Args:
        others: trees of the same structure; `change` is given their parameter trees too.
    """

    def visit(node: Any, *rest: Any) -> Any:
        return change(node, *rest) if _is_params(node) else node

    return jax.tree.map(visit, tree, *others, is_leaf=_is_params)


def join_params(moments: Any, rest: Any) -> Any:
    """Return a tree with the parameter trees of `moments` and all other leaves of `rest`."""
    return jax.tree.map(lambda one, other: one if _is_params(one) else other, moments, rest, is_leaf=_is_params)


@dataclass(frozen=True)
class _Layers:
    """Layers `start` to `stop` of every chunk and rank, of the parameters under some names of the first level."""

    names: tuple[str, ...]
    start: int
    stop: int

    def take(self, params: PipelineParams) -> PipelineParams:
        def cut(leaf: jax.Array) -> jax.Array:
            return jax.lax.slice_in_dim(leaf, self.start, self.stop, axis=_LAYERS)

        return PipelineParams(stages={name: jax.tree.map(cut, params.stages[name]) for name in self.names}, shared={})

    def put(self, params: PipelineParams, new: PipelineParams) -> PipelineParams:
        def paste(leaf: jax.Array, own: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(leaf, own, self.start, axis=_LAYERS)

        own = {name: jax.tree.map(paste, params.stages[name], new.stages[name]) for name in self.names}
        return replace(params, stages={**params.stages, **own})


@dataclass(frozen=True)
class _Shared:
    """The embedding or the head."""

    name: str

    def take(self, params: PipelineParams) -> PipelineParams:
        return PipelineParams(stages={}, shared={self.name: params.shared[self.name]})

    def put(self, params: PipelineParams, new: PipelineParams) -> PipelineParams:
        return replace(params, shared={**params.shared, **new.shared})


def _list_parts(params: PipelineParams) -> list[_Layers | _Shared]:
    # Layers of different kinds have arrays of different lengths.
    names_of: dict[int, list[str]] = {}
    for name, own in params.stages.items():
        names_of.setdefault(jax.tree.leaves(own)[0].shape[_LAYERS], []).append(name)
    # More parts would take less memory at a time, and make a larger program.
    size = -(-sum(names_of) // UPDATE_PARTS)
    layers = [
        _Layers(tuple(names), start, min(start + size, num_layers))
        for num_layers, names in names_of.items()
        for start in range(0, num_layers, size)
    ]
    return [*layers, *map(_Shared, params.shared)]


def _is_params(node: Any) -> bool:
    return isinstance(node, PipelineParams)
