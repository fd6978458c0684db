"""The layout of a step: axis sizes, schedule, microbatches and rematerialization. Read `runtime.py` next."""

from dataclasses import dataclass
from typing import Literal

from ...layers import ModelConfig
from ...layers.context.choice import ContextAttention, Way, choose_context_attention
from ...meshes import Axis, MeshSpec, PlanError
from ...meshes.arguments import check_fields
from ...meshes.axes import Role
from ...meshes.divisibility import check_divides
from ...meshes.spec import SHARDS, Offload, Shard
from ...schedules import Family, find_family

ZeroStage = Literal[0, 1, 2, 3]
"""What is split over data: 0 nothing, 1 the optimizer state, 2 parameters too, gathered once a step, 3 gradients."""

ZERO_STAGES: dict[Shard, ZeroStage] = {"none": 0, "optimizer": 1, "step": 2, "chunk": 3, "layer": 3}

LateGather = Literal["chunk", "layer"]
"""When a rank gathers weights that it does not gather once a step: for each run of a chunk, or layer by layer."""

PlanRemat = Literal["none", "selective", "dots", "full"]
"""Rematerialization in the backward: trellax's policies, and Megatron's "selective", the core of attention only."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a step. Devices are numbered with tensor fastest, then context, data (with fsdp), and pipe slowest.

    Args:
        context: devices that share each sequence.
        context_attention: how they attend to each other's tokens; "auto" is what sends less.
        expert: ranks of data x context that split the experts together.
        context_expert: how many of these are context ranks, the nearest ones; the others are data shards.
        fsdp: data shards that split parameters, gradients and optimizer state too.
        sequences: sequences of one microbatch on one data shard.
        zero: what is split over data: 0 nothing, 1 the optimizer state, 2 parameters too, gathered once a step, 3
            gradients too.
        gathers: with zero=3, whether parameters are gathered by every layer, or for each run of actions of a chunk.
        offload: what is kept in the memory of the host.
        layers_per_stage: layers of every stage; None for stages as even as possible.
        max_in_flight: limit of microbatches on a rank for a schedule that is searched for; None is no limit.

    Raises:
        PlanError: a size is below 1, or `remat` or `zero` is unknown.
    """

    data: int = 1
    tensor: int = 1
    pipe: int = 1
    context: int = 1
    context_attention: ContextAttention = "auto"
    fsdp: int = 1
    expert: int = 1
    context_expert: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    microbatches: int = 1
    sequences: int = 1
    remat: PlanRemat = "none"
    zero: ZeroStage = 0
    gathers: LateGather = "layer"
    offload: Offload = "none"
    layers_per_stage: tuple[int, ...] | None = None
    max_in_flight: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError)
        of_both, error = self.context_expert, PlanError
        check_divides("context", self.context, over="context_expert", parts=of_both, error=error)
        check_divides("expert", self.expert, over="context_expert", parts=of_both, error=error)
        over = "expert" if of_both == 1 else "expert / context_expert"
        check_divides("data", self.data, over=over, parts=self.data_expert, error=error)

    @property
    def shard(self) -> Shard:
        """What is split over data, as `train.shard` names it."""
        return self.gathers if self.zero == 3 else SHARDS[self.zero]

    @property
    def splits_gradients(self) -> bool:
        """Whether gradients are split over data as they are made, and parameters gathered more than once a step."""
        return self.fsdp > 1 or self.zero == 3

    @property
    def update_shards(self) -> int:
        """Number of devices over data and context that moments and the update of a parameter are split over."""
        return self.replicas * self.context if self.zero or self.fsdp > 1 else 1

    @property
    def data_expert(self) -> int:
        """Data shards among the ranks that split the experts."""
        return self.expert // self.context_expert

    @property
    def expert_stride(self) -> int:
        """Devices from one of a group that splits the experts to the next: as if all were as far apart."""
        return self.tensor * (self.context // self.context_expert if self.data_expert > 1 else 1)

    @property
    def mesh(self) -> MeshSpec:
        """The mesh of trellax's axes, of experts and context those with several devices; data includes fsdp."""
        more: dict[Role, int] = {
            "expert": self.data_expert,
            "context": self.context // self.context_expert,
            "context_expert": self.context_expert,
        }
        axes: dict[str, Axis] = {role: Axis(size, role=role) for role, size in more.items() if size > 1}
        data = self.data // self.data_expert * self.fsdp
        return MeshSpec(data=data, tensor=self.tensor, pipe=self.pipe, axes=axes)

    def way_to_attend(self, model: ModelConfig) -> Way:
        """Return how context ranks attend to each other's tokens."""
        sizes = {"tensor": self.tensor, "context": self.context}
        return choose_context_attention(model, remat=self.remat, asked=self.context_attention, **sizes)

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return self.data * self.tensor * self.pipe * self.context * self.fsdp

    @property
    def replicas(self) -> int:
        """Number of data shards: devices that process different sequences with the same parameters."""
        return self.data * self.fsdp

    @property
    def batch_size(self) -> int:
        """Sequences of one step."""
        return self.replicas * self.microbatches * self.sequences

    @property
    def is_backward_split(self) -> bool:
        """Whether backwards are split into input and weight gradient.

        A family that may do either nearly always splits, unless the input gradient recomputes whole layers.
        """
        backward = self.family.backward
        return backward == "split" or (backward == "either" and self.remat != "full")

    @property
    def family(self) -> Family:
        """The family of the schedule.

        Raises:
            ScheduleError: no schedule has this name.
        """
        return find_family(self.schedule)

    @property
    def num_stages(self) -> int:
        """Number of stages of the pipeline."""
        return self.pipe * self.chunks
