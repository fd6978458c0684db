"""Read a save with another `train.ema` than the run has: begin the average of the weights, or leave it out.

A resumed run refuses another `train.ema`, unless told to `--override`. The average of a save without one begins as its
weights, as that of a new run does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from ...hub.saves.reader import Arrays, Shapes
from ...hub.saves.seal import AVERAGE, PARAMS, Seal
from ...meshes.host_memory import is_in_host_memory, to_host

Leaf = TypeVar("Leaf")


def arrays_in_both(seal: Seal, wanted: Shapes) -> tuple[Seal, Shapes]:
    """Return the seal and the wanted arrays, both without the average of the weights if one of them has none."""
    if _has_average(seal.arrays) == _has_average(wanted):
        return seal, wanted
    return replace(seal, arrays=_without_average(seal.arrays)), _without_average(wanted)


def begin_average(arrays: Arrays, wanted: Shapes) -> Arrays:
    """Return the arrays of a save with an average of the weights, which are the weights themselves if it has none."""
    if _has_average(arrays) or not _has_average(wanted):
        return arrays
    begun = {
        path: _copy(arrays[PARAMS + path.removeprefix(AVERAGE)], shape)
        for path, shape in wanted.items()
        if path.startswith(AVERAGE)
    }
    return {**arrays, **begun}


def _copy(weights: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    move = to_host if is_in_host_memory(shape) else partial(jnp.array, copy=True)
    return jax.jit(move, out_shardings=shape.sharding)(weights)


def _has_average(paths: Iterable[str]) -> bool:
    return any(path.startswith(AVERAGE) for path in paths)


def _without_average(arrays: Mapping[str, Leaf]) -> dict[str, Leaf]:
    return {path: own for path, own in arrays.items() if not path.startswith(AVERAGE)}
