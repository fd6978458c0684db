"""Host arrays into and out of programs whose devices belong to several processes, each of which has all values."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def with_placed_inputs(compiled: Callable[..., Any], shapes: tuple[Any, ...]) -> Callable[..., Any]:
    """Return a program that takes numpy arrays, the same on all processes, as arguments of these shapes and shardings.

    jax itself refuses numpy arrays for a sharding over the devices of several processes.
    """

    def run(*args: Any) -> Any:
        return compiled(*jax.tree.map(_place, shapes, args))

    return run


def _place(shape: jax.ShapeDtypeStruct, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf
    values = np.asarray(leaf, shape.dtype)
    return jax.make_array_from_callback(values.shape, shape.sharding, lambda part: values[part])


def gather(leaf: jax.Array) -> np.ndarray:
    """Return all values of an array; if its devices belong to several processes, all must call it."""
    return np.asarray(leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True))
