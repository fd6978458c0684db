"""The traits of a training runtime that determine the cost of a layout: how it keeps time, overlaps and stores.

trellax compiles one program for all ranks; Megatron runs an eager program on each. One cost model prices both: it asks
for these traits and never for the name of a runtime. Read `step_time.py` and `memory_model.py` for where they enter.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ...layers import ModelConfig
from ...layers.lora.linears import adapted_names
from ...meshes import PlanError
from ...meshes.arguments import check_choice, check_fields
from ...meshes.device_kind import is_hopper_or_later
from ...schedules import Clock, Vocab
from ..machines.kernel_time import FlashKernel
from ..machines.topology import Accelerator
from .product_format import FORMATS, FormatName, ProductFormat

OnOff = Literal["on", "off"]
"""Whether a runtime has a trait."""

ChunkOrder = Literal["paired", "run-ahead"]
"""Order of interleaved 1F1B: a forward paired with a backward in each tick, or forwards that run ahead.

Running ahead hides the time that results travel between separate programs (Narayanan et al. 2021, section 2.2).
"""


AdaptedLayers = tuple[tuple[str, ...], ...]
"""Linear layers by their names in `layers/lora`; those that are one product in a runtime share one adapter."""


@dataclass(frozen=True, kw_only=True)
class OrderTraits:
    """The traits of a runtime that determine the order of actions; a small key under which schedules are cached."""

    clock: Clock
    vocab: Vocab
    chunk_order: ChunkOrder
    pair_overlap: OnOff


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Traits of a training runtime; the defaults are trellax's.

    Args:
        clock: one lockstep program for all ranks, or one asynchronous program per rank; see `simulate`.
        vocab: placement of embedding and head; see `split_transformer`.
        chunk_order: order of interleaved 1F1B; see `ChunkOrder`.
        pair_overlap: runs a forward and a backward of all ranks in one loop body, with messages beside products, and
            holds one microbatch more.
        attention: whether the core of attention stores its scores in memory or is one fused kernel.
        score_bytes: bytes of one stored score.
        flash: implementation of the fused kernel.
        dropout: whether masks are stored and applied.
        sequence_parallel: splits norms and residuals over tensor too (Korthikanti et al. 2022, section 4.2.2).
        tensor_overlap: hides collectives of the input gradient behind the weight gradient.
        data_overlap: hides the reduction of gradients behind the backward.
        shard_overlap: hides all-gathers of sharded parameters. Where it is off, they also use one network adapter per
            node, as DeepSpeed's ZeRO-3 did (Narayanan et al. 2021, Table 2).
        blocking_hops: whether a rank waits while it sends or receives, so that hops count as its own working time.
        scatter_hops: sends 1/tensor of an activation between stages and gathers it again (the same, section 4.1).
        residuals: whose layers decide the residuals of the backward: trellax's, or Megatron's list of tensors
            (Korthikanti et al. 2022, section 4).
        products: number format of products of layers with weights.
        cast_layouts: layouts in which a cast is stored: XLA's products read the one, TransformerEngine's one for each.
        gathers: whether collectives over tensor gather activations before their cast, or after it.
        adapter_rank: rank of the adapters that are trained beside frozen weights; 0 if all weights are trained.
        adapted: layers with an adapter by their names, or ends of these; those together that share one.
        weight_casts: whether weights are cast to it once a step, or for every microbatch.
        logits: whether the loss holds the logits of all tokens of a microbatch, or of one chunk of them at a time.
        loss_bytes: bytes that the loss holds of each logit; 0 for a fused kernel's, float32 and the gradient.
        weight_copies: whether a step makes copies of the weights in the form that its loops over layers read.
        workspace_bytes: memory of a device that libraries allocate for themselves.
        weight_bytes, optimizer_state_bytes: bytes per parameter that stay in memory.
        kernel_saving_bytes: how many fewer those of the optimizer are for kernels of layers: 4 for Muon's one moment.
        gradient_bytes: bytes per parameter of the accumulated gradient, in memory and in its reduction.
        fresh_gradient_bytes: bytes per parameter of a microbatch's own gradient, if it is stored beside the sum.
        sum_traffic_bytes: memory traffic per weight of adding a microbatch's gradient to the sum.
        gradient_sums: whether that is an operation of its own, or the end of each product, beside arithmetic.
        optimizer_bytes: memory traffic per parameter of an optimizer step.
        host_layer_s: least seconds of a layer's forward where a host launches its kernels one by one.
        host_gap_s: seconds in which a device waits for its host in a layer's forward and backward.
        node_wait: share by which stages slow down each time the nodes double, where all meet in every layer.

    Raises:
        PlanError: a number is negative, or a trait is not one of its choices.
    """

    clock: Clock = "lockstep"
    vocab: Vocab = "split"
    chunk_order: ChunkOrder = "paired"
    pair_overlap: OnOff = "off"
    attention: Literal["scores", "fused"] = "scores"
    score_bytes: int = 4
    flash: FlashKernel = "vendor"
    dropout: OnOff = "off"
    sequence_parallel: OnOff = "off"
    tensor_overlap: OnOff = "off"
    data_overlap: OnOff = "off"
    shard_overlap: OnOff = "on"
    blocking_hops: OnOff = "off"
    scatter_hops: OnOff = "off"
    residuals: Literal["trellax", "megatron"] = "trellax"
    products: FormatName = "plain"
    weight_casts: Literal["step", "microbatch"] = "microbatch"
    cast_layouts: int = 1
    gathers: Literal["wide", "cast"] = "wide"
    adapter_rank: int = 0
    adapted: AdaptedLayers = ()
    logits: Literal["chunked", "whole"] = "chunked"
    loss_bytes: int = 0
    weight_copies: OnOff = "on"
    workspace_bytes: int = 0
    # trellax keeps float32 parameters, two moments and a sum of gradients; adding to it reads two numbers, writes one.
    weight_bytes: int = 4
    optimizer_state_bytes: int = 8
    kernel_saving_bytes: int = 0
    gradient_bytes: int = 4
    fresh_gradient_bytes: int = 0
    sum_traffic_bytes: int = 12
    gradient_sums: Literal["apart", "in-product"] = "apart"
    optimizer_bytes: int = 32
    host_layer_s: float = 0.0
    host_gap_s: float = 0.0
    node_wait: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError, least=0)

    @property
    def product_format(self) -> ProductFormat:
        """The number format of products with weights."""
        return FORMATS[self.products]

    @property
    def order_traits(self) -> OrderTraits:
        """The traits that determine the order of actions."""
        return OrderTraits(
            clock=self.clock, vocab=self.vocab, chunk_order=self.chunk_order, pair_overlap=self.pair_overlap
        )


