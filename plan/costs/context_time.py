"""Compute the time that a layer waits for tokens of the other context ranks, in the forward and in the backward.

What encloses no product was read in programs that were compiled for H200 (8B, context=4 tensor=2, 65,536 tokens):

    gather        forward: one gather, exposed             backward: another, and a reduce-scatter, beside products
    gather-once   forward: the same                        backward: the reduce-scatter, beside products
    ulysses       forward: heads there and back, exposed   backward: both twice, once exposed, once beside products

With remat="none" no exchange is repeated. With remat="full" the forward that is repeated sends what the backward would
send again, and `layer_time.py` prices it there: counted in compiled programs, one gather or exchange more in all.

Read `layer_time.py` next, and `../../layers/context/choice.py` for the ways.
"""

from dataclasses import dataclass

from ...layers import ModelConfig
from ...layers.attention.counts import attention_widths
from ...layers.context.choice import exchanges_of_backward, kept_ranks
from ..machines.collective_time import collective_time_s, make_group
from ..machines.topology import Topology
from .layout import Layout
from .operations import LayerSize, item_bytes


@dataclass(frozen=True, kw_only=True)
class ContextTime:
    """Seconds that a layer waits for the other context ranks, by pass."""

    forward: float
    backward: float


def context_time(
    model: ModelConfig, *, size: LayerSize, layout: Layout, topology: Topology, beside: float
) -> ContextTime:
    """Return the exposed seconds of one microbatch.

    Args:
        beside: seconds of the products of the backward that hide what needs no waiting for.
    """
    if layout.context == 1:
        return ContextTime(forward=0.0, backward=0.0)
    group = make_group(topology, size=layout.context, stride=layout.tensor)
    own, widths = size.sequences * size.queries * item_bytes(model), attention_widths(model, tensor=layout.tensor)
    keys = widths.key + widths.value
    how = layout.way_to_attend(model)
    if how != "ulysses":
        # Keys and values of the whole sequences; the reduce-scatter of their gradients sends as much.
        sent = collective_time_s("all_gather", num_bytes=own * layout.context * keys, group=group, topology=topology)
        is_once = layout.remat == "full" or kept_ranks(how, context=layout.context, remat=layout.remat) > 1
        return ContextTime(forward=sent, backward=max(0.0, (1 if is_once else 2) * sent - beside))
    sent = sum(
        collective_time_s("all_to_all", num_bytes=own * width, group=group, topology=topology)
        for width in (widths.query + keys, widths.mixed)
    )
    times = 1 if layout.remat == "full" else exchanges_of_backward(layout.remat)
    return ContextTime(forward=sent, backward=sent + max(0.0, (times - 1) * sent - beside))
