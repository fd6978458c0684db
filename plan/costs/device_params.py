"""Count the parameters that one device holds. Read `memory_model.py` for the bytes that they take."""

from dataclasses import replace
from typing import Any, Literal

from ...layers import ModelConfig, param_counts
from ...layers.attention.counts import attention_vectors, attention_weights
from ...layers.lora.frozen_kernels import block_size
from ...layers.lora.linears import adapted_of, has_adapted_head, head_linear
from ...layers.own.check_config import has_own_classes
from ...layers.own.counts import device_sizes
from ...layers.vocabulary import stored_words
from ...schedules import Placement
from .held_layers import KindCounts
from .layout import Layout
from .runtime import Runtime

End = Literal["embedding", "head"]
"""A part of the model before its first layer or after its last."""


def block_params(model: ModelConfig, *, tensor: int, expert: int = 1) -> int:
    """Return the number of parameters of one block on one device.

    Heads and features are split over `tensor`, experts over `expert`. Norms, output biases, routers, and key and value
    heads where there are fewer than `tensor` are whole on every device.
    """
    if has_own_classes(model):
        return device_sizes(model, {"tensor": tensor, "expert": expert})[1]
    d, (heads, columns) = model.hidden_size, _columns(model, tensor)
    norms = model.num_block_norms * d * (2 if model.norm == "layernorm" and model.bias == "on" else 1)
    num_dense = 1 if model.shared_size or not model.num_experts else 0
    biases = {"off": 0, "qkv": heads, "on": columns + d + num_dense * d}[model.bias]
    if model.bias == "on" and model.num_experts:
        num_up = 2 if model.is_gated else 1
        biases += model.num_experts // expert * (num_up * model.expert_size // tensor + d)
    router = model.num_experts * (d + (1 if model.router_bias != "off" else 0))
    norms += attention_vectors(model, tensor=tensor)
    return block_matrices(model, tensor=tensor, expert=expert) + norms + biases + router


def block_matrices(model: ModelConfig, *, tensor: int, expert: int = 1) -> int:
    """Return the number of weights in the kernels of one block on one device."""
    if has_own_classes(model):
        return device_sizes(model, {"tensor": tensor, "expert": expert})[0]
    features = (model.shared_size if model.num_experts else model.ffn_size) // tensor
    experts = expert_matrices(model, tensor=tensor, expert=expert)
    num_kernels = 3 if model.is_gated else 2
    return attention_weights(model, tensor=tensor) + num_kernels * model.hidden_size * features + experts


def expert_matrices(model: ModelConfig, *, tensor: int, expert: int = 1) -> int:
    """Return the number of weights of the experts of one block on one device; 0 for a dense one."""
    num_kernels = 3 if model.is_gated else 2
    return model.num_experts // expert * num_kernels * model.hidden_size * model.expert_size // tensor


def trained_params(
    model: ModelConfig, *, params: float, layout: Layout, runtime: Runtime, layers: KindCounts, ends: tuple[End, ...]
) -> float:
    """Return how many of a device's parameters are trained: all, or those of adapters of its kernels and its head.

    An adapter of a kernel [k, n] has rank x (k + n) parameters; of these the dim that is split over tensor is split.
    """
    if not runtime.adapter_rank:
        return params
    if model.lora_rank:
        has_head = layout.pipe == 1 or runtime.vocab == "split" or "head" in ends
        of_head = _head_adapter(model, words=device_words(model, layout=layout, runtime=runtime)) if has_head else 0
        return of_head + sum(count * adapter_params(kind, layout=layout) for kind, count in layers)
    num_layers, rank = sum(count for _, count in layers), runtime.adapter_rank
    return num_layers * sum(_adapter_params(model, names, layout.tensor, rank) for names in runtime.adapted)


def adapter_params(kind: ModelConfig, *, layout: Layout) -> int:
    """Return the parameters of the adapters of one layer of a kind on one device."""
    split: dict[str, Any] = {"tensor": layout.tensor, "expert": layout.expert, "magnitude": kind.lora_magnitude}
    return sum(one.adapter_params(kind.lora_rank, **split) for one in adapted_of(kind))


def _head_adapter(model: ModelConfig, *, words: int) -> int:
    """Return the parameters of the adapter of a device's rows of the output table, 0 if it has none."""
    if not has_adapted_head(model):
        return 0
    own = replace(head_linear(model), num_out=words)
    return own.adapter_params(model.lora_rank, magnitude=model.lora_magnitude)


