"""Describe Granite 3: Llama with factors of embeddings, residuals, scores and logits."""

from collections.abc import Iterator
from typing import Any

from ....layers import ModelConfig
from ..architecture import Values
from ..llama import read_bias, refuse_biases, write_bias
from ..llama_family import LlamaFamily
from ..numbers import check_positive

_FACTORS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
}
_DIVISOR = "logits_scaling"


def _read(values: Values) -> dict[str, Any]:
    factors = {own: float(values.get(key, 1.0)) for own, key in _FACTORS.items()}
    return read_bias(values) | factors | {"logit_scale": 1 / values.get(_DIVISOR, 1.0)}


def _write(config: ModelConfig) -> dict[str, Any]:
    own = {key: getattr(config, field) for field, key in _FACTORS.items()}
    own["attention_multiplier"] = config.attention_scale or config.head_size**-0.5
    return write_bias(config) | own | {_DIVISOR: 1 / config.logit_scale}


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse_biases(values)
    for key in (*_FACTORS.values(), _DIVISOR):
        yield from check_positive(key, values.get(key, 1.0))


GRANITE = LlamaFamily(
    model_type="granite",
    class_name="GraniteForCausalLM",
    max_tokens=2048,
    supported={"bias": ("on", "off")},
    options=(*_FACTORS, "logit_scale"),
    read_more=_read,
    write_more=_write,
    refuse_more=_refuse,
)
"""Granite 3.0 to 3.3 and 4.0 without state-space layers or experts (IBM, 2024)."""
