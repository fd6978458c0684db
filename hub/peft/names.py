"""Names of adapters in a PEFT folder, adapter_config.json beside adapter_model.safetensors.

    blocks.attention.query.lora_a [L, in, r]   <->   L tensors [r, in]
        base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

Read `read.py` and `write.py` next.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...layers import ModelConfig
from ...meshes import WeightsError
from ..adapters import layers_with_adapters, without_lora
from ..architectures import ARCHITECTURES
from ..architectures.tensor_names import TensorNames

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _END = "base_model.model.", ".weight"

ENDS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}
MAGNITUDE_END = {"lora_m": ".lora_magnitude_vector"}
"""Ends of the names of an adapter's tensors, by the names of its parameters; magnitudes are those of DoRA."""


def tensor_ends(config: ModelConfig) -> dict[str, str]:
    """Return the ends of the names of the tensors that adapters of a model have."""
    return ENDS | (MAGNITUDE_END if config.lora_magnitude == "on" else {})


@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """A linear layer of a block in the files of PEFT.

    part, name: its place in the tree of a block.
    tensor: name of its kernel in a Hugging Face file without `.weight`, with `{layer}`.
    is_transposed: whether that kernel is [out, in], as torch's linear layers have it.
    """

    part: str
    name: str
    tensor: str
    is_transposed: bool

    @property
    def module(self) -> str:
        """The last names of the layer, as `target_modules` lists it."""
        # GPT-2, whose kernels are not transposed, has two layers c_proj in a block.
        return self.tensor.rpartition("." if self.is_transposed else "{layer}.")[2]

    def tensor_name(self, layer: int, end: str) -> str:
        """Return the name of a tensor of a layer's adapter, by its end."""
        return f"{_PREFIX}{self.tensor.format(layer=layer)}{end}"


def adapted_layers(
    config: ModelConfig, *, architecture: str | None = None, joined: Literal["refuse", "leave out"] = "refuse"
) -> tuple[AdaptedLayer, ...]:
    """Return the layers of a model that have adapters.

    Args:
        architecture: the `model_type`; the first that supports the model if left out.
        joined: what to do with a layer that the architecture stores as one with others.

    Raises:
        WeightsError: no architecture supports the model, or it stores several of the layers as one.
    """
    names = _names_of(config, architecture)
    found = []
    for part, name in layers_with_adapters(config).values():
        place = names.places[f"blocks.{part}.{name}.kernel"]
        if place.num_parts > 1 and joined == "leave out":
            continue
        if place.num_parts > 1:
            raise WeightsError(
                f"{name} has an adapter, and is 1 of {place.num_parts} parts of {place.name} in the files, which PEFT "
                "adapts as one.",
                fix="export the merged model instead, or adapt other layers: model.lora_targets.",
            )
        tensor = names.full_name(place.name, prefix=names.prefix).removesuffix(_END)
        found.append(AdaptedLayer(part=part, name=name, tensor=tensor, is_transposed=place.layout == "transposed"))
    return tuple(found)


def _names_of(config: ModelConfig, architecture: str | None) -> TensorNames:
    own = without_lora(config)
    reasons: Mapping[str, list[str]] = {
        name: list(one.find_unsupported_fields(own))
        for name, one in ARCHITECTURES.items()
        if architecture in (None, name)
    }
    fitting = [name for name, reason in reasons.items() if not reason]
    if not fitting:
        lines = [f"{name}: {', '.join(reason)}" for name, reason in reasons.items()]
        raise WeightsError("\n  ".join(["no Hugging Face architecture holds this model:", *lines]))
    # Those that fit one model, llama and mistral say, name its layers alike.
    return ARCHITECTURES[fitting[0]].tensors
