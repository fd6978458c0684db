"""Describe Qwen 2 and 2.5: Llama with biases on query, key and value alone."""

from .architecture import find_own_head_size
from .llama_family import LlamaFamily
from .qwen_windows import refuse_windows, warn_of_unused_windows, window_of_layer, write_windows

QWEN2 = LlamaFamily(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    max_tokens=32_768,
    num_kv_heads=32,
    supported={"bias": ("qkv",)},
    window_of_layer=window_of_layer,
    read_more=lambda _values: {"bias": "qkv"},
    write_more=write_windows,
    refuse_more=refuse_windows,
    warn_more=warn_of_unused_windows,
    find_more_unsupported=find_own_head_size,
)
"""Qwen 2 and 2.5. As in transformers, keys for other biases are ignored."""
