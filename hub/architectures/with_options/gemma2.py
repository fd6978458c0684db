"""Describe Gemma 2: windows in every other layer, and caps of scores and logits."""

from ..llama_family import LlamaFamily
from .gemma import (
    ACTIVATION,
    HEAD_SIZE,
    OPTIONS,
    SUPPORTED,
    find_unsupported,
    list_tensors,
    read_gemma,
    refuse_gemma,
    write_gemma,
)
from .layer_kinds import refuse_short_lists

_CAPS = {"attention_softcap": 50.0, "logit_softcap": 30.0}

GEMMA2 = LlamaFamily(
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    max_tokens=8192,
    num_kv_heads=4,
    head_size=HEAD_SIZE,
    activation=ACTIVATION,
    tensors=list_tensors(),
    supported=SUPPORTED,
    options=OPTIONS,
    read_more=lambda values: read_gemma(values, every=2, caps=_CAPS),
    write_more=write_gemma,
    refuse_more=refuse_gemma,
    refuse_layers=refuse_short_lists,
    find_more_unsupported=find_unsupported,
)
"""Gemma 2 (Gemma Team, 2024, arXiv:2408.00118)."""
