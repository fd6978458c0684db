"""Find the traits of a published row's runtime: number format, attention, overlap, what is kept in memory.

They follow from what rows state: the kind of attention, dropout with unfused attention, sharded optimizers by their
names. Read `training_case.py` first, which calls this.
"""

import re
from dataclasses import replace
from typing import Any

from trellax.plan.costs.product_format import FormatName
from trellax.plan.costs.runtime import ALL_ADAPTED, MEGATRON, MEGATRON_2021, QKV_ADAPTED, OnOff, Runtime
from trellax.plan.machines.kernel_time import FlashKernel
from trellax.plan.machines.topology import Accelerator

from .rows import PublishedRow

# Where a row does not state it: Megatron-Bridge's recipes adapt queries, keys and values alone, with rank 16
# (`scripts/performance/configs/llama/llama3_llm_finetune.py`).
_ADAPTER_RANK = 16
# Of eager code that gathers every layer's weights: fitted on MosaicML's rows of A100, as many ms on 40 GB and 80 GB.
_EAGER_GAP_S, _EAGER_NODE_WAIT = 3.0e-3, 0.015
_MODERN = ("h100", "h200", "h20", "gh200", "b200", "b300", "gb200", "gb300", "mi3")
# By the first that a text has; "FP8" alone was delayed scaling, TransformerEngine's default.
_FORMATS: tuple[tuple[str, FormatName], ...] = (
    (r"current|tensorwise|rowwise|linears|-cs\b|_cs\b", "fp8-current"),
    (r"nvfp4|(?:fp|float)4", "nvfp4"),
    (r"mxfp8|-mx\b|_mx\b", "mxfp8"),
    (r"block|subchannel|-sc\b|_sc\b", "fp8-block"),
    (r"(?:fp|float)8", "fp8-delayed"),
)


def stated_format(row: PublishedRow) -> FormatName:
    """Return the number format of products with weights that a row's precision names."""
    text = str(row.inputs.get("precision", "")).lower()
    # "FP8-CS (FP8-MX)" names a second measurement in parentheses.
    first = text.partition("(")[0]
    if not re.search(r"(?:fp|float)[48](?!\d)", text):
        return "plain"
    return next((name for pattern, name in _FORMATS if re.search(pattern, first)), "fp8-delayed")


def adapter_rank(row: PublishedRow) -> int:
    """Return the rank of adapters that a step trains; 0 if it trains all weights."""
    inputs = row.inputs
    if not any("lora" in str(inputs.get(name, "")).lower() for name in ("task", "peft", "finetuning")):
        return 0
    return int(inputs.get("lora_rank", inputs.get("adapter_rank", _ADAPTER_RANK)))


def is_modern(row: PublishedRow, accelerator: Accelerator) -> bool:
    """Return whether attention is fused: where it is stated, else on Hopper and later, with Llama shapes, with FSDP."""
    inputs = row.inputs
    stated = str(inputs.get("attention", ""))
    is_new = accelerator.key.startswith(_MODERN) or "swiglu" in str(inputs.get("mlp")) or bool(inputs.get("fsdp_only"))
    return "unfused" not in stated and (is_new or "flash" in stated)


def _loss_bytes(row: PublishedRow) -> int:
    """Return the bytes that the loss holds of each logit; 0 for a fused kernel, where a source states one, or XLA.

    Megatron's loss, which nanotron took over, has the logits in 16 bits and in float32, their softmax, which becomes
    the gradient in place, and its cast; PyTorch's has another float32 array for the gradient.
    """
    framework = str(row.inputs.get("framework", ""))
    if "fused cross entropy" in row.notes or "JAX" in framework:
        return 0
    return 16 if row.inputs.get("fsdp_only") else 12


def is_recent(row: PublishedRow) -> bool:
    """Return whether a row was measured on an NVIDIA accelerator of the H100's generation or later."""
    return re.match(r"(?:NVIDIA )?(?:DGX[- ])?(?:G?[HB]\d00|H20)", str(row.inputs.get("gpu", ""))) is not None


