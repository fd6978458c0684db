"""The state that the executor's loop carries from turn to turn: buffers and sums of one rank."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ...layers.collectives import gather_slices, split_dim
from .buffers import read, vary, write

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


def broadcast_slot(buffer: jax.Array, slot: jax.Array, *, pipe: str) -> jax.Array:
    """Return to every rank the value of a buffer [slots, ...] on the one rank whose slot is not NONE.

    Costs one all-reduce over `pipe`, in the dtype of the buffer. Devices that have the same value, the tensor ranks,
    send a slice each over the pipe and all-gather the slices among themselves.
    """
    value = read(buffer, jnp.maximum(slot, 0))
    value = jnp.where(slot < 0, jnp.zeros_like(value), value)
    mesh, varying = jax.sharding.get_abstract_mesh(), jax.typeof(value).mat.varying
    copies = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in varying)
    dim = split_dim(value.shape, copies) if copies else None
    if dim is None:
        return jax.lax.psum(value, pipe)
    size = value.shape[dim] // jax.lax.axis_size(copies)
    part = jax.lax.dynamic_slice_in_dim(vary(value, copies), jax.lax.axis_index(copies) * size, size, axis=dim)
    return gather_slices(jax.lax.psum(part, pipe), copies, dim=dim)
