"""Compute the time of the update: reduction of gradients, all-gather of parameters, and the optimizer step.

Weights that data shards keep parts of, with zero 3, are gathered

    gathers "layer"    2 m times each, forward and backward of every microbatch; about one layer is whole
    gathers "chunk"    once for a run of actions of a chunk (`schedules/chunk_weights.py`); chunks with a slot are whole

Read `step_time.py` next, which hides some of it behind computation.
"""

from dataclasses import dataclass
from functools import lru_cache

from ...layers import ModelConfig
from ...schedules.chunk_weights import count_gathers
from ..machines.collective_time import CollectiveKind, Group, collective_time_s, make_group
from ..machines.kernel_time import memory_time_s
from ..machines.topology import Topology
from .device_params import End, block_matrices, device_params, device_words, expert_matrices, trained_params
from .held_layers import KindCounts
from .layout import Layout
from .muon_time import muon_s
from .pipeline_time import SearchTerms, extrapolate, plan_schedule, search_terms
from .runtime import OrderTraits, Runtime

Ends = tuple[End, ...]

# Gathered parameters are in 16 bit.
_WEIGHT_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class UpdateTime:
    """Seconds of a step beside the pipeline.

    `gather` is the all-gather of parameters and `reduce` the reduction of gradients over data; with a fully sharded
    axis both run for every microbatch. `tied` is the reduction of a tied embedding between the first and last stage.
    `optimizer` includes copies of moments from the host and back, which no computation hides.
    """

    gather: float
    reduce: float
    tied: float
    optimizer: float

    @property
    def sent(self) -> float:
        """Seconds of all collectives, hidden or not."""
        return self.gather + self.reduce + self.tied


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """Gathers of weights over data.

    rounds: times that each parameter is gathered in a step.
    slots: chunks that a rank has whole at once; 0 where layers are gathered one by one.
    """

    rounds: float
    slots: int


def find_gathers(model: ModelConfig, *, layout: Layout, num_tokens: int, runtime: Runtime) -> Gathers:
    """Return the gathers of a layout whose parameters and gradients are split over data (`zero` 3, or `fsdp`)."""
    if layout.zero != 3 or layout.gathers == "layer":
        return Gathers(rounds=2 * layout.microbatches, slots=0)
    if layout.pipe == 1:
        return Gathers(rounds=1, slots=layout.chunks)
    return _count(
        layout.schedule,
        num_ranks=layout.pipe,
        num_microbatches=layout.microbatches,
        num_chunks=layout.chunks,
        traits=runtime.order_traits,
        terms=search_terms(model, layout=layout, num_tokens=num_tokens, runtime=runtime),
    )


@lru_cache(maxsize=1024)
def _count(
    schedule: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    traits: OrderTraits,
    terms: SearchTerms | None,
) -> Gathers:
    def run(count: int) -> tuple[int, int]:
        sizes = {"num_ranks": num_ranks, "num_microbatches": count, "num_chunks": num_chunks}
        return count_gathers(plan_schedule(schedule, **sizes, traits=traits, terms=terms))

    sizes = {"num_ranks": num_ranks, "num_stages": num_ranks * num_chunks, "num_microbatches": num_microbatches}
    gathers = extrapolate(lambda count: run(count)[1], schedule, **sizes)
    # Every chunk has been at work beside every other by then.
    slots, _ = run(min(num_microbatches, 2 * num_ranks * num_chunks))
    return Gathers(rounds=gathers / num_chunks, slots=slots)


