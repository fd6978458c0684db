"""What comes after the last gradient: sums over the data axis, the optimizer, and what of the sums stays exposed.

Read `step_time.py` next.
"""

from dataclasses import dataclass

from ...layers import ModelConfig
from ..machines.collective_time import Group, collective_time_s, make_group
from ..machines.efficiency import memory_time_s
from ..machines.topology import Topology
from .layouts import Layout
from .minimum import block_params, vocabulary_params
from .program import Program

_WEIGHT_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class DataTime:
    """Seconds of a step beside the pipeline: `gather` and `reduce` in all, `tied` for a table on two stages.

    `gather` is of parameters, `reduce` of gradients; of a fully sharded axis both come again for every microbatch.
    """

    gather: float
    reduce: float
    tied: float
    optimizer: float


def device_params(model: ModelConfig, *, layout: Layout, program: Program, num_layers: int, stage: int) -> float:
    """Return the parameters of one device of a pipeline rank that holds `num_layers` layers.

    Args:
        stage: 0 has the embedding, -1 the head; any other neither, where the vocabulary is at the ends.
    """
    tables, whole = vocabulary_params(model, tensor=layout.tensor)
    blocks = num_layers * block_params(model, tensor=layout.tensor)
    if layout.pipe == 1:
        return blocks + tables + whole
    if program.vocab == "split":
        return blocks + tables / layout.pipe + whole
    table = model.vocab_size * model.hidden_size // layout.tensor
    return blocks + (table + whole if stage in (0, -1) else 0)


def data_time(model: ModelConfig, *, layout: Layout, program: Program, topology: Topology, num_layers: int) -> DataTime:
    """Return the seconds of sums and optimizer on the first rank, which ends last and holds `num_layers` layers."""
    params = device_params(model, layout=layout, program=program, num_layers=num_layers, stage=0)
    group = make_group(topology, size=layout.replicas * layout.context, stride=layout.tensor)
    if program.shard_overlap == "off" and group.num_nodes > 1:
        group = Group(size=group.size, per_node=1)
    shards = layout.replicas if layout.zero else 1

    def time_of(kind: str, num_bytes: float) -> float:
        assert kind in ("all_reduce", "all_gather", "reduce_scatter")
        return collective_time_s(kind, num_bytes=num_bytes, group=group, topology=topology)

    if layout.fsdp > 1 or layout.zero == 3:
        rounds = layout.microbatches
        gather = 2 * rounds * time_of("all_gather", _WEIGHT_BYTES * params)
        reduce = rounds * time_of("reduce_scatter", program.gradient_bytes * params)
        shards = layout.replicas
    elif layout.zero:
        gather = time_of("all_gather", _WEIGHT_BYTES * params)
        reduce = time_of("reduce_scatter", program.gradient_bytes * params)
    else:
        gather, reduce = 0.0, time_of("all_reduce", program.gradient_bytes * params)
    moved = program.optimizer_bytes * params / shards
    return DataTime(
        gather=gather,
        reduce=reduce,
        tied=_tied_s(model, layout=layout, program=program, topology=topology),
        optimizer=memory_time_s(topology.accelerator, num_bytes=moved),
    )


def _tied_s(model: ModelConfig, *, layout: Layout, program: Program, topology: Topology) -> float:
    if layout.pipe == 1 or model.embeddings == "untied" or program.vocab == "split":
        return 0.0
    stride = layout.tensor * layout.context * layout.replicas * (layout.pipe - 1)
    table = program.gradient_bytes * model.vocab_size * model.hidden_size / layout.tensor
    group = make_group(topology, size=2, stride=stride)
    return collective_time_s("all_reduce", num_bytes=table, group=group, topology=topology)
