"""Checks of the arrays that layers receive, from shapes and dtypes alone: they run while tracing."""

from typing import Any

import jax.numpy as jnp

from ..meshes import ModelError


def check_features(x: Any, num_features: int, *, layer: str) -> None:
    """Raise unless the last dimension of x[..., D] has the features that a layer's kernel multiplies.

    Raises:
        ModelError: x is not an array, has no dimension, or a different number of features.
    """
    shape = _shape_of(x, "x", layer)
    if not shape or shape[-1] != num_features:
        raise ModelError(
            f"{layer} multiplies {num_features} features, but x has shape {list(shape)}.",
            fix=f"give it an array [..., {num_features}], or build the layer for the features that x has.",
        )


def check_hidden(x_BTD: Any, num_features: int, *, layer: str) -> None:
    """Raise unless x is [B, T, D] with at least one token.

    Raises:
        ModelError: x is not an array, not of this shape, or without tokens.
    """
    shape = _shape_of(x_BTD, "x", layer)
    if len(shape) != 3 or shape[-1] != num_features or 0 in shape:
        raise ModelError(
            f"{layer} reads x[batch, tokens, {num_features}] with at least one token, but x has shape {list(shape)}.",
            fix="reshape x, for example x[None] for a single sequence.",
        )


def check_token_ids(tokens_BT: Any, *, max_tokens: int | None) -> None:
    """Raise unless tokens are integers [B, T] with 1 <= T <= `max_tokens`.

    Args:
        max_tokens: the number of learned positions; None where positions are rotary.

    Raises:
        ModelError: with the shape or dtype that they have.
    """
    shape = _shape_of(tokens_BT, "tokens", "an embedding")
    if len(shape) != 2 or 0 in shape:
        raise ModelError(
            f"an embedding reads tokens[batch, tokens], at least one, but they have shape {list(shape)}.",
            fix="reshape them, for example tokens[None] for a single sequence.",
        )
    if not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ModelError(
            f"an embedding reads token ids, which are integers, but tokens are {tokens_BT.dtype}.",
            fix="use tokens.astype('int32').",
        )
    if max_tokens is not None and shape[1] > max_tokens:
        raise ModelError(
            f"sequences of {shape[1]} tokens, but the model has learned positions for max_tokens={max_tokens}.",
            fix=f"cut sequences to {max_tokens} tokens, set max_tokens={shape[1]}, or use positions='rotary'.",
        )


def check_targets(targets_BT: Any, weights_BT: Any, *, shape: tuple[int, ...]) -> None:
    """Raise unless there is one integer target and one weight for each of the [B, T] tokens of `shape`.

    Raises:
        ModelError: with the shapes or the dtype that they have.
    """
    found = _shape_of(targets_BT, "targets", "the loss"), _shape_of(weights_BT, "weights", "the loss")
    if found != (shape, shape):
        raise ModelError(
            f"the loss compares {list(shape)} tokens, but targets have shape {list(found[0])} and weights "
            f"{list(found[1])}.",
            fix="give one target and one weight for each token.",
        )
    if not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise ModelError(
            f"targets are token ids, which are integers, but these are {targets_BT.dtype}.",
            fix="use targets.astype('int32').",
        )


def _shape_of(array: Any, name: str, layer: str) -> tuple[int, ...]:
    shape = getattr(array, "shape", None)
    if shape is None:
        raise ModelError(
            f"{layer} is given {name} of type {type(array).__name__}, which is not an array.",
            fix=f"use jnp.asarray({name}).",
        )
    return tuple(shape)