TRELLAX = Runtime(pair_overlap="on", sequence_parallel="on")
"""The step that trellax compiles where attention is not fused: lockstep, the vocabulary split over pipe x tensor, and
activations between layers over tensor.

Attention scores are stored in float32. `trellax_runtime` returns the traits for a model on an accelerator.
"""

MEGATRON_2021 = Runtime(
    clock="async",
    vocab="ends",
    chunk_order="run-ahead",
    score_bytes=2,
    dropout="on",
    blocking_hops="on",
    scatter_hops="on",
    residuals="megatron",
    weight_casts="step",
    cast_layouts=2,
    gathers="cast",
    logits="whole",
    weight_copies="off",
    workspace_bytes=1 << 28,
    # 16-bit weights; the optimizer has a float32 copy of them and two moments.
    weight_bytes=2,
    optimizer_state_bytes=12,
    gradient_bytes=2,
    sum_traffic_bytes=12,
    optimizer_bytes=30,
    host_layer_s=0.85e-3,
)
"""Megatron-LM as of Narayanan et al. 2021 and its DeepSpeed fork: eager, unfused attention, dropout, no overlap.

The optimizer's traffic of 30 bytes per parameter is Adam's 28 and the 16-bit weight. The 240 rows of two GPUs in vTrain
show 30.0 to 31.0, by width and tensor: it is what a layer adds to a step whatever the number of microbatches.
"""

MEGATRON = replace(
    MEGATRON_2021, tensor_overlap="on", sum_traffic_bytes=8, gradient_sums="in-product", optimizer_bytes=64
)
"""Megatron-LM since Korthikanti et al. 2022: collectives behind weight gradients, gradients summed inside products.

The optimizer's traffic per parameter: gradients cleared, copied, unscaled, measured and clipped 30, Adam 28, weights 6.
"""

QKV_ADAPTED: AdaptedLayers = (("query", "key", "value"),)
ALL_ADAPTED: AdaptedLayers = (*QKV_ADAPTED, ("out",), ("gate", "up"), ("down",))
"""What NeMo adapts: the product of queries, keys and values alone, or all products of a layer."""

_FUSED_ON = ("a100", "h100", "h200", "h20", "gh200", "b200", "b300", "gb200", "gb300", "l40s", "rtx")
"""Accelerators, by the beginning of their key, on which trellax runs cuDNN's flash attention."""


def trellax_runtime(
    model: ModelConfig,
    accelerator: Accelerator,
    *,
    vocab: Vocab = "split",
    sequence: OnOff = "on",
    average: OnOff = "off",
) -> Runtime:
    """Return the traits of the step that trellax compiles for a model on an accelerator.

    Attention is one fused kernel (cuDNN's) if `model.attention` allows it, the model's shapes suit the kernel, and the
    accelerator has it; else its scores are stored in memory.

    >>> trellax_runtime(llama, read_topology("h100x8").accelerator).attention
    'fused'

    Args:
        vocab: placement of embedding and head, `pipeline.vocab` in a config.
        sequence: whether tokens are split over tensor between layers, where `mesh.sequence` is not off.
        average: whether an average of the weights is kept, `train.ema`, in float32 beside the moments.

    Raises:
        PlanError: `vocab` or `average` is not one of its choices.
    """
    check_choice("average", average, get_args(OnOff), error=PlanError)
    averaged = 4 if average == "on" else 0
    return replace(
        TRELLAX,
        vocab=vocab,
        sequence_parallel=sequence,
        attention="fused" if _is_fused(model, accelerator.key) else "scores",
        # Each device scales its blocks by their own largest values (`../../layers/product.py`); a program for H200 has
        # a maximum and a cast for each factor, and products in 8 bits that read one layout.
        products="fp8-current" if model.matmuls == "fp8" else "plain",
        optimizer_state_bytes=TRELLAX.optimizer_state_bytes + averaged,
        # Read and written once a step.
        optimizer_bytes=TRELLAX.optimizer_bytes + 2 * averaged,
        **_adapter_traits(model),
    )


def _is_fused(model: ModelConfig, key: str) -> bool:
    """Return whether attention is one kernel on the accelerator with this key."""
    suits = model.attention != "xla" and model.can_be_fused and key.startswith(_FUSED_ON)
    return suits and (is_hopper_or_later(key) or not model.has_wide_heads)


def _adapter_traits(model: ModelConfig) -> dict[str, Any]:
    if not model.lora_rank:
        return {}
    adapted = tuple((name,) for name in adapted_names(model))
    # Frozen kernels and tables are kept in the compute dtype.
    return {"adapter_rank": model.lora_rank, "adapted": adapted, "weight_bytes": 4 if model.dtype == "float32" else 2}
