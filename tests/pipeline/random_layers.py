"""Random small layers over the primitives of jax: a grammar of steps, drawn from a seed.

A layer keeps a pool of arrays, which begins with its input and its parameters. A step takes one or two of them, of
whatever rank, and adds what an operation makes of them; the layer returns its input plus a part of all of them. So most
values are read several times, in several shapes: what a backward keeps of them is reused wherever it can be.
Steps keep numbers near 1, so that gradients neither vanish nor overflow.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .random_steps import STEPS, fit

BATCH, TOKENS, WIDTH = 2, 3, 4
"""The shape of a layer's input."""

_MOST = 96
"""Number of elements of an array in the pool."""

Layer = Callable[[Any, jax.Array, Any], jax.Array]


def random_layer(seed: int, num_steps: int) -> Layer:
    """Return a layer(params, x, microbatch) of a number of random steps; every layer takes `random_inputs`."""

    def layer(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        draw = np.random.default_rng(seed)
        pool = [x, *jax.tree.leaves(params), microbatch["gate"], _bits(microbatch["ids"])]
        pool = [_small(value) for value in pool if jnp.issubdtype(value.dtype, jnp.floating)]
        for name in draw.choice(sorted(STEPS), num_steps):
            # Twice as often what came last, and the input.
            operand = pool[draw.choice([0, len(pool) - 1, *range(len(pool))])]
            other = fit(pool[draw.integers(len(pool))], operand.shape)
            pool.append(_small(STEPS[name](draw, operand, other)))
        parts = [fit(value, x.shape) * draw.uniform(0.1, 0.4) for value in pool[1:]]
        return x + sum(parts[1:], start=parts[0]) / np.sqrt(len(parts)).astype(np.float32)

    return layer


def random_inputs(seed: int, *lead: int) -> tuple[Any, Any]:
    """Return (parameters [*lead, ...], microbatch [BATCH, ...]) as numpy arrays; the input is microbatch["x"]."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: (0.5 * draw.standard_normal(shape)).astype(np.float32)  # noqa: E731
    params = {
        "matrix": normal(*lead, WIDTH, WIDTH),
        "tokens": normal(*lead, TOKENS, TOKENS),
        "bias": normal(*lead, WIDTH),
        "scale": normal(*lead),
        "kernel": normal(*lead, 2, 2, 3),
        "whole": draw.integers(-9, 9, (*lead, WIDTH), np.int8),
    }
    microbatch = {
        "x": normal(BATCH, TOKENS, WIDTH),
        "gate": normal(BATCH),
        "ids": draw.integers(0, 9, (BATCH, TOKENS), np.int32),
    }
    return params, microbatch


def primitives_of(jaxpr: Any) -> set[str]:
    """Return the names of all primitives in a jaxpr, those inside others too."""
    inner = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)]
    own = {eqn.primitive.name for eqn in jaxpr.eqns}
    return own.union(*(primitives_of(getattr(value, "jaxpr", value)) for value in inner if _is_jaxpr(value)))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _bits(ids: jax.Array) -> jax.Array:
    """Return numbers in [-1, 1], derived from an integer by shifts and masks."""
    mixed = (ids.astype(jnp.uint32) * np.uint32(2654435761)) >> np.uint32(7)
    return ((mixed ^ (mixed << np.uint32(3))) & np.uint32(255)).astype(jnp.float32) / 128 - 1


def _small(value: jax.Array) -> jax.Array:
    """Cut a large array to size, and give a scalar a dimension."""
    value = value.astype(jnp.float32)
    return fit(value, (_MOST // 8, 4)) if value.size > _MOST else value.reshape(1) if value.ndim == 0 else value
