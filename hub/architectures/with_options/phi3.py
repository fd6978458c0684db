"""Describe Phi-3 and Phi-4: Llama whose files join query, key and value, and gate and up, with one attention window.

ours                          file, [out, in]
query, key, value.kernel      self_attn.qkv_proj    rows of N, K and K heads
gate, up.kernel               mlp.gate_up_proj      two equal parts
"""

from collections.abc import Iterator
from dataclasses import replace

from ....meshes.errors import shown
from ..architecture import Values
from ..llama_family import LLAMA_TENSORS, LlamaFamily
from ..tensor_names import TensorNames, TensorPlace


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


def _refuse(values: Values) -> Iterator[str]:
    # transformers reads "yarn" as "longrope" here, whose factors depend on the length of the sequence.
    if (kind := values["rope"]["rope_type"]) not in ("default", "longrope"):
        yield f"rope type {shown(kind)} of phi3; only 'default' is"


PHI3 = LlamaFamily(
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    max_tokens=4096,
    norm_epsilon=1e-5,
    rotated_part=1.0,
    tensors=_list_tensors(),
    supported={"rope_scaling": ("none",)},
    # Llama and Mistral hold the same models.
    is_told_by=lambda _config: False,
    window_of_layer=lambda values, _layer: values.get("sliding_window") or 0,
    write_more=lambda config: {"sliding_window": config.attention_window or None},
    refuse_more=_refuse,
)
"""Phi-3 and Phi-4 (Abdin et al., 2024, arXiv:2404.14219 and 2412.08905) without longrope, as most of 4K and Phi-4."""
