"""Count the residuals that wait in the memory of the host with `train.offload="residuals"`, and price their copies.

The slots are those of the lowered tables (`../../pipeline/lowering/offload.py`), of a schedule of a few microbatches: a
longer one has no more of them at a time. Read `memory_model.py` for the use.
"""

from dataclasses import dataclass
from functools import lru_cache

from ...pipeline.lowering.lower import lower
from ..machines.topology import Topology
from .layout import Layout
from .pipeline_time import SearchTerms, plan_schedule
from .runtime import OrderTraits

_IN_TRANSIT = 2
"""Slots on the device of copies that are under way, one each way."""

_UNUSED = 1
"""Slots on the host for ranks that copy nothing."""


@dataclass(frozen=True)
class WaitingSlots:
    """Microbatches of a chunk whose residuals a rank holds at once: on the device, and on the host."""

    on_device: int
    on_host: int


@lru_cache(maxsize=256)
def count_waiting(layout: Layout, *, traits: OrderTraits, terms: SearchTerms | None) -> WaitingSlots:
    """Return the slots of a layout with offloaded residuals."""
    few = min(layout.microbatches, (2 * layout.chunks + 1) * layout.pipe)
    sizes = {"num_ranks": layout.pipe, "num_microbatches": few, "num_chunks": layout.chunks}
    schedule = plan_schedule(layout.schedule, **sizes, traits=traits, terms=terms)
    ends = "together" if traits.vocab == "split" else "alone"
    tables = lower(schedule, ends=ends, overlap=traits.pair_overlap == "on", offload="residuals")
    return WaitingSlots(on_device=tables.num_residual_slots + _IN_TRANSIT, on_host=tables.num_host_slots + _UNUSED)


def residual_copies_s(layout: Layout, *, topology: Topology, kept: float, backward: float) -> float:
    """Return the seconds of a step in which copies of residuals hold up the layers.

    XLA ends the loads before a forward, and does the stores beside the backward (read in programs for H200).

    Args:
        kept, backward: bytes of residuals of a chunk, and seconds of its backward.
    """
    copy_s = kept / topology.accelerator.host_bytes_per_s
    return layout.microbatches * layout.chunks * (copy_s + max(0.0, copy_s - backward))
