"""What DeepSeek-V2 and V3 have in common: attention from latent vectors, dense layers, then experts with shared ones.

    published                                        ours
    self_attn.q_proj, or q_a_proj and q_b_proj       attention.query, or query.down and query.up
    self_attn.kv_a_proj_with_mqa  [C + R, D]         attention.latent_down  [D, C + R]
    self_attn.kv_b_proj           [N (H - R + U), C] attention.key_value    [C, N (H - R + U)]
    mlp.shared_experts            one of all         mlp.shared

Rotated features are in the order of the files, in pairs (2i, 2i + 1). Read `deepseek_v3.py` next.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Values
from .experts import expert_tensors
from .llama_family import BIASES, LLAMA_SIZES
from .tensor_names import TensorNames, TensorPlace

SIZES = LLAMA_SIZES | {
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "latent_size": "kv_lora_rank",
    "rope_head_size": "qk_rope_head_dim",
    "value_head_size": "v_head_dim",
}
"""Keys of the required sizes in config.json, by `ModelConfig` field."""

OPTIONAL_SIZES = {
    "max_tokens": "max_position_embeddings",
    "num_kv_heads": "num_key_value_heads",
    "query_latent_size": "q_lora_rank",
}
COUNTS = ("qk_nope_head_dim", "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group")
_REQUIRED = ("qk_nope_head_dim", "n_shared_experts")


def dense_and_expert_tensors() -> TensorNames:
    """Return the names of Llama's tensors with experts, shared ones, a router's bias, and dense layers before them."""
    names = expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    bias = TensorPlace(name="layers.{layer}.mlp.gate.e_score_correction_bias", dtype="float32")
    places = {**names.places, "blocks.mlp.router.bias": bias}
    for own in ("gate", "up", "down"):
        places[f"blocks.dense.mlp.{own}.kernel"] = _linear(f"mlp.{own}_proj")
        places[f"blocks.mlp.shared.{own}.kernel"] = _linear(f"mlp.shared_experts.{own}_proj")
    return replace(names, places=places)


def latent_tensors() -> TensorNames:
    """Return these names, with those of attention from latent vectors."""
    names = dense_and_expert_tensors()
    linears = {
        "query.down": "q_a_proj",
        "query.up": "q_b_proj",
        "latent_down": "kv_a_proj_with_mqa",
        "key_value": "kv_b_proj",
    }
    norms = {"query.norm": "q_a_layernorm", "latent_norm": "kv_a_layernorm"}
    places = {f"blocks.attention.{own}.kernel": _linear(f"self_attn.{name}") for own, name in linears.items()}
    places |= {
        f"blocks.attention.{own}.scale": TensorPlace(name=f"layers.{{layer}}.self_attn.{name}.weight")
        for own, name in norms.items()
    }
    return replace(names, places={**names.places, **places})


def _linear(name: str) -> TensorPlace:
    return TensorPlace(name=f"layers.{{layer}}.{name}.weight", layout="transposed")


def with_defaults(values: Values, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys with transformers' defaults for those that are missing; null is a value."""
    return {key: values.get(key, default) for key, default in defaults.items()}


def read_sizes(values: Values) -> dict[str, Any]:
    """Return the fields of a head, of its latent vectors, and of layers and their shared experts."""
    return {
        "head_size": values["qk_nope_head_dim"] + values["qk_rope_head_dim"],
        "query_latent_size": values["q_lora_rank"] or 0,
    } | read_layers(values)


def read_layers(values: Values) -> dict[str, Any]:
    """Return the fields of dense layers and shared experts."""
    return {
        "dense_layers": values["first_k_dense_replace"] or 0,
        "shared_size": values["n_shared_experts"] * values["moe_intermediate_size"],
        "router_scale": float(values["routed_scaling_factor"]),
    }


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a head, of its latent vectors, and of layers and their shared experts."""
    return {
        "qk_nope_head_dim": config.head_size - config.rope_head_size,
        "q_lora_rank": config.query_latent_size or None,
        "attention_bias": False,
    } | write_layers(config)


def write_layers(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of dense layers and shared experts."""
    return {
        "first_k_dense_replace": config.dense_layers,
        "n_shared_experts": config.shared_size // config.expert_size,
        "routed_scaling_factor": config.router_scale,
        "moe_layer_freq": 1,
    }


def refuse(values: Values, *, only: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each setting that trellax cannot compute.

    Args:
        only: the one supported value of each key that transformers ignores, or DeepSeek's own code reads.
    """
    if values.get("attention_bias"):
        yield f"attention_bias=true; {BIASES}"
    for key, value in ({"moe_layer_freq": 1} | dict(only)).items():
        if values.get(key, value) != value:
            yield f"{key}={shown(values[key])}; only {shown(value)} is"
    for key in _REQUIRED:
        if key in values and not values[key]:
            yield f"{key}={shown(values[key])}; only 1 or more is"


def find_unsupported_layers(config: ModelConfig, *, router: str, bias: str) -> Iterator[str]:
    """Yield a line for each field that DeepSeek's layers of experts cannot have.

    Args:
        router, bias: the `router` and `router_bias` of the architecture.
    """
    if not config.num_experts:
        yield "model.num_experts=0, not 1 or more"
        return
    if config.shared_size < config.expert_size or config.shared_size % config.expert_size:
        yield f"model.shared_size={config.shared_size}, not a multiple of expert_size={config.expert_size}"
    if config.router != router:
        yield f"model.router={config.router!r}, not {router!r}"
    if config.router_bias != bias:
        yield f"model.router_bias={config.router_bias!r}, not {bias!r}"


def find_no_latents(config: ModelConfig) -> Iterator[str]:
    """Yield a line for a model whose keys and values do not come from latent vectors."""
    if not config.latent_size:
        yield "model.latent_size=0, not 1 or more"
