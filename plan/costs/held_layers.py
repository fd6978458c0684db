"""Count the layers of each kind that a pipeline rank holds, and how many of them are in each stage.

A model has one kind of layer, or dense ones before those with experts. Each kind has arrays of its own on every rank,
with room for as many layers as any stage has of it: 3 stages of 1 dense and 2, 3 and 3 expert layers take room for 1
and 3 on each rank. Read `memory_model.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...layers import ModelConfig
from ...layers.experts.kinds import kinds_within, layer_kinds, layers_by_kind

KindCounts = tuple[tuple[ModelConfig, int], ...]
"""Number of layers of each kind, by the config of the kind."""


@dataclass(frozen=True, kw_only=True)
class HeldLayers:
    """The layers of one rank.

    stored: those that it has parameters of.
    room: those of one chunk, for whose residuals it has room.
    """

    stored: KindCounts
    room: KindCounts


def held_layers(model: ModelConfig, layers: Sequence[int], *, stages: Sequence[int]) -> HeldLayers:
    """Return what a rank with these stages holds, of stages of these numbers of layers."""
    if not model.dense_layers:
        own = [layers[stage] for stage in stages]
        return HeldLayers(stored=((model, sum(own)),), room=((model, max(own)),))
    counts = layers_by_kind(model, layers)
    room = tuple((kind.config, max(counts[kind.name])) for kind in layer_kinds(model))
    return HeldLayers(stored=tuple((kind, len(stages) * count) for kind, count in room), room=room)


def kinds_of_stages(model: ModelConfig, layers: Sequence[int]) -> tuple[KindCounts, ...]:
    """Return the layers of each kind that each stage runs."""
    pairs = zip(accumulate(layers), layers, strict=True)
    return tuple(tuple(kinds_within(model, first=end - count, count=count).items()) for end, count in pairs)