def update_time(
    model: ModelConfig,
    *,
    layout: Layout,
    runtime: Runtime,
    topology: Topology,
    layers: KindCounts,
    ends: Ends,
    rounds: float = 1.0,
) -> UpdateTime:
    """Return the seconds of the update on the first rank, which ends last.

    Args:
        layers, ends, rounds: what that rank holds of the layers, and of embedding and head; times that it gathers each
            parameter in a step, where gradients are split too (`find_gathers`).
    """
    params = device_params(model, layout=layout, runtime=runtime, layers=layers, ends=ends)
    # Frozen weights are gathered where they are sharded; gradients and moments are those of trained parameters.
    trained = trained_params(model, params=params, layout=layout, runtime=runtime, layers=layers, ends=ends)
    experts = sum(count * expert_matrices(kind, tensor=layout.tensor, expert=layout.expert) for kind, count in layers)
    is_split, shards = layout.zero > 0 or layout.splits_gradients, layout.update_shards
    # Devices that split experts have others: theirs are summed over what is left of data and context.
    group, copies = _groups(layout, runtime, topology)

    def time_of(kind: CollectiveKind, bytes_each: float, params: float = trained) -> float:
        parts = ((group, bytes_each * (params - experts)), (copies, bytes_each * experts))
        return sum(collective_time_s(kind, num_bytes=size, group=own, topology=topology) for own, size in parts)

    times, sent = (rounds, params) if layout.splits_gradients else (1, trained)
    reduce = time_of("reduce_scatter" if is_split else "all_reduce", runtime.gradient_bytes)
    moved = runtime.optimizer_bytes * ((trained - experts) / shards + experts / max(1, shards // layout.expert))
    moved += _cast_bytes(layers, layout=layout, runtime=runtime)
    return UpdateTime(
        gather=times * time_of("all_gather", _WEIGHT_BYTES, sent) if is_split else 0.0,
        reduce=reduce * (layout.microbatches if layout.splits_gradients else 1),
        tied=0.0 if "head" in ends else _tied_s(model, layout=layout, runtime=runtime, topology=topology),
        optimizer=memory_time_s(topology.accelerator, num_bytes=moved)
        + muon_s(layers, layout, runtime, topology)
        + _copies_s(layout, topology, num_bytes=runtime.optimizer_state_bytes * trained / shards),
    )


def _cast_bytes(layers: KindCounts, *, layout: Layout, runtime: Runtime) -> float:
    """Return the memory traffic of casting weights to the products' format, if that is done once a step."""
    if runtime.weight_casts == "microbatch":
        return 0.0
    split = {"tensor": layout.tensor, "expert": layout.expert}
    own = sum(count * block_matrices(kind, **split) for kind, count in layers)
    return own * runtime.product_format.cast_bytes(_WEIGHT_BYTES, layouts=runtime.cast_layouts)


def _copies_s(layout: Layout, topology: Topology, *, num_bytes: float) -> float:
    return 2 * num_bytes / topology.accelerator.host_bytes_per_s if layout.offload == "optimizer" else 0.0


def _groups(layout: Layout, runtime: Runtime, topology: Topology) -> tuple[Group, Group]:
    """Return the devices with the same parameters, and those with the same experts."""
    group = make_group(topology, size=layout.replicas * layout.context, stride=layout.tensor)
    # Without overlap a node uses one of its network adapters: see `Runtime.shard_overlap`.
    if runtime.shard_overlap == "off" and group.num_nodes > 1:
        group = Group(size=group.size, per_node=1)
    data, context = layout.replicas // layout.data_expert, layout.context // layout.context_expert
    # Between devices with the same experts lie those with others; between context ranks only those of context.
    stride = layout.tensor * (layout.expert if data > 1 else layout.context_expert)
    return group, make_group(topology, size=data * context, stride=stride)


def _tied_s(model: ModelConfig, *, layout: Layout, runtime: Runtime, topology: Topology) -> float:
    """Return the seconds of summing a tied table's gradient, of which both end stages have a part."""
    if layout.pipe == 1 or model.embeddings == "untied" or runtime.vocab == "split" or runtime.adapter_rank:
        return 0.0
    stride = layout.tensor * layout.context * layout.replicas * (layout.pipe - 1)
    table = runtime.gradient_bytes * model.hidden_size * device_words(model, layout=layout, runtime=runtime)
    group = make_group(topology, size=2, stride=stride)
    return collective_time_s("all_reduce", num_bytes=table, group=group, topology=topology)
