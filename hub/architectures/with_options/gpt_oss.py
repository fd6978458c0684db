"""Describe gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped SwiGLU.

    ours                                file, [in, out] as ours
    attention.sinks [N]                 self_attn.sinks
    router.weight, logit_bias           mlp.router.weight [E, D], bias
    gate, up.kernel [E, D, F]           mlp.experts.gate_up_proj [E, D, 2 F], even columns and odd ones
    gate, up.bias   [E, F]              mlp.experts.gate_up_proj_bias [E, 2 F], likewise
    down.kernel, bias                   mlp.experts.down_proj [E, F, D], down_proj_bias [E, D]

Published files hold the experts' kernels in four bits, read by `../../mxfp4.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ....layers import ModelConfig
from ....layers.options.check_config import CLAMP, SHARPNESS
from ....meshes.errors import shown
from ..architecture import Values
from ..experts import resolve_experts
from ..llama_family import LLAMA_SIZES, LLAMA_TENSORS, LlamaFamily
from ..tensor_names import TensorNames, TensorPlace
from .layer_kinds import find_other_kinds, read_kinds, refuse_kinds, refuse_short_lists, write_kinds

_SIZES = {own: key for own, key in LLAMA_SIZES.items() if own != "ffn_size"} | {
    "expert_size": "intermediate_size",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
_NUMBERS = {"swiglu_alpha": SHARPNESS, "swiglu_limit": CLAMP}
"""Keys of the clamped SwiGLU, with their only values; older files have none, or the second alone."""

_FIXED = {"router": "softmax", "router_normalize": "on", "router_scale": 1.0, "shared_size": 0, "dense_layers": 0}
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_YARN |= {"original_max_position_embeddings": 4096}
"""Rotary positions of a config.json that says nothing of them."""

_WINDOW = 128


def _list_tensors() -> TensorNames:
    layer = "layers.{layer}."
    joined, down = f"{layer}mlp.experts.gate_up_proj", f"{layer}mlp.experts.down_proj"
    own = {
        "attention.sinks": TensorPlace(name=f"{layer}self_attn.sinks"),
        "mlp.router.weight": TensorPlace(name=f"{layer}mlp.router.weight", layout="transposed"),
        "mlp.router.logit_bias": TensorPlace(name=f"{layer}mlp.router.bias"),
        "mlp.down.kernel": TensorPlace(name=down),
        "mlp.down.bias": TensorPlace(name=f"{down}_bias"),
    }
    for part, name in enumerate(("gate", "up")):
        place = TensorPlace(name=joined, part=part, num_parts=2, order="interleaved")
        own |= {f"mlp.{name}.kernel": place, f"mlp.{name}.bias": replace(place, name=f"{joined}_bias")}
    places = {**LLAMA_TENSORS.places, **{f"blocks.{path}": place for path, place in own.items()}}
    return replace(LLAMA_TENSORS, places=places, quantized=("mxfp4",))


def _rope_keys(values: Values) -> Values:
    has_any = values.get("rope_parameters") or values.get("rope_scaling")
    return values if has_any else {**values, "rope_parameters": _YARN}


def _resolve(values: Values, warnings: list[str]) -> dict[str, Any]:
    defaults = {"num_local_experts": 128, "num_experts_per_tok": 4}
    return resolve_experts(values, warnings, names=("num_experts", "num_local_experts"), defaults=defaults)


def _read(values: Values) -> dict[str, Any]:
    return read_kinds(values, every=2, window=_WINDOW) | {
        "ffn_size": values["intermediate_size"],
        "mlp": "clamped_swiglu",
        "bias": "on",
        "router_bias": "trained",
        "attention_sinks": "on",
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_kinds(config, window=_WINDOW) | {"attention_bias": True} | _NUMBERS


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse_kinds(values)
    if not values.get("attention_bias", True):
        yield "attention_bias=false; gpt-oss here has biases on all linear layers"
    for key, only in _NUMBERS.items():
        if values.get(key, only) != only:
            yield f"{key}={shown(values[key])}; only {only} is"


def _find_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from find_other_kinds(config)
    if not config.num_experts:
        yield "model.num_experts=0, not 1 or more"
        return
    for field, only in _FIXED.items():
        if getattr(config, field) != only:
            yield f"model.{field}={getattr(config, field)!r}, not {only!r}"
    if config.router_groups_kept != config.router_groups:
        yield f"model.router_groups_kept={config.router_groups_kept} of router_groups={config.router_groups}, not all"


GPT_OSS = LlamaFamily(
    model_type="gpt_oss",
    class_name="GptOssForCausalLM",
    max_tokens=131_072,
    num_kv_heads=8,
    head_size=64,
    rope_theta=150_000.0,
    norm_epsilon=1e-5,
    sizes=_SIZES,
    tensors=_list_tensors(),
    supported={"mlp": ("clamped_swiglu",), "bias": ("on",), "router_bias": ("trained",), "attention_sinks": ("on",)},
    options=("attention_pattern", "attention_sinks"),
    rope_keys=_rope_keys,
    resolve_more=_resolve,
    read_more=_read,
    write_more=_write,
    refuse_more=_refuse,
    refuse_layers=refuse_short_lists,
    find_more_unsupported=_find_unsupported,
)
"""gpt-oss-20b and 120b (OpenAI, 2025, arXiv:2508.10925, section 2)."""