def _adapter_params(model: ModelConfig, names: tuple[str, ...], tensor: int, rank: int) -> float:
    """Return the parameters, on a device, of an adapter that layers share in another runtime."""
    d, t = model.hidden_size, tensor
    q, kv, f = model.query_size / t, model.kv_size / t, model.ffn_size / t
    gate = f if model.is_gated else 0.0
    outs = {"query": q, "key": kv, "value": kv, "out": d, "gate": gate, "up": f, "down": d}
    num_in, num_out = {"out": q, "down": f}.get(names[0], d), sum(outs[name] for name in names)
    return rank * (num_in + num_out)


def _columns(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Return the features of queries, keys and values on one device, and those of all column-parallel layers."""
    num_up = 2 if model.is_gated else 1
    split_kv = tensor if model.num_kv_heads % tensor == 0 else 1
    heads = model.query_size // tensor + 2 * model.kv_size // split_kv
    return heads, heads + num_up * (model.shared_size if model.num_experts else model.ffn_size) // tensor


def frozen_item_bytes(model: ModelConfig) -> tuple[float, float]:
    """Return the bytes of a number of a frozen kernel, and of its share of a scale, where it is held in four bits."""
    return 0.5, 4 / block_size(model.hidden_size)


def frozen_change(model: ModelConfig, *, kernels: float, plain: float, split: float) -> float:
    """Return by how many bytes so many numbers of frozen kernels take more in four bits, if they are held so.

    Args:
        plain, split: bytes of a plain number, whole and split over data as values are. Scales are not split so.
    """
    if model.lora_base == "plain":
        return 0.0
    values, scale = frozen_item_bytes(model)
    return kernels * (split * (values / plain - 1) + scale)


def device_words(model: ModelConfig, *, layout: Layout, runtime: Runtime) -> int:
    """Return the rows of a table on one device that has a part of it, with the padding of the vocabulary."""
    is_split = runtime.vocab == "split" and layout.pipe > 1
    return words_of_part(model, parts=layout.tensor * (layout.pipe if is_split else 1))


def words_of_part(model: ModelConfig, *, parts: int) -> int:
    """Return the rows of each of the parts of a table, with the padding of the vocabulary."""
    return stored_words(model.vocab_size, parts=parts) // parts


def vocabulary_params(model: ModelConfig, *, parts: int) -> tuple[int, int]:
    """Return the parameters of embedding and head on one device: those split over the vocabulary, and those whole.

    Args:
        parts: devices that the vocabulary is split over: tensor, or pipe x tensor.
    """
    counts = param_counts(model)
    tables = words_of_part(model, parts=parts) * model.hidden_size * (1 if model.embeddings == "tied" else 2)
    norm = counts.head - (counts.embedding if model.embeddings == "untied" else 0)
    return tables, counts.positions + norm


def ends_of(placement: Placement, rank: int) -> tuple[End, ...]:
    """Return which of embedding and head a pipeline rank holds: in a V the first rank holds both."""
    first, last = placement.ranks[0], placement.ranks[-1]
    return (("embedding",) if rank == first else ()) + (("head",) if rank == last else ())


def device_params(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, layers: KindCounts, ends: tuple[End, ...]
) -> float:
    """Return the number of parameters on one device of a pipeline rank.

    Args:
        layers: those that the rank holds.
        ends: which of embedding and head the rank holds; without effect if the vocabulary is split over the ranks.
    """
    whole = vocabulary_params(model, parts=layout.tensor)[1]
    has_whole = layout.pipe == 1 or runtime.vocab == "split" or ends
    matrices = device_matrices(model, layout=layout, runtime=runtime, layers=layers, ends=ends)
    split = {"tensor": layout.tensor, "expert": layout.expert}
    rest = sum(count * (block_params(kind, **split) - block_matrices(kind, **split)) for kind, count in layers)
    return matrices + rest + (whole if has_whole else 0)


def device_matrices(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, layers: KindCounts, ends: tuple[End, ...]
) -> float:
    """Return the number of weights in kernels and tables on one device, as `device_params` counts all parameters."""
    table = device_words(model, layout=layout, runtime=runtime) * model.hidden_size
    tables = table * (1 if model.embeddings == "tied" else 2)
    split = {"tensor": layout.tensor, "expert": layout.expert}
    blocks = sum(count * block_matrices(kind, **split) for kind, count in layers)
    if layout.pipe == 1 or runtime.vocab == "split" or len(ends) == 2:
        return blocks + tables
    return blocks + (table if ends else 0)
