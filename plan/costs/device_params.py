"""Count the parameters that one device holds. Read `memory_model.py` for the bytes that they take."""

from typing import Literal

from ...layers import ModelConfig, param_counts
from ...schedules import Placement
from .layout import Layout
from .runtime import Runtime

End = Literal["embedding", "head"]
"""A part of the model before its first layer or after its last."""


def block_params(model: ModelConfig, *, tensor: int) -> int:
    """Return the number of parameters of one block on one device.

    Heads and features are split over `tensor`. Norms, output biases, and key and value heads where there are fewer than
    `tensor` are whole on every device.
    """
    d, q, kv, f = model.hidden_size, model.query_size, model.kv_size, model.ffn_size
    num_up = 2 if model.mlp == "swiglu" else 1
    split_kv = tensor if model.num_kv_heads % tensor == 0 else 1
    heads = q // tensor + 2 * kv // split_kv
    columns = heads + num_up * f // tensor
    weights = d * columns + (q + f) // tensor * d
    norms = 2 * d * (2 if model.norm == "layernorm" and model.bias == "on" else 1)
    head_norms = 2 * model.head_size if model.qk_norm == "on" else 0
    biases = {"off": 0, "qkv": heads, "on": columns + 2 * d}[model.bias]
    return weights + norms + head_norms + biases


def vocabulary_params(model: ModelConfig, *, tensor: int) -> tuple[int, int]:
    """Return the parameters of embedding and head on one device: those split over the vocabulary, and those whole."""
    counts = param_counts(model)
    tables = counts.embedding * (1 if model.embeddings == "tied" else 2)
    norm = counts.head - (counts.embedding if model.embeddings == "untied" else 0)
    return tables // tensor, counts.positions + norm


def ends_of(placement: Placement, rank: int) -> tuple[End, ...]:
    """Return which of embedding and head a pipeline rank holds: in a V the first rank holds both."""
    first, last = placement.ranks[0], placement.ranks[-1]
    return (("embedding",) if rank == first else ()) + (("head",) if rank == last else ())


def device_params(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, num_layers: int, ends: tuple[End, ...]
) -> float:
    """Return the number of parameters on one device of a pipeline rank that holds `num_layers` layers.

    Args:
        ends: which of embedding and head the rank holds; without effect if the vocabulary is split over the ranks.
    """
    tables, whole = vocabulary_params(model, tensor=layout.tensor)
    blocks = num_layers * block_params(model, tensor=layout.tensor)
    if layout.pipe == 1 or (runtime.vocab == "ends" and len(ends) == 2):
        return blocks + tables + whole
    if runtime.vocab == "split":
        return blocks + tables / layout.pipe + whole
    table = model.vocab_size * model.hidden_size // layout.tensor
    return blocks + (table + whole if ends else 0)
