"""Describe dots.llm1: Qwen 3's attention, and dense layers and experts as DeepSeek-V3's."""

from collections.abc import Iterator
from typing import Any

from ...layers import ModelConfig
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
from .llama_family import LLAMA_SIZES, LlamaFamily
from .qwen_windows import refuse_windows

LAYER_SIZES = LLAMA_SIZES | {
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}
LAYER_COUNTS = ("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group")

_DEFAULTS: dict[str, Any] = {
    "moe_intermediate_size": 1408,
    "n_shared_experts": None,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
}


def _window_of_layer(values: Values, layer: int) -> int:
    window, kinds = values.get("sliding_window", 4096) or 0, values.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return window if kinds[layer] == "sliding_attention" else 0
    return window if layer >= values.get("max_window_layers", 62) else 0


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse(values, only={"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    yield from refuse_normalize(values)
    yield from refuse_windows(values)


def _read(values: Values) -> dict[str, Any]:
    return {"qk_norm": "on"} | read_layers(values) | read_router(values)


def _write(config: ModelConfig) -> dict[str, Any]:
    window = config.attention_window or None
    kinds = ["sliding_attention" if window else "full_attention"] * config.num_layers
    windows = {"sliding_window": window, "max_window_layers": 0 if window else config.num_layers, "layer_types": kinds}
    return {"attention_bias": False} | windows | write_layers(config) | write_router(config)


DOTS1 = LlamaFamily(
    model_type="dots1",
    class_name="Dots1ForCausalLM",
    max_tokens=2048,
    num_kv_heads=32,
    sizes=LAYER_SIZES,
    counts=(*LAYER_COUNTS, "sliding_window", "max_window_layers"),
    positive_numbers=("rms_norm_eps", "routed_scaling_factor"),
    tensors=dense_and_expert_tensors(),
    supported={"qk_norm": ("on",)},
    window_of_layer=_window_of_layer,
    resolve_more=lambda values, _warnings: with_defaults(values, _DEFAULTS),
    read_more=_read,
    write_more=_write,
    refuse_more=_refuse,
    find_more_unsupported=lambda config: find_unsupported_layers(config, router="sigmoid", bias="on"),
)
"""dots.llm1 (rednote-hilab, 2025, arXiv:2506.05767, section 2.1)."""
