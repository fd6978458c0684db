"""Describe GLM-4.5 to 4.7: half of each head is rotated; dense layers and experts as DeepSeek-V3's."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Values
from .deepseek import (
    dense_and_expert_tensors,
    find_unsupported_layers,
    read_layers,
    refuse,
    with_defaults,
    write_layers,
)
from .deepseek_v3 import read_router, refuse_normalize, write_router
from .dots1 import LAYER_COUNTS, LAYER_SIZES
from .llama_family import LlamaFamily

_DEFAULTS: dict[str, Any] = {
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
}


def _refuse(values: Values) -> Iterator[str]:
    # Its attention_bias is of queries, keys and values alone, which trellax has.
    without_bias = {key: value for key, value in values.items() if key != "attention_bias"}
    yield from refuse(without_bias, only={"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    yield from refuse_normalize(values)
    for key in ("attention_bias", "use_qk_norm"):
        if not isinstance(value := values.get(key, False), bool):
            yield f"{key}={shown(value)} is neither true nor false"


def _read(values: Values) -> dict[str, Any]:
    heads = {
        "qk_norm": "on" if values.get("use_qk_norm") else "off",
        "bias": "qkv" if values.get("attention_bias") else "off",
    }
    return heads | read_layers(values) | read_router(values)


def _write(config: ModelConfig) -> dict[str, Any]:
    heads = {
        "use_qk_norm": config.qk_norm == "on",
        "attention_bias": config.bias == "qkv",
        # For transformers 4.
        "partial_rotary_factor": config.rotated_size / config.head_size,
        "num_nextn_predict_layers": 0,
    }
    return heads | write_layers(config) | write_router(config)


GLM4_MOE = LlamaFamily(
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    max_tokens=131_072,
    num_kv_heads=8,
    sizes=LAYER_SIZES,
    counts=LAYER_COUNTS,
    positive_numbers=("rms_norm_eps", "routed_scaling_factor"),
    tensors=replace(dense_and_expert_tensors(), more_layers="ignored"),
    supported={"qk_norm": ("on", "off"), "bias": ("qkv", "off")},
    rotated_part=0.5,
    resolve_more=lambda values, _warnings: with_defaults(values, _DEFAULTS),
    read_more=_read,
    write_more=_write,
    refuse_more=_refuse,
    find_more_unsupported=lambda config: find_unsupported_layers(config, router="sigmoid", bias="on"),
)
"""GLM-4.5 (GLM-4.5 Team 2025, arXiv:2508.06471, section 2.1), without its prediction of more tokens."""
