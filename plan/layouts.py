"""How a step is laid out: axis sizes, schedule, microbatches, rematerialisation. Read `layer_time.py` next."""

from dataclasses import dataclass
from typing import Literal

from ..meshes import MeshSpec

PlanRemat = Literal["none", "selective", "dots", "full"]
"""What backward recomputes: trellax's policies, and Megatron's "selective", the core of attention alone."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a step. Devices are numbered with tensor fastest, then context, data (with fsdp), and pipe slowest.

    `sequences` are those of one microbatch on one data shard. `zero` splits over data: 0 nothing, 1 the optimizer
    state, 3 parameters and gradients too (with the `fsdp` axis that is always so). `context` splits each sequence.
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
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.pipe * self.chunks
