"""How a step is laid out: axis sizes, schedule, microbatches, rematerialisation; and all ways that are legal.

Read `layer_time.py` next.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...layers import ModelConfig
from ...meshes import MeshSpec, PlanError
from ...meshes.arguments import check_fields

PlanRemat = Literal["none", "selective", "dots", "full"]
"""What backward recomputes: trellax's policies, and Megatron's "selective", the core of attention alone."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a step. Devices are numbered with tensor fastest, then context, data (with fsdp), and pipe slowest.

    `sequences` are those of one microbatch on one data shard. `zero` splits over data: 0 nothing, 1 the optimizer
    state, 3 parameters and gradients too (with the `fsdp` axis that is always so). `context` splits each sequence.
    `layers_per_stage` None stands for stages as even as can be. `max_in_flight` limits the microbatches that a rank
    holds under schedule "auto"; None is no limit.

    Raises:
        PlanError: a size is below 1, or a word is no choice.
    """

    data: int = 1
    tensor: int = 1
    pipe: int = 1
    context: int = 1
    fsdp: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    microbatches: int = 1
    sequences: int = 1
    remat: PlanRemat = "none"
    zero: Literal[0, 1, 3] = 0
    layers_per_stage: tuple[int, ...] | None = None
    max_in_flight: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError)

    @property
    def mesh(self) -> MeshSpec:
        """The mesh of trellax's three axes."""
        return MeshSpec(data=self.data * self.fsdp * self.context, tensor=self.tensor, pipe=self.pipe)

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return self.data * self.tensor * self.pipe * self.context * self.fsdp

    @property
    def replicas(self) -> int:
        """Shards of the batch: devices that work on different sequences with the same parameters."""
        return self.data * self.fsdp

    @property
    def batch_size(self) -> int:
        """Sequences of one step."""
        return self.replicas * self.microbatches * self.sequences

    @property
    def is_backward_split(self) -> bool:
        """Whether backwards run in two halves: "auto" nearly always does, unless one half recomputes whole layers."""
        return self.schedule.endswith("zb-h1") or (self.schedule == "auto" and self.remat != "full")

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.pipe * self.chunks


def legal_meshes(
    model: ModelConfig, *, num_devices: int, vocab: Literal["split", "ends"] = "split"
) -> Iterator[MeshSpec]:
    """Yield every mesh of so many devices that the model's heads, features, vocabulary and layers split over."""
    for tensor in _divisors(num_devices):
        if model.num_heads % tensor or model.ffn_size % tensor or not _splits_kv(model, tensor):
            continue
        for pipe in _divisors(num_devices // tensor):
            parts = tensor * (pipe if vocab == "split" and pipe > 1 else 1)
            if pipe <= model.num_layers and model.vocab_size % parts == 0:
                yield MeshSpec(data=num_devices // (tensor * pipe), tensor=tensor, pipe=pipe)


def legal_layouts(
    model: ModelConfig, *, num_devices: int, batch_size: int, remats: tuple[PlanRemat, ...] = ("none", "dots", "full")
) -> Iterator[Layout]:
    """Yield the layouts of a training step that are worth a price, all of which trellax runs on so many devices.

    Microbatches hold a power of two of sequences, or all of a shard's; schedules are 1F1B and ZB-H1, with chunks of
    layers (2 or 4 a rank) or without.
    """
    for mesh in legal_meshes(model, num_devices=num_devices):
        if batch_size % mesh.data:
            continue
        shard = batch_size // mesh.data
        for sequences in _divisors(shard):
            if sequences & (sequences - 1) and sequences != shard:
                continue
            for schedule, chunks in _schedules(model, pipe=mesh.pipe, microbatches=shard // sequences):
                for remat in remats:
                    for zero in (0, 1) if mesh.data > 1 else (0,):
                        yield Layout(
                            data=mesh.data,
                            tensor=mesh.tensor,
                            pipe=mesh.pipe,
                            schedule=schedule,
                            chunks=chunks,
                            microbatches=shard // sequences,
                            sequences=sequences,
                            remat=remat,
                            zero=zero,
                        )


def _schedules(model: ModelConfig, *, pipe: int, microbatches: int) -> Iterator[tuple[str, int]]:
    yield "1f1b", 1
    if pipe == 1:
        return
    yield "zb-h1", 1
    for chunks in (2, 4):
        if pipe * chunks > model.num_layers:
            continue
        # A last group of fewer microbatches than ranks leaves turns of every chunk empty.
        if microbatches % pipe == 0:
            yield "interleaved-1f1b", chunks
        # What it gains is bubble, of which there is little where microbatches are many.
        if 1 < microbatches <= 2 * pipe:
            yield "interleaved-zb-h1", chunks


def _splits_kv(model: ModelConfig, tensor: int) -> bool:
    return model.num_kv_heads % tensor == 0 or tensor % model.num_kv_heads == 0


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
