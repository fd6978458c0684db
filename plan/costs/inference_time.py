"""Compute the latency of a request and the throughput of a machine: prefill and decoding under tensor and pipe.

Decoding reads every weight and the key-value cache once per token, so memory bandwidth limits it; after that the
launches of kernels, then the latency of small collectives (Pope et al. 2022, section 2). Read `memory_model.py` next.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ...layers import ModelConfig
from ...layers.attention.cache import CacheDtype
from ...layers.experts.kinds import layer_kinds
from ...layers.quantized import Weights
from ...meshes import PlanError
from ...meshes.arguments import check_choice, check_count, check_fields
from ..machines.collective_time import Group, collective_time_s, make_group
from ..machines.kernel_time import matmul_time_s, memory_time_s
from ..machines.topology import Topology
from .device_params import words_of_part
from .layout import Layout
from .operations import LayerSize, Product, Stream, item_bytes, layer_operations
from .product_format import FORMATS, FormatName
from .runtime import Runtime
from .serving.held import Held, kv_bytes_per_token


@dataclass(frozen=True, kw_only=True)
class Server:
    """Traits of an inference server.

    `kernels` is the number of kernels per layer, `gap_s` the seconds between two, `host_layer_s` the seconds in which a
    host launches those of a layer. `all_reduce` is NCCL's, or one kernel that reads its neighbours' memory.
    `held` says in how many bytes; weights of less than 2 bytes are expanded while they are read, which reaches
    `expand_share` of the bandwidth, unless `products` multiplies them as they are.

    Raises:
        PlanError: a number is below its least value, or `all_reduce` is unknown.
    """

    kernels: int = 7
    gap_s: float = 4e-6
    host_layer_s: float = 0.0
    all_reduce: Literal["nccl", "direct"] = "nccl"
    expand_share: float = 1.0
    products: FormatName = "plain"
    held: Held = field(default_factory=Held)

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError)


COMPILED = Server()
"""One compiled program per token, whose kernels follow each other without the host."""

FORMAT_BYTES: Mapping[str, float] = {"plain": 2.0, "int8": 1.0, "fp8": 1.0, "bfloat16": 2.0, "float32": 4.0}
"""Bytes of a number in each format of weights, or of the cache, of trellax's server."""

_SCALE_BYTES = 4.0
_CHUNK = 64

_KERNELS = 32
"""Kernels of a layer in trellax's server, as `trellax inspect --serve` counts them in Llama 3 8B compiled for H100."""


def trellax_server(*, weights: str = "plain", cache_dtype: str = "bfloat16") -> Server:
    """Return the traits of trellax's own server, with weights and cache in one of its formats.

    >>> trellax_server(weights="int8", cache_dtype="fp8").held.weight
    1.0

    Raises:
        PlanError: one of the formats is unknown.
    """
    check_choice("weights", weights, get_args(Weights), error=PlanError)
    check_choice("cache_dtype", cache_dtype, get_args(CacheDtype), error=PlanError)
    held = Held(
        stages="padded",
        weight=FORMAT_BYTES[weights],
        other=2.0,
        channel=0.0 if weights == "plain" else _SCALE_BYTES,
        cached=FORMAT_BYTES[cache_dtype],
        cached_head=_SCALE_BYTES if cache_dtype == "fp8" else 0.0,
        read_tokens=_CHUNK,
    )
    return replace(COMPILED, kernels=_KERNELS, held=held)


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
    size = LayerSize(sequences=batch, queries=1, keys=1, tensor=t, expert=layout.expert)
    busy = 0.0
    for operation in layer_operations(model, size=size, runtime=_RUNTIME):
        if isinstance(operation, Product) and operation.part == "weights":
            busy += _decode_product_s(operation, topology, model, server)
        elif isinstance(operation, Stream) and operation.part == "vector":
            busy += memory_time_s(device, num_bytes=operation.forward_bytes)
    # The core of attention, left out above, takes the time of reading the cache.
    cache = batch * context * kv_bytes_per_token(model, tensor=t, held=server.held)
    busy += memory_time_s(device, num_bytes=cache)
    busy += server.kernels * server.gap_s
    group = make_group(topology, size=t, stride=1)
    message = batch * model.hidden_size * item_bytes(model)
    # Two all-reduces a layer: after attention and after the feed-forward part.
    sent = 2 * _all_reduce_s(message, group, topology, server) + _share_tokens_s(model, message, layout, topology)
    return max(busy, server.host_layer_s) + sent


def _decode_product_s(operation: Product, topology: Topology, model: ModelConfig, server: Server) -> float:
    """Return the seconds of a product with weights, or of reading and expanding weights below 16 bit."""
    device = topology.accelerator.in_bursts
    narrow = FORMATS[server.products]
    if server.held.weight == 2.0 or narrow.is_narrow:
        dtype = narrow.dtype or model.dtype
        sizes = {"m": operation.m, "n": operation.n, "k": operation.k, "batch": operation.batch}
        return matmul_time_s(device, **sizes, dtype=dtype)
    stored = server.held.weight * operation.k * operation.n * operation.batch
    return memory_time_s(device, num_bytes=stored / server.expand_share)


def _all_reduce_s(num_bytes: float, group: Group, topology: Topology, server: Server) -> float:
    """Return the seconds of an all-reduce over tensor, by the faster of NCCL and a direct one if the server has it."""
    nccl = collective_time_s("all_reduce", num_bytes=num_bytes, group=group, topology=topology)
    nccl += 2 * server.gap_s if group.size > 1 else 0.0
    if server.all_reduce == "nccl" or group.size == 1 or group.num_nodes > 1:
        return nccl
    start = _DIRECT_START_S + _DIRECT_STEP_S * math.log2(group.size)
    return min(nccl, start + (group.size - 1) * num_bytes / topology.accelerator.link_bytes_per_s)


def _share_tokens_s(model: ModelConfig, message: float, layout: Layout, topology: Topology) -> float:
    """Return the seconds in which devices that share experts gather tokens, and add up what their own make of them."""
    if layout.expert == 1 or not model.num_experts:
        return 0.0
    group, whole = make_group(topology, size=layout.expert, stride=layout.tensor), message * layout.expert
    kinds: tuple[Any, Any] = "all_gather", "reduce_scatter"
    return sum(collective_time_s(kind, num_bytes=whole, group=group, topology=topology) for kind in kinds)


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
    size = LayerSize(sequences=batch, queries=num_tokens, keys=num_tokens, tensor=t, expert=layout.expert)
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
    sent = 2 * _all_reduce_s(message, group, topology, server) + _share_tokens_s(model, message, layout, topology)
    return max(busy, server.host_layer_s) + sent
