"""What Gemma 2 and Gemma 3 have in common: four norms a block, GEGLU, scaled embeddings, caps, windows by layer.

    attention_norm      input_layernorm                 scales of norms are stored minus one
    attention_out_norm  post_attention_layernorm
    mlp_norm            pre_feedforward_layernorm
    mlp_out_norm        post_feedforward_layernorm

Read `gemma2.py` and `gemma3.py` next (Gemma Team, 2024, arXiv:2408.00118, and 2025, arXiv:2503.19786).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ....layers import ModelConfig
from ..architecture import Values
from ..llama_family import BIASES, LLAMA_TENSORS
from ..numbers import check_positive
from ..tensor_names import TensorNames, TensorPlace
from .layer_kinds import find_other_kinds, read_kinds, refuse_kinds, write_kinds

OPTIONS = ("embedding_scale", "attention_scale", "attention_pattern", "attention_softcap", "logit_softcap")
SUPPORTED = {"mlp": ("geglu",), "norm": ("rmsnorm1p",), "norm_place": ("both",)}
ACTIVATION = ("hidden_activation", "gelu_pytorch_tanh")
HEAD_SIZE = 256
"""Default of `head_dim`."""

_CAPS = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
_SCALAR, _WINDOW = "query_pre_attn_scalar", 4096
_SCALAR_DEFAULT = 256


def list_tensors() -> TensorNames:
    """Return the names of Gemma's tensors."""
    norms = {"attention_out_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
    norms |= {"mlp_out_norm": "post_feedforward_layernorm"}
    own = {f"blocks.{path}.scale": TensorPlace(name=f"layers.{{layer}}.{name}.weight") for path, name in norms.items()}
    return replace(LLAMA_TENSORS, places={**LLAMA_TENSORS.places, **own})


def read_gemma(values: Values, *, every: int, caps: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of both versions; `caps` are the defaults of missing ones, by field."""
    head, scalar = values.get("head_dim") or HEAD_SIZE, values.get(_SCALAR, _SCALAR_DEFAULT)
    return (
        read_kinds(values, every=every, window=_WINDOW)
        | {
            "mlp": "geglu",
            "norm": "rmsnorm1p",
            "norm_place": "both",
            "embeddings": "tied" if values.get("tie_word_embeddings", True) else "untied",
            "embedding_scale": float(values["hidden_size"]) ** 0.5,
            "attention_scale": 0.0 if scalar == head else scalar**-0.5,
        }
        | {own: float(values.get(key, caps[own]) or 0) for own, key in _CAPS.items()}
    )


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of both versions."""
    return (
        write_kinds(config, window=_WINDOW)
        | {
            _SCALAR: round((config.attention_scale or config.head_size**-0.5) ** -2),
            "attention_bias": False,
        }
        | {key: getattr(config, own) or None for own, key in _CAPS.items()}
    )


def refuse_gemma(values: Values) -> Iterator[str]:
    """Yield a line for each setting of both versions that trellax cannot compute."""
    if values.get("attention_bias"):
        yield f"attention_bias=true; {BIASES}"
    if values.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention=true; only attention to tokens before is"
    yield from check_positive(_SCALAR, values.get(_SCALAR, _SCALAR_DEFAULT))
    for key in _CAPS.values():
        if values.get(key) is not None:
            yield from check_positive(key, values[key])
    yield from refuse_kinds(values)


def find_unsupported(config: ModelConfig) -> Iterator[str]:
    """Yield a line for each field that neither version can have."""
    if config.embedding_scale != config.hidden_size**0.5:
        yield f"model.embedding_scale={config.embedding_scale}, not sqrt(hidden_size)={config.hidden_size**0.5}"
    yield from find_other_kinds(config)
    scalar = (config.attention_scale or config.head_size**-0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        yield f"model.attention_scale={config.attention_scale}, not 1 / sqrt(a whole number)"
