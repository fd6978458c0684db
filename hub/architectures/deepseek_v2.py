"""Describe DeepSeek-V2 and V2-Lite: softmax scores whose shares are not divided by their sum, groups by their best."""

from collections.abc import Iterator
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
    "n_routed_experts": 64,
    "moe_intermediate_size": 1407,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_GROUPED = "group_limited_greedy"


def _refuse(values: Values) -> Iterator[str]:
    # transformers ignores the last two; DeepSeek's own code does not.
    yield from refuse(values, only={"scoring_func": "softmax", "norm_topk_prob": False})
    if values.get("mlp_bias"):
        yield "mlp_bias=true; only false is"
    if (method := values["topk_method"]) not in ("greedy", _GROUPED):
        yield f"topk_method={shown(method)}; only 'greedy' and {_GROUPED!r} are"


def _read(values: Values) -> dict[str, Any]:
    is_grouped = values["topk_method"] == _GROUPED
    return read_sizes(values) | {
        "router": "softmax",
        "router_normalize": "off",
        "router_groups": (values["n_group"] or 1) if is_grouped else 1,
        "router_groups_kept": (values["topk_group"] or 1) if is_grouped else 1,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_sizes(config) | {
        "scoring_func": "softmax",
        "topk_method": _GROUPED if config.router_groups > 1 else "greedy",
        "norm_topk_prob": False,
        "n_group": config.router_groups,
        "topk_group": config.router_groups_kept,
    }


def _find_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from find_no_latents(config)
    yield from find_unsupported_layers(config, router="softmax", bias="off")
    if config.num_experts and config.router_normalize != "off":
        yield f"model.router_normalize={config.router_normalize!r}, not 'off'"


DEEPSEEK_V2 = LlamaFamily(
    model_type="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    max_tokens=2048,
    sizes=SIZES,
    optional_sizes=OPTIONAL_SIZES,
    counts=COUNTS,
    positive_numbers=("rms_norm_eps", "routed_scaling_factor"),
    tensors=latent_tensors(),
    resolve_more=lambda values, _warnings: with_defaults(values, _DEFAULTS),
    read_more=_read,
    write_more=_write,
    refuse_more=_refuse,
    find_more_unsupported=_find_unsupported,
)
"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv:2405.04434, section 2)."""
