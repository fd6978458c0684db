"""Tabulate the stages of a pipeline: layers, share of the time, parameters and activations of each."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import jax

from ...layers import ModelConfig, activation_bytes, param_counts
from ...layers.context.choice import kept_ranks
from ...layers.experts.kinds import DENSE, layer_kinds, layers_by_kind
from ...meshes.columns import align_within
from ...meshes.terminal import fold
from ...plan.costs.activations import split_backward_bytes
from ...plan.costs.held_layers import kinds_of_stages
from ...programs.memory import device_bytes
from ...schedules import Schedule, simulate
from ..state import Setup

_PARAM_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One stage, with its memory on each device of its rank.

    `time_share` is its part of the time of all stages, computed from their matrix products. `parameters` are counted
    before sharding, those of the vocabulary at the stage that has them; a tied table counts once, with the embedding.
    `in_flight` is the number of microbatches that the stage holds when its rank holds most, and `activation_bytes`
    what their layers keep for the backward.
    """

    stage: int
    rank: int
    layers: int
    time_share: float
    parameters: int
    parameter_bytes: int
    in_flight: int
    activation_bytes: int


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """The rows of all stages, and `notes` below them on what a single program for all ranks costs in memory."""

    rows: tuple[StageRow, ...]
    notes: tuple[str, ...]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """The rows as dicts, for scripts."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        return self.draw()

    def draw(self, *, width: int | None = None) -> str:
        """Return the table as text; where it is wider than `width`, its columns follow in parts below each other."""
        lines = [("stage", "rank", "layers", "time", "parameters", "bytes/device", "in flight", "activations/device")]
        lines += [
            (
                str(row.stage),
                str(row.rank),
                str(row.layers),
                f"{row.time_share:.1%}",
                f"{row.parameters:,}",
                f"{row.parameter_bytes:,}",
                str(row.in_flight),
                f"{row.activation_bytes:,}",
            )
            for row in self.rows
        ]
        parts = []
        for part in align_within(lines, width=width, left=0).split("\n\n"):
            head, *rows = part.splitlines()
            parts.append("\n".join([head, "-" * len(head), *rows]))
        return "\n".join(["\n\n".join(parts), *(fold(note, width=width) for note in self.notes)])


def tabulate_stages(setup: Setup) -> StageTable:
    """Return the table of the stages of a run with several ranks, computed from shapes."""
    config, layers = setup.config, setup.layers_per_stage
    total = sum(cost.total for cost in setup.stage_costs)
    held = microbatches_at_peak(setup.schedule, layers_per_stage=layers)
    kinds, kept = kinds_of_stages(config.model, layers), _count_kept(setup)
    blocks, layer_bytes = _count_blocks(config.model), _count_layer_bytes(setup)
    rows = []

    def total_of(stage: int, each: dict[ModelConfig, int]) -> int:
        return sum(count * each[kind] for kind, count in kinds[stage])

    for stage, cost in enumerate(setup.stage_costs):
        end, end_bytes = _count_ends(setup, stage)
        rows.append(
            StageRow(
                stage=stage,
                rank=setup.placement.rank_of(stage),
                layers=layers[stage],
                time_share=cost.total / total,
                parameters=total_of(stage, blocks) + end,
                parameter_bytes=total_of(stage, layer_bytes) + end_bytes,
                in_flight=held[stage],
                activation_bytes=held[stage] * total_of(stage, kept),
            )
        )
    return StageTable(rows=tuple(rows), notes=_write_notes(setup, kept=kept))


def microbatches_at_peak(schedule: Schedule, *, layers_per_stage: tuple[int, ...]) -> tuple[int, ...]:
    """Return for every stage the microbatches it holds at the moment at which its rank holds the most activations.

    With one chunk per rank it is the peak in flight. With more, the stages of a rank are counted at the same moment, so
    that their activations add up to what the rank needs. Example: a rank with stages 0 and 3 of 2 layers each that
    holds (4, 0), then (3, 2), then (1, 3) microbatches counts 3 and 2, since 3 * 2 + 2 * 2 = 10 layers are most.
    """
    held: Counter[int] = Counter()
    at_peak, most = [0] * schedule.num_stages, [0] * schedule.num_ranks
    for _, rank, action in schedule.placed():
        held[action.stage] += {"F": 1, "I": 0, "W": -1, "B": -1}[action.kind]
        own = schedule.placement.stages_of(rank)
        num_layers = sum(held[stage] * layers_per_stage[stage] for stage in own)
        if num_layers > most[rank]:
            most[rank] = num_layers
            for stage in own:
                at_peak[stage] = held[stage]
    return tuple(at_peak)


def _count_blocks(model: ModelConfig) -> dict[ModelConfig, int]:
    """Return the number of parameters of one layer of each kind, those of adapters too."""
    counts = {kind.config: param_counts(kind.config) for kind in layer_kinds(model)}
    return {kind: own.block + own.adapters // own.num_layers for kind, own in counts.items()}


def _count_kept(setup: Setup) -> dict[ModelConfig, int]:
    """Return the bytes that one layer of each kind keeps of one microbatch for the backward, on one device."""
    config, sizes = setup.config, setup.sizes
    shapes: dict[str, Any] = {
        "num_sequences": config.train.batch_size // (config.pipeline.microbatches * sizes.data),
        "num_tokens": sizes.tokens_of_rank(config.data.seq_len),
        "tensor": sizes.tensor,
        "sequence": "on" if sizes.splits_tokens(config.data.seq_len) else "off",
        "remat": config.pipeline.remat,
    }
    has_halves = any(action.kind == "W" for _, _, action in setup.schedule.placed())
    shapes["key_ranks"] = kept_ranks(setup.context_attention, context=sizes.context, remat=config.pipeline.remat)

    def kept(model: ModelConfig) -> int:
        whole = activation_bytes(model, **shapes).layer
        return whole + round(split_backward_bytes(model, **shapes)) if has_halves else whole

    return {kind.config: kept(kind.config) for kind in layer_kinds(config.model)}


def _count_layer_bytes(setup: Setup) -> dict[ModelConfig, int]:
    """Return the bytes of one layer's parameters on one device, from leaves [chunks, ranks@pipe, layers, ...]."""
    found, stages = {}, setup.model.params.stages
    for kind in layer_kinds(setup.config.model):
        total = 0
        for leaf in jax.tree.leaves(stages[kind.name] if kind.name else stages):
            chunks, _, slots = leaf.shape[:3]
            own = leaf.sharding.shard_shape(leaf.shape)
            total += leaf.dtype.itemsize * math.prod(own) // (chunks * slots)
        found[kind.config] = total
    return found


