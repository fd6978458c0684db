"""Enumerate the meshes and layouts that a model can run on. Read `training_search.py` for how they are compared."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from ..layers import ModelConfig
from ..layers.context.choice import ContextAttention
from ..layers.own.counts import split_features
from ..meshes import Axis, MeshSpec
from ..meshes.spec import Offload
from .costs.layout import Layout, PlanRemat, ZeroStage
from .machines.topology import Topology

_LEAST_TOKENS = 1024
"""Tokens of a sequence that a context rank has at least, in layouts that are searched for."""

_MOST_RANKS_OF_A_V = 32
"""Ranks up to which V-shaped schedules are searched: they take seconds to build beyond."""


def legal_meshes(model: ModelConfig, *, num_devices: int, context: int = 1) -> Iterator[MeshSpec]:
    """Yield every mesh of `num_devices` devices over which the model's heads, features and layers split.

    A vocabulary need not divide: it is padded.

    Args:
        context: devices that share each sequence, the same in all meshes.
    """
    if num_devices % context:
        return
    more = {"context": Axis(context, role="context")} if context > 1 else {}
    num_devices //= context
    for tensor in _divisors(num_devices):
        if model.num_heads % tensor or _features(model) % tensor or not _splits_kv(model, tensor):
            continue
        for pipe in _divisors(num_devices // tensor):
            if pipe <= model.num_layers:
                yield MeshSpec(data=num_devices // (tensor * pipe), tensor=tensor, pipe=pipe, axes=more)


def legal_contexts(*, num_devices: int, num_tokens: int) -> tuple[int, ...]:
    """Return the numbers of devices that may share a sequence: powers of two that leave each of them enough of it.

    A sequence is cut into two chunks a device. With fewer than 1,024 tokens on a device, products are too short to hide
    anything, and another axis has the same memory; a config with such a context keeps it.
    """
    found = [1]
    while num_devices % (2 * found[-1]) == 0 and num_tokens % (4 * found[-1]) == 0:
        if num_tokens // (2 * found[-1]) < _LEAST_TOKENS:
            break
        found.append(2 * found[-1])
    return tuple(found)


def expert_splits(model: ModelConfig, *, data: int, context: int) -> list[dict[str, Any]]:
    """Return the fields of layouts whose experts are split over ranks of data x context; of a dense model over none.

    Context ranks are taken first, which are nearer to each other than data shards.

    >>> [one["expert"] for one in expert_splits(model, data=2, context=4)]
    [1, 2, 4, 8]
    """
    sizes = _divisors(data * context) if model.num_experts else [1]
    splits = [(parts, math.gcd(parts, context)) for parts in sizes if model.num_experts % parts == 0]
    return [{"expert": parts, "context_expert": near} for parts, near in splits if data % (parts // near) == 0]


def device_counts(topology: Topology, *, counts: Literal["few", "powers"] = "few") -> tuple[int, ...]:
    """Return the numbers of devices on which a search tries meshes, in ascending order.

    They are all devices, the largest power of two of them (which divides more batches), one node, and one device; with
    "powers" every power of two besides.
    """
    powers = [1 << place for place in range(topology.num_devices.bit_length())]
    tried = powers if counts == "powers" else powers[-1:]
    # A part of a machine is part of a node, or whole nodes.
    node = topology.devices_per_node
    legal = [count for count in tried if count <= node or count % node == 0 or count == powers[-1]]
    return tuple(sorted({topology.num_devices, *legal, node, 1}))


def legal_layouts(
    model: ModelConfig,
    *,
    num_devices: int,
    batch_size: int,
    remats: tuple[PlanRemat, ...] = ("none", "dots", "full"),
    contexts: tuple[int, ...] = (1,),
    offload: Offload = "none",
) -> Iterator[Layout]:
    """Yield the layouts of a training step on `num_devices` devices that the search prices.

    Microbatches hold a power of two of sequences, or all sequences of a shard. Schedules are 1F1B and ZB-H1, with one
    chunk per rank or interleaved with 2 or 4, and up to 32 ranks the V-shaped ones with 2. Weights that are gathered
    more than once a step are so by every layer: by chunks would be a third more to price, for layouts between these.

    Args:
        contexts: sizes of the context axis to try, of which those that divide the devices are taken.
    """
    for mesh in _meshes_of_contexts(model, num_devices=num_devices, contexts=contexts):
        # Roles are looked up once for thousands of layouts.
        sizes = {"data": mesh.data, "tensor": mesh.tensor, "pipe": mesh.pipe, "context": mesh.context}
        if batch_size % sizes["data"] == 0:
            for layout in _layouts_of_mesh(model, sizes, shard=batch_size // sizes["data"], remats=remats):
                yield layout if offload == "none" else replace(layout, offload=offload)


def _layouts_of_mesh(
    model: ModelConfig, sizes: Mapping[str, int], *, shard: int, remats: tuple[PlanRemat, ...]
) -> Iterator[Layout]:
    """Yield the layouts of one mesh whose data shards have `shard` sequences each."""
    over: Any = sizes
    # Not 1: weights gathered once a step take less memory, and send no more.
    splits: list[Any] = [
        {"zero": zero, **experts}
        for zero, experts in _splits_of_weights(model, data=sizes["data"], context=sizes["context"])
    ]
    ways = _ways_to_attend(model, tensor=sizes["tensor"], context=sizes["context"])
    for sequences in _divisors(shard):
        if sequences & (sequences - 1) and sequences != shard:
            continue
        count = shard // sequences
        for schedule, chunks in _schedules(model, pipe=sizes["pipe"], microbatches=count):
            own: Any = {"schedule": schedule, "chunks": chunks, "microbatches": count, "sequences": sequences}
            for remat in remats:
                for split, how in itertools.product(splits, ways):
                    # What the backward computes again it gathers again.
                    if how != "gather-once" or remat != "full":
                        yield Layout(**over, **own, remat=remat, context_attention=how, **split)


def _meshes_of_contexts(model: ModelConfig, *, num_devices: int, contexts: tuple[int, ...]) -> Iterator[MeshSpec]:
    for context in contexts:
        yield from legal_meshes(model, num_devices=num_devices, context=context)


def _splits_of_weights(model: ModelConfig, *, data: int, context: int) -> Iterator[tuple[ZeroStage, dict[str, Any]]]:
    """Yield how much is split over data and context, and how the experts are."""
    for experts in expert_splits(model, data=data, context=context):
        yield 0, experts
        if data * context > experts["expert"]:
            yield 2, experts
            yield 3, experts


def _ways_to_attend(model: ModelConfig, *, tensor: int, context: int) -> list[ContextAttention]:
    """Return how context ranks may attend to each other's tokens; heads must divide to be exchanged."""
    if context == 1:
        return ["auto"]
    heads, kv_heads = model.num_heads // tensor, max(1, model.num_kv_heads // tensor)
    gathers: list[ContextAttention] = ["gather", "gather-once"]
    return [*gathers, "ulysses"] if heads % context == kv_heads % context == 0 else gathers


