"""Compute the memory of a training step on every rank of the pipeline, by purpose. Read `step_time.py` for its time.

    weights, gradients, optimizer   parameters of the rank x bytes per parameter / shards
    activations                     residuals of a layer x layers x microbatches in flight, and buffers of the ends
    temporary                       logits of the loss, one layer's backward, and copies of the weights

Residuals of a layer come from `activations.py`, bytes per parameter from `runtime.py`, temporary ones from
`temporary.py`.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from ...layers import ModelConfig
from ...schedules import Placement, find_family, simulate
from .activations import boundary_bytes, layer_activation_bytes
from .device_params import (
    End,
    block_matrices,
    device_matrices,
    device_params,
    ends_of,
    expert_matrices,
    frozen_change,
    trained_params,
)
from .held_layers import HeldLayers, KindCounts, held_layers
from .host_residuals import count_waiting
from .layout import Layout
from .operations import item_bytes
from .pipeline_time import SearchTerms, find_placement, is_searched_whole, plan_schedule, search_terms
from .runtime import TRELLAX, OrderTraits, Runtime
from .stage_time import stage_layers
from .temporary import copied_bytes, gathered_tables, score_bytes, temporary_bytes
from .update_time import find_gathers

_FLOAT32 = 4

UPDATE_PARTS = 8
"""Parts of the layers whose moments come from the host one after another (`../../train/update/offload.py`)."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one device of one pipeline rank, by purpose, and those that it keeps in the memory of its host."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float
    kv_cache: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all purposes together; those on the host are not the device's."""
        # A sum over the fields' names takes ten times as long, and a search asks for ten thousand layouts.
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary + self.kv_cache

    @property
    def classes(self) -> dict[str, int]:
        """Bytes by purpose, rounded."""
        return {name: round(getattr(self, name)) for name in self._names}

    @property
    def _names(self) -> list[str]:
        return [field.name for field in fields(self) if field.name != "host"]


def step_memory(
    model: ModelConfig, *, layout: Layout, num_tokens: int, runtime: Runtime = TRELLAX
) -> tuple[MemoryUse, ...]:
    """Return the memory of a training step on a device of every pipeline rank; the fullest decides whether it fits."""
    terms = search_terms(model, layout=layout, num_tokens=num_tokens, runtime=runtime)
    in_flight = peak_in_flight(
        layout.schedule,
        num_ranks=layout.pipe,
        num_microbatches=layout.microbatches,
        num_chunks=layout.chunks,
        traits=runtime.order_traits,
        terms=terms,
    )
    waiting = count_waiting(layout, traits=runtime.order_traits, terms=terms) if _waits(layout) else None
    in_flight = (waiting.on_device,) * layout.pipe if waiting else in_flight
    placement = find_placement(model, layout=layout, num_tokens=num_tokens, runtime=runtime)
    parts = _parts_of_ranks(model, layout=layout, placement=placement, runtime=runtime)
    held = [(*part, in_flight[rank]) for rank, part in enumerate(parts)]
    # Most ranks hold as much as others, and a search asks for ten thousand layouts.
    given: dict[str, Any] = {"layout": layout, "runtime": runtime, "num_tokens": num_tokens}
    uses = {own: _rank_memory(model, **given, ends=own[0], layers=own[1], held=own[2]) for own in dict.fromkeys(held)}
    if waiting:
        host = {own: waiting.on_host * kept_bytes(own[1].room, **given) for own in uses}
        uses = {own: replace(use, host=host[own]) for own, use in uses.items()}
    return tuple(uses[own] for own in held)


