"""The state that the executor's loop carries from turn to turn: buffers and sums of one rank."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .buffers import read, write

Wants = Literal["loss", "grads"]
"""Result of a program: the loss by forwards alone, or the loss and its gradients."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Buffers and sums of one rank. A program that wants the loss alone has only `loss` and `activations`.

    loss: sum over the microbatches done so far, float32 [].
    activations: outputs of stages that wait to be sent or read, [slots, b, ...].
    gradients: gradients of stage inputs and outputs that wait to be sent or read, [slots, b, ...].
    residuals: what layers keep for their backward, leaves [slots, layers, ...].
    stage_grads: sums of the gradients of params.stages, float32 leaves [C, k, ...]; None for whole numbers.
    shared_grads: the same of params.shared.
    """

    loss: jax.Array
    activations: jax.Array
    gradients: Any = None
    residuals: Any = ()
    stage_grads: Any = None
    shared_grads: Any = None


def put(buffer: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
    """Return the buffer [slots, ...] with the value at a slot, or unchanged where the slot is NONE."""
    return jax.lax.cond(slot < 0, lambda b: b, lambda b: write(b, value, slot), buffer)


def broadcast_slot(buffer: jax.Array, slot: jax.Array) -> jax.Array:
    """Return to every rank the value of a buffer [slots, ...] on the one rank whose slot is not NONE.

    Costs one all-reduce over `pipe`, in float32: XLA's CPU backend aborts on bfloat16 sums over manual axes where
    others are left to the compiler.
    """
    value = read(buffer, jnp.maximum(slot, 0)).astype(jnp.float32)
    return jax.lax.psum(jnp.where(slot < 0, 0, value), "pipe").astype(buffer.dtype)
