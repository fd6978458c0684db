"""What kind of program runs a layout: the traits that decide its cost and that no layout names.

trellax compiles one program for all ranks; Megatron runs an eager program on each. Both are priced by one model.
Read `layouts.py` next.
"""

from dataclasses import dataclass, replace
from typing import Literal

from ...layers import ModelConfig
from ...meshes import PlanError
from ...meshes.arguments import check_fields
from ...pipeline.schedules import Clock, Vocab
from ..machines.efficiency import FlashKernel
from ..machines.topology import Accelerator

Switch = Literal["on", "off"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """Traits of a training program.

    `clock` and `vocab` as in `trellax.pipeline`; `attention` keeps all scores in memory or none.
    `sequence_parallel` splits norms and residuals over tensor too (Korthikanti et al. 2022, section 4.2.2).
    Hidden are, where they are on: with `tensor_overlap` collectives of the input gradient behind the weight gradient,
    with `pipe_overlap` hops behind other microbatches, with `data_overlap` sums of gradients behind the backward, with
    `shard_overlap` gathers of sharded parameters; where that is off they also use one adapter of a node, as
    DeepSpeed's ZeRO-3 did (Narayanan et al. 2021, Table 2).
    `scatter_hops` sends 1/tensor of an activation and gathers it again (the same, section 4.1).
    `host_layer_s` is the least that a forward of a layer takes when a host starts its operations one by one.
    `gradient_bytes` are those of one number in the sum over data, `fresh_gradient_bytes` those of a microbatch's own
    gradient that stays in memory beside it, `sum_traffic_bytes` what adding a microbatch's gradient moves for a weight,
    `optimizer_bytes` what a step moves for a parameter.
    """

    clock: Clock = "lockstep"
    vocab: Vocab = "split"
    attention: Literal["scores", "fused"] = "scores"
    score_bytes: int = 4
    flash: FlashKernel = "vendor"
    dropout: Switch = "off"
    sequence_parallel: Switch = "off"
    tensor_overlap: Switch = "off"
    pipe_overlap: Switch = "off"
    data_overlap: Switch = "off"
    scatter_hops: Switch = "off"
    shard_overlap: Switch = "on"
    gradient_bytes: int = 4
    fresh_gradient_bytes: int = 0
    sum_traffic_bytes: int = 12
    optimizer_bytes: int = 32
    host_layer_s: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError, least=0)


TRELLAX = Program()
"""The step that trellax compiles: lockstep, the vocabulary split over pipe x tensor, scores in float32.

Where attention is fused `trellax_program` says so.
"""

MEGATRON_2021 = Program(
    clock="async",
    vocab="ends",
    score_bytes=2,
    dropout="on",
    scatter_hops="on",
    gradient_bytes=2,
    sum_traffic_bytes=12,
    optimizer_bytes=30,
    host_layer_s=0.85e-3,
)
"""Megatron-LM as of Narayanan et al. 2021 and its DeepSpeed fork: eager, unfused attention, dropout, nothing hidden.

The optimizer's 30 bytes a parameter are Adam's 28 and the 16-bit weight: what vTrain's 240 rows of two GPUs show, 30.0
to 31.0 by width and tensor, in what a layer adds to a step whatever the number of microbatches.
"""

MEGATRON = replace(MEGATRON_2021, tensor_overlap="on", sum_traffic_bytes=8, optimizer_bytes=64)
"""Megatron-LM since Korthikanti et al. 2022: collectives behind weight gradients, gradients summed inside products.

The optimizer's bytes a parameter: gradients cleared, copied, unscaled, measured and clipped 30, Adam 28, weights 6.
"""

_FUSED_ON = ("a100", "h100", "h200", "b200", "gb200", "l40s", "rtx4090")
"""Accelerators, by the beginning of their key, on which trellax runs cuDNN's flash attention."""


def trellax_program(model: ModelConfig, accelerator: Accelerator, *, vocab: Vocab) -> Program:
    """Return the traits of the step that trellax compiles for a model on some devices."""
    is_fused = model.attention != "xla" and model.can_be_fused and accelerator.key.startswith(_FUSED_ON)
    return replace(TRELLAX, vocab=vocab, attention="fused" if is_fused else "scores")