def _count_ends(setup: Setup, stage: int) -> tuple[int, int]:
    """Return the number of parameters of embedding and head at a stage, and their bytes on each of its devices."""
    config, sizes = setup.config.model, setup.sizes
    counts, last = param_counts(config), setup.schedule.num_stages - 1
    table = counts.embedding
    # Frozen tables are in the compute dtype; a table may be padded for the mesh.
    held = setup.model.params.shared["embed"]["table"]
    table_bytes = device_bytes([held])
    is_untied = config.embeddings == "untied"
    norm = counts.head - (table if is_untied else 0)
    whole = (counts.positions if stage == 0 else 0) + (norm if stage == last else 0)
    if setup.config.pipeline.vocab == "split":
        # Every rank has an equal part of the tables, counted with its first stage.
        num_tables = (2 if is_untied else 1) if stage < sizes.pipe else 0
        return whole + table * num_tables // sizes.pipe, _PARAM_BYTES * whole + table_bytes * num_tables
    own = table if stage == 0 or (stage == last and is_untied) else 0
    # A tied table is one parameter, but takes memory at the last stage as well, unless one rank holds both ends.
    is_shared = not is_untied and setup.placement.rank_of(0) == setup.placement.rank_of(last)
    is_used = stage == 0 or (stage == last and not is_shared)
    return whole + own, _PARAM_BYTES * whole + table_bytes * is_used


def ranks_of_ends(setup: Setup) -> dict[str, list[int]]:
    """Return the ranks that hold the embedding, and those that hold the head.

    A vocabulary split over pipe is on all ranks. Whole tables are on the ranks of the first and of the last stage,
    which are one rank in a V.
    """
    if setup.config.pipeline.vocab == "split":
        return {end: list(range(setup.sizes.pipe)) for end in ("embedding", "head")}
    stages = {"embedding": 0, "head": setup.schedule.num_stages - 1}
    return {end: [setup.placement.rank_of(stage)] for end, stage in stages.items()}


def _write_notes(setup: Setup, *, kept: dict[ModelConfig, int]) -> tuple[str, ...]:
    slots = max(simulate(setup.schedule).peak_in_flight)
    counts = layers_by_kind(setup.config.model, setup.layers_per_stage)
    most = {kind: max(counts[kind.name]) for kind in layer_kinds(setup.config.model)}
    layers = " and ".join(f"{count}{' dense' * (kind.name == DENSE)}" for kind, count in most.items())
    total = slots * sum(count * kept[kind.config] for kind, count in most.items())
    room = (
        f"One program runs on all ranks, so every device has room for {layers} layers a stage and {slots} in flight, "
        f"{total:,} bytes of activations"
    )
    if setup.config.pipeline.vocab == "split":
        part = f"1/{setup.sizes.pipe} of embedding and head"
        notes = (f"{room}.", f"Every rank holds {part}, whose time is no stage's: all ranks share it.")
    else:
        notes = (f"{room}, and for embedding and head, wherever they are used.", _place_ends(setup))
    if (narrow := setup.config.model.matmuls) != "plain":
        notes += (f"Time counts products in {narrow} as 16-bit ones: layers take less of it than is said.",)
    return notes


def _place_ends(setup: Setup) -> str:
    """Say which rank holds embedding and head, whole tables."""
    (embedding,), (head,) = ranks_of_ends(setup).values()
    if embedding == head:
        return f"Embedding and head are on rank {embedding}."
    return f"The embedding is on rank {embedding}, the head on rank {head}."
