"""Copy residuals to the memory of the host and back, as the tables say: see `../lowering/offload.py`.

All ranks do both copies in every turn that may have one, outside of the conditionals around actions, where XLA lets them
run beside an action. A rank that has nothing to copy reads a slot that it does not use, and writes one that nobody reads.

The load comes first, and then the store to the same buffer. The other way around, or in no order, XLA copies the whole
buffer in every turn.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ...meshes.host_memory import to_device, to_host
from ..lowering.tables import HostSlots
from .buffers import read, write
from .loop_state import LoopState, put

Arriving = dict[str, list[jax.Array]]
"""Residuals on their way to the device, by kind, lists of [layers, ...]."""


def start_loading(state: LoopState, slots: HostSlots) -> tuple[LoopState, Arriving]:
    """Return the state, and the residuals that leave the host before the action of a turn."""
    slot = jnp.maximum(slots.load, 0)
    arriving = {kind: [_take(buffer, slot) for buffer in own] for kind, own in state.host.items()}
    host, arriving = jax.lax.optimization_barrier((state.host, arriving))
    return replace(state, host=host), arriving


@jax.named_scope("offload")
def finish_copies(state: LoopState, arriving: Arriving, slots: HostSlots) -> LoopState:
    """Return the state after the action of a turn: with residuals that arrived, and others copied to the host."""
    residuals, host = dict(state.residuals), dict(state.host)
    for kind, own in state.host.items():
        # What the first half of a backward adds never leaves the device.
        kept, added = residuals[kind][: len(own)], residuals[kind][len(own) :]
        leaving = [to_host(one) for one in read(kept, jnp.maximum(slots.send, 0))]
        # The last slot is for those that copy nothing.
        place = jnp.where(slots.store < 0, own[0].shape[0] - 1, slots.store)
        host[kind] = write(own, leaving, place)
        residuals[kind] = [*put(kept, arriving[kind], slots.receive), *added]
    return replace(state, residuals=residuals, host=host)


def without_host(state: LoopState) -> tuple[LoopState, Any]:
    """Return the state without its buffers on the host, and these: they may not pass through a conditional."""
    return replace(state, host={}), state.host


def _take(buffer: jax.Array, slot: jax.Array) -> jax.Array:
    """Return one slot of a buffer on the host, on the device."""
    return to_device(read(buffer, slot))
