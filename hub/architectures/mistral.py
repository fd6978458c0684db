"""Describe Mistral: Llama without biases, with one attention window for all layers."""

from typing import Any

from ...layers import ModelConfig
from .architecture import Values
from .llama_family import LlamaFamily


def _window_of_layer(values: Values, _layer: int) -> int:
    return values.get("sliding_window", 4096) or 0


def _write_window(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.attention_window or None}


MISTRAL = LlamaFamily(
    model_type="mistral",
    class_name="MistralForCausalLM",
    max_tokens=131_072,
    num_kv_heads=8,
    window_of_layer=_window_of_layer,
    write_more=_write_window,
)
"""Mistral (Jiang et al., 2023). As in transformers, keys for biases are ignored."""
