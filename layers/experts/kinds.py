"""The kinds of layers in a stack whose first layers are dense and whose others have experts (DeepSeek-AI 2024).

    num_layers=6, dense_layers=2        dense dense experts experts experts experts
    parameters of the stack             {"dense": [2, ...], "experts": [4, ...]}

A model of one kind has parameters [L, ...] without names of kinds. Everything that differs between layers, their
parameters, costs and bytes, follows from the config of their kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

from ..config import ModelConfig
from ..lora.linears import targets_of_run
from .check_config import EXPERT_FIELDS

DENSE, EXPERTS = "dense", "experts"
"""Names of the kinds of a stack that has both, in their order in the model."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Layers `first` to `first + num_layers` of a model, all alike.

    name: that of their parameters, "" in a model of one kind.
    config: that of a model with layers of this kind alone, as many as the whole model has.
    """

    name: str
    config: ModelConfig
    first: int
    num_layers: int


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Return the kinds of a model's layers, in their order.

    >>> sizes = {"vocab_size": 256, "num_layers": 6, "hidden_size": 64, "num_heads": 4, "bias": "off"}
    >>> config = ModelConfig(num_experts=8, experts_per_token=2, dense_layers=2, **sizes)
    >>> [(kind.name, kind.num_layers) for kind in layer_kinds(config)]
    [('dense', 2), ('experts', 4)]
    """
    dense, whole = config.dense_layers, config.num_layers
    if not dense:
        return (LayerKind(name="", config=config, first=0, num_layers=whole),)
    defaults: dict[str, Any] = {
        field.name: field.default for field in fields(ModelConfig) if field.name in EXPERT_FIELDS
    }
    own = replace(config, **defaults, lora_targets=targets_of_run(config, 0))
    rest = replace(config, dense_layers=0, lora_targets=targets_of_run(config, 1))
    return (
        LayerKind(name=DENSE, config=own, first=0, num_layers=dense),
        LayerKind(name=EXPERTS, config=rest, first=dense, num_layers=whole - dense),
    )


def layer_pattern(config: ModelConfig) -> tuple[str, ...] | None:
    """Return the kind of every layer by name, or None for a model of one kind."""
    kinds = layer_kinds(config)
    return tuple(kind.name for kind in kinds for _ in range(kind.num_layers)) if len(kinds) > 1 else None


def kinds_within(config: ModelConfig, *, first: int, count: int) -> dict[ModelConfig, int]:
    """Return how many of the layers `first` to `first + count` are of each kind, by its config; no kinds of none.

    >>> sizes = {"vocab_size": 256, "num_layers": 6, "hidden_size": 64, "num_heads": 4, "bias": "off"}
    >>> config = ModelConfig(num_experts=8, experts_per_token=2, dense_layers=2, **sizes)
    >>> list(kinds_within(config, first=1, count=3).values())
    [1, 2]
    """
    counts = {
        kind.config: min(first + count, kind.first + kind.num_layers) - max(first, kind.first)
        for kind in layer_kinds(config)
    }
    return {kind: number for kind, number in counts.items() if number > 0}


def layers_by_kind(config: ModelConfig, counts: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return how many layers of each kind, by name, there are on stages of these numbers of layers.

    >>> sizes = {"vocab_size": 256, "num_layers": 6, "hidden_size": 64, "num_heads": 4, "bias": "off"}
    >>> config = ModelConfig(num_experts=8, experts_per_token=2, dense_layers=2, **sizes)
    >>> layers_by_kind(config, (3, 3))
    {'dense': (2, 0), 'experts': (1, 3)}
    """
    ends = accumulate(counts)
    stages = [kinds_within(config, first=end - count, count=count) for end, count in zip(ends, counts, strict=True)]
    return {kind.name: tuple(stage.get(kind.config, 0) for stage in stages) for kind in layer_kinds(config)}
