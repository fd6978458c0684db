"""Compute the bytes of weights and of cached tokens that a device of an inference server holds.

Servers hold them in two ways. "even" is a pipeline with layers as even as possible, the embedding on its first stage
and the head on its last. "padded" is trellax's engine: layers balanced by the bytes that a token reads, arrays as long
as on the largest stage, and embedding and head on every stage. Read `../inference_time.py` for the times.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ....layers import ModelConfig
from ....layers.attention.counts import attention_products, attention_widths
from ....layers.experts.kinds import kinds_within, layer_kinds, layers_by_kind
from ....meshes import PlanError
from ....meshes.arguments import check_fields
from ....pipeline.model.balance import decode_layers
from ..device_params import block_matrices, block_params, vocabulary_params
from ..layout import Layout


@dataclass(frozen=True, kw_only=True)
class Held:
    """How a server holds weights and cache; numbers are bytes.

    Args:
        stages: see above.
        weight: of a weight in the kernel of a linear layer; other: of all other parameters, 0 for the same.
        channel: of the scale of an output channel of a kernel.
        cached: of a number in the cache; cached_head: of the scale of a token and head, of keys and of values.
        read_tokens: prompt tokens that are read at a time, whose activations are in memory together.

    Raises:
        PlanError: a number is negative, or `stages` is unknown.
    """

    stages: Literal["even", "padded"] = "even"
    weight: float = 2.0
    other: float = 0.0
    channel: float = 0.0
    cached: float = 2.0
    cached_head: float = 0.0
    read_tokens: int = 4096

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError)


def weight_bytes(model: ModelConfig, *, layout: Layout, held: Held | None = None) -> float:
    """Return the bytes of weights on the fullest device of an inference layout."""
    held = held or Held()
    other, split = held.other or held.weight, (layout.tensor, layout.expert)
    ends = other * sum(vocabulary_params(model, parts=layout.tensor))
    end = ends if layout.pipe == 1 or held.stages == "padded" else ends / 2
    return end + sum(count * _block_bytes(kind, held, other, *split) for kind, count in _kinds_of(model, layout, held))


def layers_of_device(model: ModelConfig, *, layout: Layout, held: Held) -> int:
    """Return the layers for which the fullest device has arrays."""
    if held.stages == "even":
        return math.ceil(model.num_layers / layout.pipe)
    return sum(count for _, count in _kinds_of(model, layout, held))


def _kinds_of(model: ModelConfig, layout: Layout, held: Held) -> list[tuple[ModelConfig, int]]:
    """Return how many layers of each kind the fullest device has room for."""
    if held.stages == "padded":
        counts = layers_by_kind(model, decode_layers(model, num_stages=layout.pipe))
        return [(kind.config, max(counts[kind.name])) for kind in layer_kinds(model)]
    layers = math.ceil(model.num_layers / layout.pipe)
    # The last stage has the largest layers; room for dense ones, which others have, is on each.
    own = kinds_within(model, first=model.num_layers - layers, count=layers)
    if model.dense_layers:
        dense, *_ = layer_kinds(model)
        own[dense.config] = min(layers, dense.num_layers)
    return list(own.items())


def _block_bytes(kind: ModelConfig, held: Held, other: float, tensor: int, expert: int) -> float:
    """Return the bytes of one block on a device."""
    matrices = block_matrices(kind, tensor=tensor, expert=expert)
    rest = block_params(kind, tensor=tensor, expert=expert) - matrices
    channels = _channels(kind, tensor=tensor, expert=expert) if held.channel else 0
    return held.weight * matrices + other * rest + held.channel * channels


def _channels(kind: ModelConfig, *, tensor: int, expert: int) -> float:
    """Return the output channels of the kernels of a block on one device."""
    num_up, d = 2 if kind.is_gated else 1, kind.hidden_size

    def feed_forward(features: int) -> float:
        return num_up * features / tensor + d if features else 0.0

    attention = sum(out for _, out in attention_products(kind, tensor=tensor))
    if not kind.num_experts:
        return attention + feed_forward(kind.ffn_size)
    return attention + feed_forward(kind.shared_size) + kind.num_experts / expert * feed_forward(kind.expert_size)


def kv_bytes_per_token(model: ModelConfig, *, tensor: int, held: Held | None = None) -> float:
    """Return the bytes that one layer caches for a token on one device: its keys and values, or its latent vector."""
    held, own = held or Held(), attention_widths(model, tensor=tensor)
    if model.latent_size:
        return held.cached * (model.latent_size + own.shared) + 2 * held.cached_head
    heads = own.key / model.head_size
    return held.cached * (own.key + own.value) + 2 * heads * held.cached_head
