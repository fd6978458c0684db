"""Describe Phi-3 and Phi-4: Llama whose files join query, key and value, and gate and up, with one attention window.

ours                          file, [out, in]
query, key, value.kernel      self_attn.qkv_proj    rows of N, K and K heads
gate, up.kernel               mlp.gate_up_proj      two equal parts
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ....layers import ModelConfig
from ....meshes.errors import shown
from ..architecture import Values
from ..llama_family import LLAMA_TENSORS, LlamaFamily
from ..tensor_names import TensorNames, TensorPlace

_LONG, _ORIGINAL = "longrope", "original_max_position_embeddings"
_MAX_TOKENS = 4096
"""Default of `max_position_embeddings`, and of the length that a model was first trained on."""


def _list_tensors() -> TensorNames:
    heads = tuple(f"blocks.attention.{name}.kernel" for name in ("query", "key", "value"))
    features = tuple(f"blocks.mlp.{name}.kernel" for name in ("gate", "up"))
    places = dict(LLAMA_TENSORS.places)
    for paths, name, joined in ((heads, "self_attn.qkv_proj", heads), (features, "mlp.gate_up_proj", ())):
        for part, path in enumerate(paths):
            places[path] = TensorPlace(
                name=f"layers.{{layer}}.{name}.weight",
                layout="transposed",
                part=part,
                num_parts=len(paths),
                joined=joined,
            )
    return replace(LLAMA_TENSORS, places=places)


def _rope_keys(values: Values) -> Values:
    """Return the keys with the name of today of the one kind of scaling, and the default of its length."""

    def rename(table: Any) -> Any:
        kind = table.get("rope_type", table.get("type")) if isinstance(table, Mapping) else None
        return {**table, "rope_type": _LONG, "type": _LONG} if kind in ("su", "yarn") else table

    renamed = {key: rename(values[key]) for key in ("rope_parameters", "rope_scaling") if key in values}
    return {_ORIGINAL: _MAX_TOKENS, **values, **renamed}


def _refuse(values: Values) -> Iterator[str]:
    if (kind := values["rope"]["rope_type"]) not in ("default", _LONG):
        yield f"rope type {shown(kind)} of phi3; only 'default' and {_LONG!r} are"


def _write(config: ModelConfig) -> dict[str, Any]:
    original = config.rope_original_tokens or config.max_tokens
    return {"sliding_window": config.attention_window or None, _ORIGINAL: original}


PHI3 = LlamaFamily(
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    max_tokens=_MAX_TOKENS,
    norm_epsilon=1e-5,
    rotated_part=1.0,
    tensors=_list_tensors(),
    supported={"rope_scaling": ("none", _LONG)},
    rope_keys=_rope_keys,
    # Llama and Mistral hold the others too.
    is_told_by=lambda config: config.rope_scaling == _LONG or config.rope_head_size > 0,
    window_of_layer=lambda values, _layer: values.get("sliding_window") or 0,
    write_more=_write,
    refuse_more=_refuse,
)
"""Phi-3 and Phi-4 (Abdin et al., 2024, arXiv:2404.14219 and 2412.08905), the long versions and Phi-4-mini too."""
