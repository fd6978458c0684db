"""Describe Qwen 3 with a mixture of experts in every layer."""

from collections.abc import Iterator
from typing import Any

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Values
from .experts import expert_tensors, find_unsupported_experts, resolve_experts
from .llama_family import BIASES, LLAMA_SIZES, LlamaFamily

_SIZES = LLAMA_SIZES | {
    "expert_size": "moe_intermediate_size",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
}


def _resolve(values: Values, warnings: list[str]) -> dict[str, Any]:
    defaults = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    return resolve_experts(values, warnings, names=("num_local_experts", "num_experts"), defaults=defaults)


def _window_of_layer(values: Values, _layer: int) -> int:
    """Return the window of all layers: transformers 5 reads neither `layer_types` nor `max_window_layers` here."""
    return (values.get("sliding_window", 4096) or 0) if values.get("use_sliding_window") else 0


def _refuse(values: Values) -> Iterator[str]:
    if values.get("attention_bias"):
        yield f"attention_bias=true; {BIASES}"
    if (step := values.get("decoder_sparse_step", 1)) != 1:
        yield f"decoder_sparse_step={shown(step)}; only 1, experts in every layer, is"
    if layers := values.get("mlp_only_layers"):
        yield f"mlp_only_layers={shown(layers)}; only [], experts in every layer, is"
    if not isinstance(normalize := values.get("norm_topk_prob", False), bool):
        yield f"norm_topk_prob={shown(normalize)} is neither true nor false"


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "norm_topk_prob": config.router_normalize == "on",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": config.attention_window > 0,
        "sliding_window": config.attention_window or None,
        # transformers 4 starts windows at this layer.
        "max_window_layers": 0 if config.attention_window else config.num_layers,
    }


QWEN3_MOE = LlamaFamily(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    max_tokens=32_768,
    num_kv_heads=4,
    sizes=_SIZES,
    tensors=expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    supported={"qk_norm": ("on",)},
    window_of_layer=_window_of_layer,
    resolve_more=_resolve,
    read_more=lambda values: {
        "qk_norm": "on",
        "router_normalize": "on" if values.get("norm_topk_prob", False) else "off",
    },
    write_more=_write,
    refuse_more=_refuse,
    find_more_unsupported=find_unsupported_experts,
)
"""Qwen 3's mixtures of experts, 30B-A3B and 235B-A22B (Yang et al., 2025, arXiv:2505.09388, section 2)."""
