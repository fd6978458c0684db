"""The state that the executor's loop carries from turn to turn: buffers and sums of one rank."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ...layers.collectives import gather_slices, split_dim
from ...layers.in_order import Mark
from ...meshes.device_axes import mark_varying
from ..model.protocol import Output
from .buffers import add, read, write_if


@dataclass(frozen=True, kw_only=True)
class Place:
    """Position of a layer on its rank, in arrays [C, k, ...] of its kind."""

    kind: str
    chunk: jax.Array | int
    index: jax.Array | int

    @property
    def where(self) -> tuple[jax.Array | int, ...]:
        """Position in the leading dimensions."""
        return self.chunk, self.index


Wants = Literal["loss", "grads"]
"""Result of a program: the loss by forwards alone, or the loss and its gradients."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the layers and microbatches done so far.

    loss: float32 [].
    metrics: named float32 arrays.
    stats: of each layer, by kind, leaves [C, k, ...].
    """

    loss: jax.Array
    metrics: dict[str, jax.Array] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    def add(self, out: Output, place: "Place | None" = None) -> "Sums":
        """Return the sums with the result of one function added, the stats of a layer at its place."""
        # Names are those of all functions; this one may have returned a few of them.
        metrics = {name: total + out.metrics.get(name, 0) for name, total in self.metrics.items()}
        loss = self.loss if out.loss is None else self.loss + out.loss
        stats = self.stats
        if place is not None:
            stats = stats | {place.kind: add(stats[place.kind], out.stats, place.where)}
        return Sums(loss=loss, metrics=metrics, stats=stats)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Buffers and sums of one rank. A program that wants the loss alone has only `sums` and `activations`.

    sums: the loss, and what functions return besides.
    activations: outputs of stages that wait to be sent or read, a tree of [slots, b, ...].
    gradients: gradients of stage inputs and outputs that wait to be sent or read, [slots, b, ...], a list of those of
        the floating-point leaves.
    residuals: what layers keep for their backward, by kind, lists of [slots, layers, ...].
    host: residuals in the memory of the host, as on the device, with their own slots; none if all stay there.
    weights: whole parameters of chunks that were gathered, by kind, leaves [slots, k, ...]; none where the table
        gathers none.
    grads: sums of the gradients of parameters and batch.
    mark: of the conditionals so far, see `layers/in_order.py`.
    """

    sums: Sums
    activations: Any
    gradients: Any = None
    residuals: dict[str, list[jax.Array]] = field(default_factory=dict)
    host: dict[str, list[jax.Array]] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    grads: "Grads | None" = None
    mark: Mark = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Grads:
    """Sums of gradients in float32; None for whole numbers, frozen parameters, and what is not differentiated.

    stages: by kind, leaves [C, k, ...] as params.stages.
    shared: as params.shared.
    batch: leaves [M, b, ...] as the batch; each microbatch has a place of its own.
    """

    stages: Any
    shared: Any
    batch: Any = None

    def add_shared(self, grads: tuple[Any, Any], microbatch: jax.Array | int) -> "Grads":
        """Return the sums with gradients of (shared, one microbatch) added."""
        d_shared, d_batch = grads
        return replace(self, shared=add(self.shared, d_shared), batch=add(self.batch, d_batch, (microbatch,)))

    def add_layer(self, grads: tuple[Any, Any], place: Place, microbatch: jax.Array | int) -> "Grads":
        """Return the sums with gradients of (one layer's parameters, one microbatch) added."""
        d_params, d_batch = grads
        own = {place.kind: add(self.stages[place.kind], d_params, place.where)}
        return replace(self, stages=self.stages | own, batch=add(self.batch, d_batch, (microbatch,)))


def put(buffers: Any, values: Any, slot: jax.Array) -> Any:
    """Return the buffers [slots, ...] with values at a slot, or unchanged where the slot is NONE."""
    # What is there is written again where the slot is NONE: cheaper than a conditional, and nothing has to wait for it.
    return write_if(slot >= 0, buffers, values, jnp.maximum(slot, 0))


def broadcast_slot(buffers: Any, slot: jax.Array, *, pipe: str) -> Any:
    """Return to every rank the values of buffers [slots, ...] on the one rank whose slot is not NONE.

    Costs one all-reduce over `pipe`, in the dtype of the buffer. Devices that have the same value, the tensor ranks,
    send a slice each over the pipe and all-gather the slices among themselves.
    """
    values = read(buffers, jnp.maximum(slot, 0))
    return jax.tree.map(lambda x: _share(jnp.where(slot < 0, jnp.zeros_like(x), x), pipe), values)


def _share(value: jax.Array, pipe: str) -> jax.Array:
    """Return the sum over pipe of a value that is zero on all ranks but one."""
    mesh, varying = jax.sharding.get_abstract_mesh(), jax.typeof(value).mat.varying
    # Its type tells who has copies of it: the devices along axes over which it does not vary.
    copies = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in varying)
    dim = split_dim(value.shape, copies) if copies else None
    if dim is None:
        return jax.lax.psum(value, pipe)
    # 4 tensor ranks: each sums a quarter over pipe, and the quarters are put together where links are fast.
    size = value.shape[dim] // jax.lax.axis_size(copies)
    part = jax.lax.dynamic_slice_in_dim(mark_varying(value, copies), jax.lax.axis_index(copies) * size, size, axis=dim)
    return gather_slices(jax.lax.psum(part, pipe), copies, dim=dim)
