"""Compute the latency of a request and the throughput of a machine: prefill and decoding under tensor and pipe.

Decoding reads every weight and the key-value cache once per token, so memory bandwidth limits it; after that the
launches of kernels, then the latency of small collectives (Pope et al. 2022, section 2). Read `memory_model.py` next.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ...layers import ModelConfig, param_counts
from ...layers.attention.counts import attention_widths
from ...layers.experts.kinds import kinds_within, layer_kinds
from ...meshes import PlanError
from ...meshes.arguments import check_count, check_fields
from ..machines.collective_time import Group, collective_time_s, make_group
from ..machines.kernel_time import matmul_time_s, memory_time_s
from ..machines.topology import Topology
from .device_params import block_params, words_of_part
from .layout import Layout
from .operations import LayerSize, Product, Stream, item_bytes, layer_operations
from .product_format import FORMATS, FormatName
from .runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Server:
    """Traits of an inference server.

    `kernels` is the number of kernels per layer, `gap_s` the seconds between two, `host_layer_s` the seconds in which a
    host launches those of a layer. `all_reduce` is NCCL's, or one kernel that reads its neighbours' memory.
    `weight_bytes` are those of one weight; weights of less than 2 bytes are expanded while they are read, which reaches
    `expand_share` of the bandwidth, unless `products` multiplies them as they are. A cached number has `cache_bytes`.

    Raises:
        PlanError: a number is below its least value, or `all_reduce` is unknown.
    """

    kernels: int = 7
    gap_s: float = 4e-6
    host_layer_s: float = 0.0
    all_reduce: Literal["nccl", "direct"] = "nccl"
    weight_bytes: float = 2.0
    expand_share: float = 1.0
    products: FormatName = "plain"
    cache_bytes: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError)


COMPILED = Server()
"""One compiled program per token, whose kernels follow each other without the host."""

EAGER = Server(kernels=12, host_layer_s=110e-6)
"""A host that launches every kernel (FasterTransformer), for which short layers wait."""

# 10 us and 2 us for each doubling of the ranks: fitted on gpt-fast's Llama-2-7B on 2, 4 and 8 A100.
_DIRECT_START_S = 10e-6
_DIRECT_STEP_S = 2e-6
_RUNTIME = Runtime(clock="async", vocab="ends", attention="scores", score_bytes=2)


@dataclass(frozen=True, kw_only=True)
class InferenceTime:
    """Seconds of a batch of requests: prefill of all prompts, one decoding step, and both in all.

    `tokens_per_s` counts generated tokens of the whole machine, for such batches in sequence with all stages busy.
    """

    prefill_s: float
    decode_s: float
    latency_s: float
    tokens_per_s: float


def inference_time(
    model: ModelConfig,
    *,
    layout: Layout,
    topology: Topology,
    batch: int,
    prompt: int,
    generated: int,
    server: Server = COMPILED,
) -> InferenceTime:
    """Return the time of `batch` requests that are decoded together, and the machine's throughput.

    Args:
        batch: requests of one of the `layout.data` copies of the model.
        prompt, generated: tokens of each request.

    Raises:
        PlanError: a count is below 1.
    """
    for name, count in {"batch": batch, "prompt": prompt, "generated": generated}.items():
        check_count(name, count, error=PlanError)
    sizes: dict[str, Any] = {"layout": layout, "topology": topology, "server": server}
    counts = _prompt_groups(layout, batch)
    prefill = min(_piped_prefill_s(model, batch=batch, num_tokens=prompt, groups=n, **sizes) for n in counts)
    # With requests always waiting, no stage is idle while the pipeline fills.
    busy = min(
        n * _prefill_s(model, batch=math.ceil(batch / n), num_tokens=prompt, **sizes) / layout.pipe for n in counts
    )
    # Groups of requests pass through the stages in turn; as many groups as stages keep every stage busy.
    groups = min(layout.pipe, batch)
    # Time is linear in the cache, which grows from the prompt to all tokens: its mean gives the mean step.
    context = prompt + generated / 2
    step = decode_time_s(model, batch=math.ceil(batch / groups), context=context, **sizes)
    latency = prefill + generated * step
    return InferenceTime(
        prefill_s=prefill,
        decode_s=step,
        latency_s=latency,
        tokens_per_s=layout.data * batch * generated / (busy + generated * step),
    )


def decode_time_s(
    model: ModelConfig, *, layout: Layout, topology: Topology, batch: int, context: float, server: Server
) -> float:
    """Return the seconds of one token for each of `batch` requests, through all stages.

    Args:
        context: tokens of a request that are in the cache, on average.
    """
    given: dict[str, Any] = {"layout": layout, "topology": topology, "batch": batch, "context": context}
    layers = sum(kind.num_layers * _decode_layer_s(kind.config, **given, server=server) for kind in layer_kinds(model))
    # Reading the head's table in 16 bit takes longer than its product with a few tokens.
    words = words_of_part(model, parts=layout.tensor)
    head = memory_time_s(topology.accelerator, num_bytes=2 * words * model.hidden_size)
    message = batch * model.hidden_size * item_bytes(model)
    return layers + head + _hops_s(message, layout=layout, topology=topology)


def _decode_layer_s(
    model: ModelConfig, *, layout: Layout, topology: Topology, batch: int, context: float, server: Server
) -> float:
    """Return the seconds of one layer of a kind for one token of each request."""
    device, t = topology.accelerator.in_bursts, layout.tensor
    size = LayerSize(sequences=batch, queries=1, keys=1, tensor=t)
    busy = 0.0
    for operation in layer_operations(model, size=size, runtime=_RUNTIME):
        if isinstance(operation, Product) and operation.part == "weights":
            busy += _decode_product_s(operation, topology, model, server)
        elif isinstance(operation, Stream) and operation.part == "vector":
            busy += memory_time_s(device, num_bytes=operation.forward_bytes)
    # The core of attention, left out above, takes the time of reading the cache.
    cache = batch * context * kv_bytes_per_token(model, tensor=t) * server.cache_bytes / 2
    busy += memory_time_s(device, num_bytes=cache)
    busy += server.kernels * server.gap_s
    group = make_group(topology, size=t, stride=1)
    message = batch * model.hidden_size * item_bytes(model)
    # Two all-reduces a layer: after attention and after the feed-forward part.
    return max(busy, server.host_layer_s) + 2 * _all_reduce_s(message, group, topology, server)


def kv_bytes_per_token(model: ModelConfig, *, tensor: int) -> float:
    """Return the bytes that one layer caches for a token on one device: its keys and values, or its latent vector."""
    own = attention_widths(model, tensor=tensor)
    width = model.latent_size + own.shared if model.latent_size else own.key + own.value
    return width * item_bytes(model)


def weight_bytes(model: ModelConfig, *, layout: Layout, server: Server = COMPILED) -> float:
    """Return the bytes of weights on the fullest device of an inference layout."""
    layers = math.ceil(model.num_layers / layout.pipe)
    # The last stage has the largest layers; room for dense ones, which others have, is on each.
    held = kinds_within(model, first=model.num_layers - layers, count=layers)
    if model.dense_layers:
        dense, *_ = layer_kinds(model)
        held[dense.config] = min(layers, dense.num_layers)
    counts = param_counts(model)
    ends = (counts.total - counts.blocks) / layout.tensor
    end = ends if layout.pipe == 1 else ends / 2
    blocks = sum(count * block_params(kind, tensor=layout.tensor) for kind, count in held.items())
    return server.weight_bytes * (blocks + end)


def _decode_product_s(operation: Product, topology: Topology, model: ModelConfig, server: Server) -> float:
    """Return the seconds of a product with weights, or of reading and expanding weights below 16 bit."""
    device = topology.accelerator.in_bursts
    narrow = FORMATS[server.products]
    if server.weight_bytes == 2.0 or narrow.is_narrow:
        dtype = narrow.dtype or model.dtype
        return matmul_time_s(device, m=operation.m, n=operation.n, k=operation.k, dtype=dtype)
    stored = server.weight_bytes * operation.k * operation.n
    return memory_time_s(device, num_bytes=stored / server.expand_share)


def _all_reduce_s(num_bytes: float, group: Group, topology: Topology, server: Server) -> float:
    """Return the seconds of an all-reduce over tensor, by the faster of NCCL and a direct one if the server has it."""
    nccl = collective_time_s("all_reduce", num_bytes=num_bytes, group=group, topology=topology)
    nccl += 2 * server.gap_s if group.size > 1 else 0.0
    if server.all_reduce == "nccl" or group.size == 1 or group.num_nodes > 1:
        return nccl
    start = _DIRECT_START_S + _DIRECT_STEP_S * math.log2(group.size)
    return min(nccl, start + (group.size - 1) * num_bytes / topology.accelerator.link_bytes_per_s)


def _hops_s(message: float, *, layout: Layout, topology: Topology) -> float:
    """Return the seconds of sending an activation through all stages."""
    group = make_group(topology, size=layout.pipe, stride=layout.tensor)
    return (layout.pipe - 1) * collective_time_s("send", num_bytes=message, group=group, topology=topology)


def _prompt_groups(layout: Layout, batch: int) -> set[int]:
    """Return the numbers of groups to divide prompts into: 1, or multiples of the stages that keep them busy."""
    return {1} | {min(batch, times * layout.pipe) for times in (1, 2, 4, 8)}


def _piped_prefill_s(
    model: ModelConfig, *, layout: Layout, topology: Topology, batch: int, num_tokens: int, server: Server, groups: int
) -> float:
    """Return the seconds until the last of several groups of prompts has left the last stage."""
    size = math.ceil(batch / groups)
    one = _prefill_s(model, layout=layout, topology=topology, batch=size, num_tokens=num_tokens, server=server)
    # A stage takes one / pipe for a group, and the last group leaves after pipe + groups - 1 such turns.
    return one * (layout.pipe + groups - 1) / layout.pipe


def _prefill_s(
    model: ModelConfig, *, layout: Layout, topology: Topology, batch: int, num_tokens: int, server: Server
) -> float:
    """Return the seconds of all prompts through all stages, without dividing them into groups."""
    given: dict[str, Any] = {"layout": layout, "topology": topology, "batch": batch, "num_tokens": num_tokens}
    layers = sum(kind.num_layers * _prefill_layer_s(kind.config, **given, server=server) for kind in layer_kinds(model))
    words = words_of_part(model, parts=layout.tensor)
    head = memory_time_s(topology.accelerator, num_bytes=2 * words * model.hidden_size)
    message = batch * num_tokens * model.hidden_size * item_bytes(model)
    return layers + head + _hops_s(message, layout=layout, topology=topology)


def _prefill_layer_s(
    model: ModelConfig, *, layout: Layout, topology: Topology, batch: int, num_tokens: int, server: Server
) -> float:
    """Return the seconds of one layer of a kind for all prompts."""
    device, t = topology.accelerator.in_bursts, layout.tensor
    size = LayerSize(sequences=batch, queries=num_tokens, keys=num_tokens, tensor=t)
    busy = server.kernels * server.gap_s
    for operation in layer_operations(model, size=size, runtime=_RUNTIME):
        if isinstance(operation, Product):
            dtype = FORMATS[server.products].dtype if operation.part == "weights" else ""
            sizes = {"m": operation.m, "n": operation.n, "k": operation.k, "batch": operation.batch}
            busy += matmul_time_s(device, **sizes, dtype=dtype or model.dtype)
        elif isinstance(operation, Stream):
            busy += memory_time_s(device, num_bytes=operation.forward_bytes)
    group = make_group(topology, size=t, stride=1)
    message = batch * num_tokens * model.hidden_size * item_bytes(model)
    return max(busy, server.host_layer_s) + 2 * _all_reduce_s(message, group, topology, server)
