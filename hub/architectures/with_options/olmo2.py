"""Describe OLMo 2: norms of what attention and feed-forward return, and of queries and keys over all heads."""

from collections.abc import Iterator
from dataclasses import replace

from ..architecture import Values
from ..llama_family import BIASES, LLAMA_TENSORS, LlamaFamily
from ..tensor_names import TensorNames, TensorPlace


def _list_tensors() -> TensorNames:
    places = {path: place for path, place in LLAMA_TENSORS.places.items() if "blocks.mlp_norm" not in path}
    del places["blocks.attention_norm.scale"]
    norms = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    own = {f"blocks.{path}.scale": TensorPlace(name=f"layers.{{layer}}.{name}.weight") for path, name in norms.items()}
    return replace(LLAMA_TENSORS, places={**places, **own})


def refuse_bias(values: Values) -> Iterator[str]:
    """Yield a line for biases of attention."""
    # transformers gives biases to all four projections, and none to the MLP.
    if values.get("attention_bias"):
        yield f"attention_bias=true; {BIASES}"


OLMO2 = LlamaFamily(
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    max_tokens=2048,
    norm_epsilon=1e-5,
    tensors=_list_tensors(),
    supported={"norm_place": ("after",), "qk_norm": ("whole",)},
    read_more=lambda _values: {"norm_place": "after", "qk_norm": "whole"},
    refuse_more=refuse_bias,
)
"""OLMo 2 (OLMo Team, 2025, arXiv:2501.00656, section 3)."""