def _features(model: ModelConfig) -> int:
    """Return the features of a feed-forward that tensor splits; of experts those of one, and those that all use.

    Of a class of the user's it is the common divisor of all sizes that tensor splits.
    """
    if model.block or model.mlp_class:
        return split_features(model)
    if not model.num_experts:
        return model.ffn_size
    return math.gcd(model.expert_size, model.shared_size, model.ffn_size if model.dense_layers else 0)


def _schedules(model: ModelConfig, *, pipe: int, microbatches: int) -> Iterator[tuple[str, int]]:
    """Yield the names of schedules to price, each with its number of chunks per rank."""
    yield "1f1b", 1
    if pipe == 1:
        return
    yield "zb-h1", 1
    for chunks in (2, 4):
        if pipe * chunks > model.num_layers:
            continue
        # A last group of fewer microbatches than ranks leaves idle ticks in every chunk.
        if microbatches % pipe == 0:
            yield "interleaved-1f1b", chunks
        # A split backward only saves bubble, and with many microbatches there is little bubble to save.
        if 1 < microbatches <= 2 * pipe:
            yield "interleaved-zb-h1", chunks
    # Not dualpipev: here it takes as long as zb-v, and holds one microbatch of a chunk more.
    if microbatches > 1 and 2 * pipe <= model.num_layers and pipe <= _MOST_RANKS_OF_A_V:
        for name in ("zb-v", "v-half", "v-min"):
            yield name, 2


def _splits_kv(model: ModelConfig, tensor: int) -> bool:
    return model.num_kv_heads % tensor == 0 or tensor % model.num_kv_heads == 0


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
