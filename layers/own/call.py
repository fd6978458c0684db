"""Call modules of the user's in a block, and blocks of the user's where there is no pipeline."""

from typing import Any

import jax

from ...meshes import ModelError
from .load import asked_of
from .mistakes import code_of
from .protocol import Output


def same_as(x: jax.Array, y: Any, module: Any) -> jax.Array:
    """Return y, the result of a part of a block, after a check that it can be added to x.

    Raises:
        ModelError: it is no array of x's shape and dtype.
    """
    if not isinstance(y, jax.Array) or (y.shape, y.dtype) != (x.shape, x.dtype):
        what = f"{y.dtype}{list(y.shape)}" if isinstance(y, jax.Array) else f"a {type(y).__name__}"
        raise ModelError(
            f"{type(module).__name__} of a {x.dtype}{list(x.shape)} returns {what}: a block adds the two.",
            fix="return an array of the same shape and dtype, y.astype(x.dtype) say.",
        )
    return y


def join_layers(module: Any) -> None:
    """Join layers of a module that read the same input, if it has a `join` of its own."""
    if hasattr(module, "join"):
        module.join()


def call_block(block: Any, x_BTD: jax.Array, **offered: Any) -> Output:
    """Return the output of a block of the user's, which is given what it asks for of `offered`, by name.

    Raises:
        ModelError: x changes its shape or dtype.
    """
    with code_of(block):
        out = block(x_BTD, **{name: offered[name] for name in asked_of(block)})
    out = out if isinstance(out, Output) else Output(x=out)
    same_as(x_BTD, out.x, block)
    return out


def run_alone(block: Any, x_BTD: jax.Array, places: Any) -> tuple[jax.Array, jax.Array | None]:
    """Return the result of a block of the user's without a pipeline, and its part of the loss.

    x[B@data, T, D] -> y[B@data, T, D], float32 [] or None

    Raises:
        ModelError: it asks for what a pipeline alone gives.
    """
    if missing := [name for name in asked_of(block) if name != "places"]:
        raise ModelError(
            f"{type(block).__name__} asks for {' and '.join(missing)}, which a Transformer has only in a pipeline.",
            fix="run it by pipeline.split_transformer, on a mesh of one device too.",
        )
    out = call_block(block, x_BTD, places=places)
    return out.x, out.loss
