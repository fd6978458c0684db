"""Describe Llama 1 to 3: biases on all linear layers, or on none."""

from collections.abc import Iterator
from typing import Any

from ...layers import ModelConfig
from .architecture import Values
from .llama_family import BIASES, LlamaFamily


def read_bias(values: Values) -> dict[str, Any]:
    """Return the field of biases."""
    return {"bias": "on" if values.get("attention_bias") else "off"}


def write_bias(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of biases."""
    return {"attention_bias": config.bias == "on", "mlp_bias": config.bias == "on"}


def refuse_biases(values: Values) -> Iterator[str]:
    """Yield a line if attention alone, or the MLP alone, has biases."""
    given = [key for key in ("attention_bias", "mlp_bias") if values.get(key)]
    if len(given) == 1:
        yield f"{given[0]}=true; {BIASES}"


LLAMA = LlamaFamily(
    model_type="llama",
    class_name="LlamaForCausalLM",
    max_tokens=2048,
    supported={"bias": ("on", "off")},
    read_more=read_bias,
    write_more=write_bias,
    refuse_more=refuse_biases,
)
"""Llama 1 to 3; tensors and keys of config.json are those of the family."""
