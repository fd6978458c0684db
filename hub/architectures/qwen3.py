"""Describe Qwen 3: Llama without biases, with an RMSNorm over every query and key head."""

from collections.abc import Iterator

from .architecture import Values
from .llama_family import BIASES, LlamaFamily
from .qwen_windows import refuse_windows, warn_of_unused_windows, window_of_layer, write_windows


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse_windows(values)
    # transformers gives biases to query, key, value and output, and none to the MLP; trellax has no such choice.
    if values.get("attention_bias"):
        yield f"attention_bias=true; {BIASES}"


QWEN3 = LlamaFamily(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    max_tokens=32_768,
    num_kv_heads=32,
    head_size=128,
    supported={"qk_norm": ("on",)},
    window_of_layer=window_of_layer,
    read_more=lambda _values: {"qk_norm": "on"},
    write_more=write_windows,
    refuse_more=_refuse,
    warn_more=warn_of_unused_windows,
)
"""Qwen 3. Without `head_dim` in config.json, heads have 128 features."""
