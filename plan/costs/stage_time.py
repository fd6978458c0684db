"""Compute the time of every stage for one microbatch: its layers, embedding and head, and blocking hops.

A hop is one send of an activation or gradient between neighbouring stages. Read `step_time.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ...layers import ModelConfig
from ...layers.lora.linears import has_adapted_head
from ...pipeline import balance_layers, resolve_layers
from ...pipeline.model.balance import balance_times, layer_times
from ...schedules import Placement, StageCost
from ..machines.collective_time import collective_time_s, make_group
from ..machines.kernel_time import matmul_time_s, memory_time_s
from ..machines.topology import Topology
from .device_params import device_words
from .layer_time import LayerTime
from .layout import Layout
from .operations import item_bytes
from .runtime import Runtime

_FLOAT32 = 4
# Float32 logits: written, read for their maximum, the sum of exponentials and the target's; the gradient is written.
_LOSS_FORWARD_BYTES = 20
_LOSS_BACKWARD_BYTES = 10


@dataclass(frozen=True, kw_only=True)
class EndCosts:
    """Seconds of embedding, head and one hop for a microbatch; `shared_loss` is a head that all ranks run together."""

    embedding: StageCost
    head: StageCost
    shared_loss: float
    hop: float


@lru_cache(maxsize=1024)
def split_layers(num_layers: int, *, num_stages: int) -> tuple[int, ...]:
    """Return the layers of every stage: equal, or one fewer at both ends, or else as even as possible.

    One fewer at the ends makes room for embedding and head, as in BLOOM (70 layers on 12 stages) and Zero Bubble (22
    on 8).
    """
    if num_layers % num_stages and num_stages > 2 and (num_layers + 2) % num_stages == 0:
        size = (num_layers + 2) // num_stages
        return (size - 1, *[size] * (num_stages - 2), size - 1)
    return balance_layers(num_layers, num_stages=num_stages)


def stage_layers(model: ModelConfig, layout: Layout, *, runtime: Runtime) -> tuple[int, ...]:
    """Return the layers of every stage of a layout: those it states, or those of `split_layers`.

    Dense layers before others take another time, and stages are balanced by it. Where the ends of a pipeline have the
    embedding and the head, trellax balances by their time too.
    """
    if layout.layers_per_stage:
        return layout.layers_per_stage
    if runtime.residuals == "trellax" and runtime.vocab == "ends" and layout.pipe > 1:
        return _balance_ends(model, num_ranks=layout.pipe, num_chunks=layout.chunks)
    if not model.dense_layers:
        return split_layers(model.num_layers, num_stages=layout.num_stages)
    return _balance_kinds(model, num_stages=layout.num_stages)


@lru_cache(maxsize=1024)
def _balance_ends(model: ModelConfig, *, num_ranks: int, num_chunks: int) -> tuple[int, ...]:
    sizes = {"num_ranks": num_ranks, "num_chunks": num_chunks}
    return resolve_layers(model, **sizes, num_tokens=model.max_tokens, vocab="ends")


@lru_cache(maxsize=1024)
def _balance_kinds(model: ModelConfig, *, num_stages: int) -> tuple[int, ...]:
    return balance_times(layer_times(model, num_tokens=model.max_tokens), num_stages=num_stages)


def end_costs(model: ModelConfig, *, layout: Layout, runtime: Runtime, topology: Topology, num_tokens: int) -> EndCosts:
    """Return the cost of embedding and head for a microbatch, by the placement of the vocabulary, and of a hop."""
    tokens = layout.sequences * num_tokens / layout.context
    head = _head(model, tokens=tokens, layout=layout, runtime=runtime, topology=topology)
    hop = _hop_s(model, tokens=tokens, layout=layout, runtime=runtime, topology=topology)
    embedding = _embedding(model, tokens=tokens, layout=layout, topology=topology)
    if runtime.adapter_rank:
        # Frozen tables have no gradient, but that of a head from which its adapter's follow.
        embedding = replace(embedding, weight_grad=0.0)
        head = head if has_adapted_head(model) else replace(head, weight_grad=0.0)
    if runtime.vocab == "ends" or layout.pipe == 1:
        return EndCosts(embedding=embedding, head=head, shared_loss=0.0, hop=hop)
    over_pipe = make_group(topology, size=layout.pipe, stride=_pipe_stride(layout))
    over_tensor = make_group(topology, size=layout.tensor, stride=1)
    num_bytes = item_bytes(model) * tokens * model.hidden_size
    # x and dy are summed over pipe, y and dx broadcast, each as an all-reduce of a slice for every tensor rank. The
    # sums over tensor are the embedding's and the head's own; of y and dx the slices are gathered besides.
    part = num_bytes / layout.tensor
    summed = collective_time_s("all_reduce", num_bytes=part, group=over_pipe, topology=topology)
    gathered = collective_time_s("all_gather", num_bytes=num_bytes, group=over_tensor, topology=topology)
    shared = head.total + 4 * summed + 2 * gathered
    none = StageCost(forward=0.0, input_grad=0.0, weight_grad=0.0)
    return EndCosts(embedding=embedding, head=none, shared_loss=shared, hop=hop)


def stage_times(
    layers: Sequence[LayerTime], *, ends: EndCosts, runtime: Runtime, placement: Placement
) -> tuple[StageCost, ...]:
    """Return the seconds of every stage for one microbatch; recomputation counts as input gradient.

    Args:
        layers: the time of all layers of each stage, first to last.
    """
    last = len(layers) - 1
    # A blocking hop is work of the stage: activations to the next stage, gradients to the one before, on other ranks.
    hop, ranks = ends.hop if runtime.blocking_hops == "on" else 0.0, placement.ranks
    stages = []
    for place, own in enumerate(layers):
        extras = [part for part, at in ((ends.embedding, 0), (ends.head, last)) if place == at]
        stages.append(
            StageCost(
                forward=own.forward
                + sum(part.forward for part in extras)
                + hop * (place < last and ranks[place] != ranks[place + 1]),
                input_grad=own.recompute
                + own.input_grad
                + sum(part.input_grad for part in extras)
                + hop * (place > 0 and ranks[place] != ranks[place - 1]),
                weight_grad=own.weight_grad + sum(part.weight_grad for part in extras),
            )
        )
    return tuple(stages)


def _embedding(model: ModelConfig, *, tokens: float, layout: Layout, topology: Topology) -> StageCost:
    """Return the seconds of the embedding: rows read and summed over tensor, and their gradient added in float32."""
    item, numbers = item_bytes(model), tokens * model.hidden_size
    group = make_group(topology, size=layout.tensor, stride=1)
    summed = collective_time_s("all_reduce", num_bytes=item * numbers, group=group, topology=topology)
    device = topology.accelerator
    return StageCost(
        forward=memory_time_s(device, num_bytes=3 * item * numbers) + summed,
        input_grad=0.0,
        weight_grad=memory_time_s(device, num_bytes=(item + 2 * _FLOAT32) * numbers),
    )


def _head(model: ModelConfig, *, tokens: float, layout: Layout, runtime: Runtime, topology: Topology) -> StageCost:
    """Return the seconds of the head's products and of the loss, for this device's columns of the vocabulary."""
    columns = device_words(model, layout=layout, runtime=runtime)
    device, d = topology.accelerator, model.hidden_size
    forward, input_grad, weight_grad = (
        matmul_time_s(device, m=m, n=n, k=k, dtype=model.dtype)
        for m, n, k in ((tokens, columns, d), (tokens, d, columns), (d, columns, tokens))
    )
    group = make_group(topology, size=layout.tensor, stride=1)
    summed = collective_time_s("all_reduce", num_bytes=item_bytes(model) * tokens * d, group=group, topology=topology)
    logits = tokens * columns
    return StageCost(
        forward=forward + memory_time_s(device, num_bytes=_LOSS_FORWARD_BYTES * logits),
        input_grad=input_grad + summed + memory_time_s(device, num_bytes=_LOSS_BACKWARD_BYTES * logits),
        weight_grad=weight_grad,
    )


def _hop_s(model: ModelConfig, *, tokens: float, layout: Layout, runtime: Runtime, topology: Topology) -> float:
    """Return the seconds of sending one activation to the next stage."""
    if layout.pipe == 1:
        return 0.0
    num_bytes = item_bytes(model) * tokens * model.hidden_size
    group = make_group(topology, size=layout.pipe, stride=_pipe_stride(layout))
    if runtime.sequence_parallel == "on" or runtime.scatter_hops == "on":
        sent = collective_time_s("send", num_bytes=num_bytes / layout.tensor, group=group, topology=topology)
        # With sequence parallelism the next stage works on its part; otherwise it first gathers the whole.
        if runtime.sequence_parallel == "on":
            return sent
        own = make_group(topology, size=layout.tensor, stride=1)
        return sent + collective_time_s("all_gather", num_bytes=num_bytes, group=own, topology=topology)
    return collective_time_s("send", num_bytes=num_bytes, group=group, topology=topology)


def _pipe_stride(layout: Layout) -> int:
    """Return the distance between the device numbers of neighbouring stages."""
    return layout.tensor * layout.context * layout.replicas