def row_runtime(row: PublishedRow, accelerator: Accelerator) -> Runtime:
    """Return the traits that a row states or implies; fused attention came with Llama shapes, FSDP and Hopper.

    Collectives behind weight gradients came to Megatron with sequence parallelism; torchtitan's have nothing beside
    them unless the compiler takes their products apart, "async_tp".
    """
    inputs = row.inputs
    is_fused = is_modern(row, accelerator)
    is_overlapped = inputs.get("comm_overlap", True)
    precision = str(inputs.get("precision", ""))
    products = stated_format(row)

    def switch(value: object) -> OnOff:
        return "on" if value else "off"

    found = replace(
        MEGATRON if is_fused or row.has_sequence_parallel else MEGATRON_2021,
        attention="fused" if is_fused else "scores",
        flash=_flash_kernel(row),
        dropout=switch(not is_fused),
        sequence_parallel=switch(inputs.get("seq_parallel", is_fused and inputs.get("tp", 1) > 1)),
        tensor_overlap=switch(inputs.get("async_tp", is_overlapped and (is_fused or row.has_sequence_parallel))),
        blocking_hops=switch(not (is_fused and is_overlapped and inputs.get("vpp", 1) > 1)),
        data_overlap=switch(
            inputs.get("grad_reduce_overlap", inputs.get("ddp") == "torch" or (is_fused and is_overlapped))
        ),
        shard_overlap=switch("DeepSpeed" not in str(inputs.get("schedule"))),
        scatter_hops=switch(inputs.get("scatter_gather", True)),
        gradient_bytes=4 if "fp32 grad" in precision else 2,
        products=products,
        loss_bytes=_loss_bytes(row),
        adapter_rank=adapter_rank(row),
        adapted=ALL_ADAPTED if "all" in str(inputs.get("lora_targets", "")) else QKV_ADAPTED,
        weight_casts="microbatch" if inputs.get("fsdp", 1) > 1 else "step",
    )
    return replace(found, **{**_stored_traits(row), **_sharded_traits(row)})


def _stored_traits(row: PublishedRow) -> dict[str, Any]:
    """Return the traits of optimizers that keep more of a gradient than its sum."""
    traits: dict[str, Any] = {}
    if "fp32 gradient accumulation" in str(row.inputs.get("precision", "")):
        # A float32 sum is stored beside the 16-bit gradient, and added to after each product; else products add to it.
        traits |= {"fresh_gradient_bytes": 2, "gradient_sums": "apart", "sum_traffic_bytes": 2 + 4 + 4}
    if "Megatron-DeepSpeed" in f"{row.notes} {row.inputs.get('framework')}":
        # 12 of float32 weights and moments, and of its part's gradients a 16-bit and a float32 copy
        # (deepspeed/runtime/zero/stage_1_and_2.py).
        traits["optimizer_state_bytes"] = 12 + 2 + 4
    return traits


def _flash_kernel(row: PublishedRow) -> FlashKernel:
    """Return the kernel of fused attention: PyTorch has FlashAttention 2 since 2.2, before FSDP2."""
    if not row.inputs.get("fsdp_only") or "JAX" in str(row.inputs.get("framework")):
        return "vendor"
    return "flash2" if "FSDP2" in str(row.inputs.get("framework")) else "portable"


def _sharded_traits(row: PublishedRow) -> dict[str, Any]:
    """Return the traits of PyTorch's FSDP, eager code that copies a layer's gradients on the way to their reduction.

    Weights and gradients are float32 shards. Each microbatch's gradient of a parameter is written, and bytes are moved:

        FSDP     4 concatenated into a flat one, 6 cast, 8 divided before the sum; in 16 bits 4 + 4
                 (torch/distributed/fsdp/_runtime_utils.py, `_post_backward_hook`; default_hooks.py)
        FSDP2    6 cast into a flat one, and twice 4 to copy gathered weights out of theirs
                 (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py)
    """
    is_xla = "JAX" in str(row.inputs.get("framework")) or "TPU" in str(row.inputs.get("gpu"))
    if not row.inputs.get("fsdp_only") or is_xla:
        return {}
    # Composer's "DEFAULT" reduces in float32, "PURE" in 16 bits (`composer/distributed/mosaic_fsdp.py`).
    is_wide = row.inputs.get("mp_mode", "DEFAULT") == "DEFAULT"
    is_second = "FSDP2" in str(row.inputs.get("framework"))
    # What is compiled has few launches; products in 8 bits of FSDP2's time are, for torchao's casts need it.
    is_compiled = row.inputs.get("compile", is_second and stated_format(row) != "plain")
    eager = {} if is_compiled else {"host_gap_s": _EAGER_GAP_S, "node_wait": _EAGER_NODE_WAIT}
    moved = 14 if is_second else 18 if is_wide else 8
    return {
        "weight_bytes": 4,
        "optimizer_state_bytes": 8,
        "gradient_bytes": 4 if is_wide else 2,
        "sum_traffic_bytes": moved,
        "gradient_sums": "apart",
        **eager,
    }
