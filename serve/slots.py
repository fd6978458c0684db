"""What the host tells the devices about each slot with every call: settings and pages, one row a slot.

They are data, so a request that takes a slot compiles nothing. Read `decode.py` next.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..meshes import DEFAULT_RULES, ShardingRules
from .requests import ServedSequence
from .sampling import SamplingSettings
from .state import Sizes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotInputs:
    """What the host tells the devices about each slot with every call: its settings, and its pages [B@data, pages].

    Pages are numbered from 0 on each data shard; entries that are not in use are any page.
    """

    settings: SamplingSettings
    pages: Any


def input_shapes(sizes: Sizes, *, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> SlotInputs:
    """Return shapes and shardings of the inputs of all slots, which are the same on all ranks."""

    def leaf(dtype: Any, *inner: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.slots, *inner), dtype, sharding=NamedSharding(mesh, rules.spec(("batch",))))

    settings = SamplingSettings(
        temperature=leaf(jnp.float32),
        top_k=leaf(jnp.int32),
        top_p=leaf(jnp.float32),
        seed=leaf(jnp.uint32),
        limit=leaf(jnp.int32),
        stops=leaf(jnp.int32, sizes.stops),
    )
    return SlotInputs(settings=settings, pages=leaf(jnp.int32, sizes.pages_per_row))


def empty_inputs(sizes: Sizes) -> SlotInputs:
    """Return inputs of unused slots, on the host: a request overwrites its row, and each call sends them all."""
    slots = sizes.slots
    settings = SamplingSettings(
        temperature=np.zeros(slots, np.float32),
        top_k=np.zeros(slots, np.int32),
        top_p=np.ones(slots, np.float32),
        seed=np.zeros(slots, np.uint32),
        limit=np.zeros(slots, np.int32),
        stops=np.full((slots, sizes.stops), -1, np.int32),
    )
    return SlotInputs(settings=settings, pages=np.zeros((slots, sizes.pages_per_row), np.int32))


def write_inputs(slots: SlotInputs, sequence: ServedSequence, *, vocab_size: int) -> None:
    """Write the pages and the settings of an admitted request into the row of its slot, on the host."""
    request, slot, settings = sequence.request, sequence.slot, slots.settings
    slots.pages[slot, : len(sequence.pages)] = sequence.pages
    settings.temperature[slot] = request.temperature
    settings.top_k[slot] = min(request.top_k, vocab_size)
    settings.top_p[slot] = request.top_p
    settings.seed[slot] = request.seed
    settings.limit[slot] = len(request.prompt) + request.max_new_tokens
    settings.stops[slot] = -1
    settings.stops[slot, : len(request.stop)] = request.stop
