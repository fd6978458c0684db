"""Choices of a few architectures, on Llama's layers."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "olmo2": {"norm_place": "after", "qk_norm": "whole"},
    "granite": {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.4, "logit_scale": 0.125},
    "smollm3": {"attention_pattern": ("full", "unrotated")},
    "windows": {"attention_pattern": ("window", "full"), "attention_window": 5, "window_rope_theta": 100.0}
    | {"rope_scaling": "linear", "rope_factor": 4.0, "attention_softcap": 1.5, "logit_softcap": 2.0},
    "gemma": {"norm_place": "both", "qk_norm": "on", "norm": "rmsnorm1p", "mlp": "geglu"},
    "sinks": {"attention_sinks": "on", "mlp": "clamped_swiglu", "bias": "on"}
    | {"attention_pattern": ("window", "full"), "attention_window": 5},
    "longrope": {"rope_scaling": "longrope", "rope_factor": 4.0, "rope_original_tokens": 11, "head_size": 8}
    | {"rope_short_factors": (1.0, 1.1, 1.3, 1.5), "rope_long_factors": (1.2, 2.0, 4.0, 5.0)},
    "norm1p of all heads": {"qk_norm": "whole", "norm": "rmsnorm1p"},
}
