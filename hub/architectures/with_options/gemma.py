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
from ....layers.options.check_config import FULL, UNROTATED, WINDOW, windows_of_layers
from ....meshes.errors import shown
from ..architecture import Values
from ..llama_family import BIASES, LLAMA_TENSORS
from ..numbers import check_positive
from ..tensor_names import TensorNames, TensorPlace
from .layer_kinds import shorten_pattern

OPTIONS = ("embedding_scale", "attention_scale", "attention_pattern", "attention_softcap", "logit_softcap")
SUPPORTED = {"mlp": ("geglu",), "norm": ("rmsnorm1p",), "norm_place": ("both",)}
ACTIVATION = ("hidden_activation", "gelu_pytorch_tanh")
HEAD_SIZE = 256
"""Default of `head_dim`."""

_KINDS = {"sliding_attention": WINDOW, "full_attention": FULL}
_CAPS = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
_SCALAR, _WINDOW = "query_pre_attn_scalar", 4096
_SCALAR_DEFAULT = 256


def list_tensors() -> TensorNames:
    """Return the names of Gemma's tensors."""
    norms = {"attention_out_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
    norms |= {"mlp_out_norm": "post_feedforward_layernorm"}
    own = {f"blocks.{path}.scale": TensorPlace(name=f"layers.{{layer}}.{name}.weight") for path, name in norms.items()}
    return replace(LLAMA_TENSORS, places={**LLAMA_TENSORS.places, **own})


def read_kinds(values: Values, *, every: int) -> list[str]:
    """Return the kind of attention of every layer.

    Args:
        every: without `layer_types`, each layer whose number from 1 is a multiple of this has full attention.
    """
    given = values.get("layer_types")
    if given is not None:
        return [_KINDS[kind] for kind in given]
    return [WINDOW if (layer + 1) % every else FULL for layer in range(values["num_hidden_layers"])]


def read_gemma(values: Values, *, every: int, caps: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of both versions; `caps` are the defaults of missing ones, by field."""
    pattern = shorten_pattern(read_kinds(values, every=every))
    head, scalar = values.get("head_dim") or HEAD_SIZE, values.get(_SCALAR, _SCALAR_DEFAULT)
    return {
        "mlp": "geglu",
        "norm": "rmsnorm1p",
        "norm_place": "both",
        "embeddings": "tied" if values.get("tie_word_embeddings", True) else "untied",
        "embedding_scale": float(values["hidden_size"]) ** 0.5,
        "attention_scale": 0.0 if scalar == head else scalar**-0.5,
        "attention_pattern": () if pattern == (FULL,) else pattern,
        "attention_window": values.get("sliding_window", _WINDOW) if WINDOW in pattern else 0,
    } | {own: float(values.get(key, caps[own]) or 0) for own, key in _CAPS.items()}


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of both versions."""
    windows = windows_of_layers(config)
    return {
        _SCALAR: round((config.attention_scale or config.head_size**-0.5) ** -2),
        "sliding_window": config.attention_window or _WINDOW,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "attention_bias": False,
    } | {key: getattr(config, own) or None for own, key in _CAPS.items()}


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
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind in _KINDS for kind in kinds)):
        yield f"layer_types={shown(kinds)} is no list of {' and '.join(_KINDS)}"
    if "sliding_window" in values and not values["sliding_window"]:
        yield f"sliding_window={shown(values['sliding_window'])}; only 1 or more is"


def refuse_layers(values: Values) -> Iterator[str]:
    """Yield a line if `layer_types` has not as many layers as the model."""
    kinds, layers = values.get("layer_types"), values["num_hidden_layers"]
    if kinds is not None and len(kinds) != layers:
        yield f"layer_types of {len(kinds)} layers, of num_hidden_layers={layers}"


def find_unsupported(config: ModelConfig) -> Iterator[str]:
    """Yield a line for each field that neither version can have."""
    if config.embedding_scale != config.hidden_size**0.5:
        yield f"model.embedding_scale={config.embedding_scale}, not sqrt(hidden_size)={config.hidden_size**0.5}"
    if UNROTATED in config.attention_pattern:
        yield f"model.attention_pattern={config.attention_pattern!r}, not of {WINDOW!r} and {FULL!r}"
    scalar = (config.attention_scale or config.head_size**-0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        yield f"model.attention_scale={config.attention_scale}, not 1 / sqrt(a whole number)"
