"""Describe DeepSeek-V3 and R1: sigmoid scores, with a bias for the choice, and groups by their two best experts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Values
from .deepseek import (
    COUNTS,
    OPTIONAL_SIZES,
    SIZES,
    find_no_latents,
    find_unsupported_layers,
    latent_tensors,
    read_sizes,
    refuse,
    with_defaults,
    write_sizes,
)
from .llama_family import LlamaFamily

_DEFAULTS: dict[str, Any] = {
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
}
_ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse(values, only=_ONLY)
    yield from refuse_normalize(values)


def refuse_normalize(values: Values) -> Iterator[str]:
    """Yield a line if `norm_topk_prob` is no switch."""
    if not isinstance(normalize := values.get("norm_topk_prob", False), bool):
        yield f"norm_topk_prob={shown(normalize)} is neither true nor false"


def read_router(values: Values) -> dict[str, Any]:
    """Return the fields of V3's router."""
    return {
        "router": "sigmoid",
        "router_bias": "on",
        "router_normalize": "on" if values["norm_topk_prob"] else "off",
        "router_groups": values["n_group"] or 1,
        "router_groups_kept": values["topk_group"] or 1,
    }


def write_router(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of V3's router."""
    return {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": config.router_normalize == "on",
        "n_group": config.router_groups,
        "topk_group": config.router_groups_kept,
    }


def _find_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from find_no_latents(config)
    yield from find_unsupported_layers(config, router="sigmoid", bias="on")


DEEPSEEK_V3 = LlamaFamily(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    max_tokens=4096,
    num_kv_heads=128,
    sizes=SIZES,
    optional_sizes=OPTIONAL_SIZES,
    counts=COUNTS,
    positive_numbers=("rms_norm_eps", "routed_scaling_factor"),
    tensors=replace(latent_tensors(), more_layers="ignored"),
    resolve_more=lambda values, _warnings: with_defaults(values, _DEFAULTS),
    read_more=lambda values: read_sizes(values) | read_router(values),
    write_more=lambda config: write_sizes(config) | write_router(config) | {"num_nextn_predict_layers": 0},
    refuse_more=_refuse,
    find_more_unsupported=_find_unsupported,
)
"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1), without its prediction of more tokens."""
