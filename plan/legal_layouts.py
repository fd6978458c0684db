"""Enumerate the meshes and layouts that a model can run on. Read `training_search.py` for how they are compared."""

import math
from collections.abc import Iterator

from ..layers import ModelConfig
from ..meshes import Axis, MeshSpec
from ..schedules import Vocab
from .costs.layout import Layout, PlanRemat, ZeroStage
from .machines.topology import Topology


def legal_meshes(model: ModelConfig, *, num_devices: int, vocab: Vocab, context: int = 1) -> Iterator[MeshSpec]:
    """Yield every mesh of `num_devices` devices over which the model's heads, features, vocabulary and layers split.

    Args:
        context: devices that share each sequence, the same in all meshes.
        vocab: "split" divides the vocabulary over pipe x tensor, "ends" over tensor alone.
    """
    if num_devices % context:
        return
    more = {"context": Axis(context, role="context")} if context > 1 else {}
    num_devices //= context
    for tensor in _divisors(num_devices):
        if model.num_heads % tensor or _features(model) % tensor or not _splits_kv(model, tensor):
            continue
        for pipe in _divisors(num_devices // tensor):
            parts = tensor * (pipe if vocab == "split" and pipe > 1 else 1)
            if pipe <= model.num_layers and model.vocab_size % parts == 0:
                yield MeshSpec(data=num_devices // (tensor * pipe), tensor=tensor, pipe=pipe, axes=more)


def device_counts(topology: Topology) -> tuple[int, ...]:
    """Return the numbers of devices on which a search tries meshes, in ascending order.

    They are all devices, the largest power of two of them (which divides more batches), one node, and one device.
    """
    power = 1 << topology.num_devices.bit_length() - 1
    return tuple(sorted({topology.num_devices, power, topology.devices_per_node, 1}))


def legal_layouts(
    model: ModelConfig,
    *,
    num_devices: int,
    batch_size: int,
    remats: tuple[PlanRemat, ...] = ("none", "dots", "full"),
    vocab: Vocab = "split",
    context: int = 1,
) -> Iterator[Layout]:
    """Yield the layouts of a training step on `num_devices` devices that the search prices.

    Microbatches hold a power of two of sequences, or all sequences of a shard. Schedules are 1F1B and ZB-H1, with one
    chunk per rank or interleaved with 2 or 4, and the V-shaped ones with 2.
    """
    for mesh in legal_meshes(model, num_devices=num_devices, vocab=vocab, context=context):
        if batch_size % mesh.data:
            continue
        shard = batch_size // mesh.data
        for sequences in _divisors(shard):
            if sequences & (sequences - 1) and sequences != shard:
                continue
            for schedule, chunks in _schedules(model, pipe=mesh.pipe, microbatches=shard // sequences):
                for remat in remats:
                    # Not 1: weights gathered once a step take less memory, and send no more.
                    for zero, expert in _splits_of_weights(model, mesh):
                        yield Layout(
                            data=mesh.data,
                            tensor=mesh.tensor,
                            pipe=mesh.pipe,
                            expert=expert,
                            context=context,
                            schedule=schedule,
                            chunks=chunks,
                            microbatches=shard // sequences,
                            sequences=sequences,
                            remat=remat,
                            zero=zero,
                        )


def _splits_of_weights(model: ModelConfig, mesh: MeshSpec) -> Iterator[tuple[ZeroStage, int]]:
    """Yield how much is split over data, and the devices of data that split the experts."""
    experts = [parts for parts in _divisors(mesh.data) if model.num_experts % parts == 0] if model.num_experts else [1]
    for expert in experts:
        yield 0, expert
        if mesh.data * mesh.context > expert:
            yield 2, expert
            yield 3, expert


def _features(model: ModelConfig) -> int:
    """Return the features of a feed-forward that tensor splits; of experts those of one, and those that all use."""
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
    if microbatches > 1 and 2 * pipe <= model.num_layers:
        for name in ("zb-v", "v-half", "v-min"):
            yield name, 2


def _splits_kv(model: ModelConfig, tensor: int) -> bool:
    return model.num_kv_heads % tensor == 0 or tensor % model.num_kv_heads == 0


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
