"""Copy residuals to the memory of the host and back, as the tables say: see `../lowering/offload.py`.

All ranks do both copies in every turn that may have one, outside of the conditionals around actions, where XLA lets
them run beside an action. A rank that has nothing to copy reads a slot that it does not use, and writes one that nobody
reads.

    turn    load --------> action (forward) -------> pack, land, store ------> next action or exchange
            host slot      beside the load           ring slots                beside the store

The load comes before the store to the same buffer, and what leaves the ring is packed before what arrived lands there.
The other way around, or in no order, XLA copies the whole buffer in every turn. XLA lets two copies run at a time, so
all residuals of a dtype travel in one array.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ...meshes.device_axes import hold
from ...meshes.host_memory import to_device, to_host
from ..lowering.tables import NONE, HostSlots
from .buffers import read, write
from .loop_state import LoopState

Packed = dict[str, list[jax.Array]]
"""Residuals of one microbatch in a stage, by kind, lists of [layers, numbers]."""


@dataclass(frozen=True)
class Packing:
    """Residuals of a layer joined into one array for each dtype, and for each set of axes over which they vary.

    kept: types of the residuals of a layer.
    """

    kept: list[jax.ShapeDtypeStruct]

    @property
    def types(self) -> list[jax.ShapeDtypeStruct]:
        """Types of the joined arrays of a layer, [numbers]."""
        found = []
        for group in self._groups:
            first, size = self.kept[group[0]], sum(math.prod(self.kept[place].shape) for place in group)
            found.append(jax.ShapeDtypeStruct((size,), first.dtype, manual_axis_type=first.manual_axis_type))
        return found

    def pack(self, residuals: list[jax.Array]) -> list[jax.Array]:
        """Return residuals [layers, ...] as joined arrays [layers, numbers]."""
        flat = [one.reshape(one.shape[0], -1) for one in residuals]
        return [jnp.concatenate([flat[place] for place in group], axis=1) for group in self._groups]

    def unpack(self, packed: list[jax.Array]) -> list[jax.Array]:
        """Return the residuals [layers, ...] of joined arrays."""
        found: dict[int, jax.Array] = {}
        for joined, group in zip(packed, self._groups, strict=True):
            start = 0
            for place in group:
                shape = self.kept[place].shape
                own = jax.lax.slice_in_dim(joined, start, start + math.prod(shape), axis=1)
                found[place] = own.reshape(joined.shape[0], *shape)
                start += math.prod(shape)
        return [found[place] for place in range(len(self.kept))]

    @property
    def _groups(self) -> list[list[int]]:
        groups: dict[Any, list[int]] = {}
        for place, one in enumerate(self.kept):
            differs: Any = one.manual_axis_type
            groups.setdefault((one.dtype, frozenset(differs.varying)), []).append(place)
        return list(groups.values())


def start_loading(state: LoopState, slots: HostSlots) -> tuple[LoopState, Packed]:
    """Return the state, and the residuals that leave the host before the action of a turn."""
    slot = jnp.maximum(slots.load, 0)
    arriving = jax.tree.map(lambda buffer: to_device(read(buffer, slot)), state.host)
    host, arriving = jax.lax.optimization_barrier((state.host, arriving))
    return replace(state, host=host), arriving


@jax.named_scope("offload")
def finish_copies(state: LoopState, arriving: Packed, slots: HostSlots, packings: dict[str, Packing]) -> LoopState:
    """Return the state after the action of a turn: with residuals that arrived, and others copied to the host."""
    residuals, host = dict(state.residuals), dict(state.host)
    for kind, packing in packings.items():
        # What the first half of a backward adds never leaves the device.
        count = len(packing.kept)
        kept, added = residuals[kind][:count], residuals[kind][count:]
        # They leave before others arrive in the same buffers, of which XLA would keep a copy.
        kept, leaving = hold(kept, until=packing.pack(read(kept, jnp.maximum(slots.send, 0))))
        # The last slot is for those that copy nothing.
        place = jnp.where(slots.store < 0, host[kind][0].shape[0] - 1, slots.store)
        host[kind] = write(host[kind], jax.tree.map(to_host, leaving), place)
        residuals[kind] = [*_receive(kept, arriving[kind], slots.receive, packing), *added]
    return replace(state, residuals=residuals, host=host)


def _receive(kept: list[jax.Array], arrived: list[jax.Array], slot: jax.Array, packing: Packing) -> list[jax.Array]:
    """Return the ring's arrays [slots, layers, ...] with residuals that arrived at a slot, if the table has one."""

    # A conditional, since a select between a slot and what arrives would make arrays as large as the slot.
    def run(kept: list[jax.Array]) -> list[jax.Array]:
        return write(kept, packing.unpack(arrived), slot)

    return jax.lax.cond(slot != NONE, run, lambda kept: kept, kept)


def without_host(state: LoopState) -> tuple[LoopState, Any]:
    """Return the state without its buffers on the host, and these: they may not pass through a conditional."""
    return replace(state, host={}), state.host