def _parts_of_ranks(
    model: ModelConfig, *, layout: Layout, placement: Placement, runtime: Runtime
) -> list[tuple[tuple[End, ...], HeldLayers]]:
    """Return the ends and the layers that each rank has memory for.

    One program for all ranks has room for the layers of the largest stage on each, as layers of two kinds are always
    counted, and for both ends where the vocabulary is not split.
    """
    layers = stage_layers(model, layout, runtime=runtime)
    ranks = range(layout.pipe)
    if runtime.residuals != "trellax":
        return [
            (ends_of(placement, rank), held_layers(model, layers, stages=placement.stages_of(rank))) for rank in ranks
        ]
    padded = layers if model.dense_layers else (max(layers),) * len(layers)
    both: tuple[End, ...] = ("embedding", "head")
    return [(both, held_layers(model, padded, stages=placement.stages_of(rank))) for rank in ranks]


def _waits(layout: Layout) -> bool:
    return layout.offload == "residuals" and layout.pipe > 1


def kept_bytes(layers: KindCounts, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes of residuals of layers of one microbatch."""
    given: dict[str, Any] = {"layout": layout, "runtime": runtime, "num_tokens": num_tokens}
    return sum(count * layer_activation_bytes(kind, **given) for kind, count in layers)


def fullest(ranks: tuple[MemoryUse, ...]) -> MemoryUse:
    """Return the memory of the rank that needs most."""
    return max(ranks, key=lambda rank: rank.total)


@lru_cache(maxsize=4096)
def peak_in_flight(
    schedule: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    traits: OrderTraits,
    terms: SearchTerms | None = None,
) -> tuple[int, ...]:
    """Return the most microbatches of a chunk that each rank holds at once.

    A lockstep program has the same buffers on every rank, so there all ranks count the largest number. A family's
    formula is used where it has one; else a schedule of a few microbatches is built, which holds as many as a longer
    one unless it is searched for.
    """
    if num_ranks == 1:
        return (1,)
    family, everything = find_family(schedule), num_microbatches * num_chunks
    if family.peak_in_flight == "all":
        return (everything,) * num_ranks
    if traits.clock == "lockstep" and family.peak_in_flight is not None:
        most = family.peak_in_flight(num_ranks, num_chunks, traits.vocab)
        # Forwards of a pair come first, before the backward beside them frees its slot.
        most += family.is_paired and traits.pair_overlap == "on"
        return (min(everything, most),) * num_ranks
    # Enough to fill the pipeline; from there on every forward has a backward beside it, and the peak stays.
    few = min(num_microbatches, (2 * num_chunks + 1) * num_ranks if num_chunks > 1 else 2 * num_ranks)
    if is_searched_whole(schedule, num_stages=num_ranks * num_chunks, num_microbatches=num_microbatches):
        few = num_microbatches
    sizes = {"num_ranks": num_ranks, "num_microbatches": few, "num_chunks": num_chunks}
    built = plan_schedule(schedule, **sizes, traits=traits, terms=terms)
    peaks = simulate(built, clock=traits.clock).peak_in_flight
    # A search that holds all of a few microbatches would hold all of many.
    if family.order == "searched" and max(peaks) == few * num_chunks:
        return (everything,) * num_ranks
    return peaks if traits.clock == "async" else (max(peaks),) * num_ranks


def _rank_memory(
    model: ModelConfig,
    *,
    layout: Layout,
    runtime: Runtime,
    num_tokens: int,
    ends: tuple[End, ...],
    layers: HeldLayers,
    held: int,
) -> MemoryUse:
    # Buffers of microbatches in flight have room for the largest chunk of the rank.
    room, times = (layers.room, held) if layout.pipe > 1 else (layers.stored, 1)
    kept = times * kept_bytes(room, layout=layout, runtime=runtime, num_tokens=num_tokens)
    slots = find_gathers(model, layout=layout, runtime=runtime, num_tokens=num_tokens).slots
    kept += _gathered_bytes(layers, layout=layout, runtime=runtime, slots=slots)
    if layout.pipe == 1 and runtime.residuals == "trellax":
        kept += _unrolled_bytes(layers.stored, layout=layout, runtime=runtime, num_tokens=num_tokens)
    state = _rank_state(model, layout=layout, runtime=runtime, layers=layers.stored, ends=ends)
    copies = copied_bytes(layers.stored, layout=layout) if runtime.weight_copies == "on" else 0.0
    tables = gathered_tables(model, layout=layout, runtime=runtime)
    given: dict[str, Any] = {"layout": layout, "runtime": runtime, "num_tokens": num_tokens, "ends": ends}
    temporary = copies + tables.copies
    temporary += max(temporary_bytes(kind, **given, gradients=state["layers"]) for kind, _ in layers.stored)
    host = state["optimizer"] if layout.offload == "optimizer" else 0.0
    activations = kept + _end_bytes(model, **given, held=held)
    # In the update nothing of a microbatch is left.
    update = _muon_bytes(layers.stored, layout=layout, updates=state["updates"]) if runtime.kernel_saving_bytes else 0.0
    return MemoryUse(
        weights=state["weights"],
        gradients=state["gradients"] + tables.gradients,
        optimizer=state["optimizer"] - host,
        activations=activations,
        # Old and new moments of one part are on the device at a time, when nothing else is temporary.
        temporary=max(temporary, 2 * host / UPDATE_PARTS, update - activations),
        host=host,
    )


def _rank_state(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, layers: KindCounts, ends: tuple[End, ...]
) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer of a rank, and of the gradients those of its layers."""
    counted: dict[str, Any] = {"layout": layout, "runtime": runtime, "layers": layers, "ends": ends}
    params = device_params(model, **counted)
    # trellax keeps norms, biases and positions whole on every data shard.
    whole = params - device_matrices(model, **counted) if runtime.residuals == "trellax" and layout.zero > 1 else 0.0
    split = {"tensor": layout.tensor, "expert": layout.expert}
    experts = sum(count * expert_matrices(kind, **split) for kind, count in layers)
    state = _split_state(layout, runtime, params=params, whole=whole, experts=experts)
    # Frozen weights have neither gradients nor moments.
    trained = trained_params(model, params=params, layout=layout, runtime=runtime, layers=layers, ends=ends) / params
    state |= {name: trained * state[name] for name in ("gradients", "optimizer")}
    kernels = sum(count * block_matrices(kind, **split) for kind, count in layers)
    if runtime.adapter_rank:
        own = frozen_change(model, kernels=kernels, plain=runtime.weight_bytes, split=state["weights"] / params)
        # Adapters are float32 in trellax.
        adapters = trained * (_FLOAT32 / runtime.weight_bytes if runtime.residuals == "trellax" else 1)
        state["weights"] = state["weights"] * (1 + adapters) + own
    state["optimizer"] *= 1 - runtime.kernel_saving_bytes / runtime.optimizer_state_bytes * kernels / params
    # An update is float32 and split as the moments are.
    updates = _FLOAT32 * params / layout.update_shards
    return state | {"layers": state["gradients"] * kernels / params, "updates": updates}


def _muon_bytes(layers: KindCounts, *, layout: Layout, updates: float) -> float:
    """Return the bytes of Muon's update: those of all parameters, and a part of the largest kernel besides.

    Kernels are exchanged one after another (`../../train/update/muon.py`); the update of one is as large as its part.
    """
    largest = 0.0
    for kind, count in layers:
        dense = kind.shared_size if kind.num_experts else kind.ffn_size
        experts = kind.num_experts // layout.expert * kind.expert_size
        largest = max(largest, count * kind.hidden_size * max(dense, experts, kind.query_size) / layout.tensor)
    return updates + _FLOAT32 * largest / layout.update_shards


def _unrolled_bytes(layers: KindCounts, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes that a layer alone of its kind keeps in spite of rematerialization.

    XLA unrolls loops of one layer, and merges the recomputation in the backward with the forward; not that of the
    feed-forward where layers gather their weights.
    """
    given: dict[str, Any] = {"runtime": runtime, "num_tokens": num_tokens}
    whole = replace(layout, remat="none")
    tokens = layout.sequences * num_tokens / layout.context

    def kept(kind: ModelConfig) -> float:
        merged = layer_activation_bytes(kind, layout=whole, **given)
        merged -= layer_activation_bytes(kind, layout=layout, **given)
        if layout.zero == 3 and not kind.num_experts:
            num_inner = (2 if kind.is_gated else 1) * (layout.remat == "full") + 1
            merged -= item_bytes(kind) * tokens * num_inner * kind.ffn_size / layout.tensor
        return merged + score_bytes(kind, layout=layout, **given)

    return sum(kept(kind) for kind, count in layers if count == 1 and layout.remat != "none")


def _gathered_bytes(layers: HeldLayers, *, layout: Layout, runtime: Runtime, slots: int) -> float:
    """Return the bytes of gathered parameters where layers gather their own, or chunks into so many slots.

    trellax has about one layer's at a time: the next one's come as those of the layer at work are used up. In the turns
    of a pipeline both are there, and in PyTorch, with the gradient before it is sent.
    """
    if not layout.splits_gradients:
        return 0.0

    def bytes_of(kind: ModelConfig) -> float:
        return item_bytes(kind) * block_matrices(kind, tensor=layout.tensor, expert=layout.expert)

    if slots:
        chunk = layers.stored if layout.pipe == 1 else layers.room
        return (slots if layout.pipe > 1 else 1) * sum(count * bytes_of(kind) for kind, count in chunk)
    own = max(bytes_of(kind) for kind, _ in layers.stored)
    if runtime.residuals == "trellax":
        return 2.0 * own if layout.pipe > 1 else own
    return 3.0 * own


def _split_state(layout: Layout, runtime: Runtime, *, params: float, whole: float, experts: float) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer on a device.

    Args:
        whole, experts: how many of the parameters are whole on every data shard, and how many are those of experts.
    """
    # Devices that split experts have others; theirs are split over what is left of data and context.
    left = {"data": layout.data // layout.data_expert, "context": layout.context // layout.context_expert}
    apart = replace(layout, **left, expert=1, context_expert=1)
    parts = ((layout, params - whole - experts), (apart, experts), (replace(layout, zero=0), whole))
    found = dict.fromkeys(_state_bytes(layout, runtime), 0.0)
    for own, count in parts:
        for name, each in _state_bytes(own, runtime).items():
            found[name] += each * count
    return found


def _state_bytes(layout: Layout, runtime: Runtime) -> dict[str, float]:
    """Return bytes per parameter on a device: what the runtime keeps, divided by the shards that split it."""
    # Over all copies of a parameter: the optimizer state, then parameters too; ZeRO-3 and fsdp split all over data.
    shards = layout.update_shards
    every = layout.replicas * layout.context
    whole = every if layout.splits_gradients else 1
    weights = every if layout.zero == 2 else whole
    gradients = float(runtime.gradient_bytes + runtime.fresh_gradient_bytes)
    return {
        "weights": runtime.weight_bytes / weights,
        "gradients": gradients / whole,
        "optimizer": runtime.optimizer_state_bytes / shards,
    }


def _end_bytes(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int, ends: tuple[End, ...], held: int
) -> float:
    """Return the bytes of activations beside those of layers: communication buffers, or residuals of the ends.

    trellax has buffers for an arriving activation, an arriving gradient and one that is sent; where all forwards come
    first, every microbatch's activation of the last stage waits. Megatron stores masks of the embedding's dropout and
    the inputs of the final norm and the head.
    """
    boundary = boundary_bytes(model, layout=layout, runtime=runtime, num_tokens=num_tokens)
    if runtime.residuals == "trellax":
        waiting = layout.microbatches + 2 if layout.family.peak_in_flight == "all" else 3
        if layout.family.is_paired and runtime.pair_overlap == "on":
            # Both buffers have two places, to receive beside the work; inputs and outputs of both parts are there too.
            waiting += 6
        return boundary * (waiting if layout.pipe > 1 else 1)
    masks = boundary / item_bytes(model) * held if "embedding" in ends and runtime.dropout == "on" else 0.0
    return masks + (2 * boundary if "head" in ends else 0.0)
