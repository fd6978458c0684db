"""Describe Mixtral: Mistral with a mixture of experts in every layer; the weights of a token's experts sum to 1."""

from collections.abc import Iterator
from typing import Any

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Values
from .experts import expert_tensors, find_unsupported_experts, resolve_experts
from .llama_family import LLAMA_SIZES, LlamaFamily

_SIZES = {own: key for own, key in LLAMA_SIZES.items() if own != "ffn_size"} | {
    "expert_size": "intermediate_size",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}


def _resolve(values: Values, warnings: list[str]) -> dict[str, Any]:
    defaults = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return resolve_experts(values, warnings, names=("num_experts", "num_local_experts"), defaults=defaults)


def _window_of_layer(values: Values, _layer: int) -> int:
    return values.get("sliding_window") or 0


def _refuse(values: Values) -> Iterator[str]:
    if noise := values.get("router_jitter_noise"):
        yield f"router_jitter_noise={shown(noise)}; only 0 is"


def _find_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from find_unsupported_experts(config)
    if config.router_normalize != "on":
        yield f"model.router_normalize={config.router_normalize!r}, not 'on'"


MIXTRAL = LlamaFamily(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    max_tokens=131_072,
    num_kv_heads=8,
    rope_theta=1e6,
    sizes=_SIZES,
    tensors=expert_tensors("block_sparse_moe", gate="w1", up="w3", down="w2"),
    window_of_layer=_window_of_layer,
    resolve_more=_resolve,
    read_more=lambda values: {"ffn_size": values["intermediate_size"]},
    write_more=lambda config: {"sliding_window": config.attention_window or None},
    refuse_more=_refuse,
    find_more_unsupported=_find_unsupported,
)
"""Mixtral (Jiang et al., 2024, arXiv:2401.04088)."""
