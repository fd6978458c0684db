"""Names of adapters in a PEFT folder, adapter_config.json beside adapter_model.safetensors.

    blocks.attention.query.lora_a [L, in, r]   <->   L tensors [r, in]
        base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    blocks.mlp.up.lora_a [L, E, in, r]         <->   L x E tensors [r, in]
        base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight

Read `read.py` and `write.py` next.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np

from ...layers import ModelConfig
from ...meshes import WeightsError
from ..adapters import AdaptedKernel, adapted_kernels, without_lora
from ..architectures import ARCHITECTURES
from ..architectures.tensor_names import TensorNames, TensorPlace

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _END = "base_model.model.", ".weight"

ENDS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}
MAGNITUDE_END = {"lora_m": ".lora_magnitude_vector"}
"""Ends of the names of an adapter's tensors, by the names of its parameters; magnitudes are those of DoRA."""

FIX = "export the merged model instead, or adapt other layers: model.lora_targets."
"""The `Fix:` line for adapters that PEFT does not have."""


def tensor_ends(config: ModelConfig) -> dict[str, str]:
    """Return the ends of the names of the tensors that adapters of a model have."""
    return ENDS | (MAGNITUDE_END if config.lora_magnitude == "on" else {})


@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """A linear layer of all blocks, or of all experts of them, in the files of PEFT.

    kernel: its place in a model.
    tensor: the place of its kernel in a Hugging Face file, whose name has no `.weight`.
    """

    kernel: AdaptedKernel
    tensor: TensorPlace

    @property
    def is_transposed(self) -> bool:
        """Whether that kernel is [out, in], as torch's linear layers have it."""
        return self.tensor.layout == "transposed" or self.kernel.is_head

    @property
    def module(self) -> str:
        """The last names of the layer, as `target_modules` lists it."""
        # GPT-2, whose kernels are not transposed, has two layers c_proj in a block.
        return self.tensor.name.rpartition("." if self.is_transposed else "{layer}.")[2]

    def turn(self, matrix: np.ndarray, param: str) -> np.ndarray:
        """Return a parameter of the adapter as PEFT has it, or one of PEFT's as a model has it: transposed."""
        # The head's B is as the table is, [V, r].
        return matrix if self.kernel.is_head and param == "lora_b" else matrix.T

    def tensor_name(self, number: tuple[int, ...], end: str) -> str:
        """Return the name of a tensor of the adapter of a layer, or of an expert in it, by its end."""
        return f"{_PREFIX}{self.tensor.tensor_name(number)}{end}"

    def numbers(self, shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Yield the numbers of layers, and of experts if there are some, of a parameter [L, ...] or [L, E, ...]."""
        return product(*(range(size) for size in shape[: self.tensor.num_stacked]))


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
    names, found = _names_of(config, architecture), []
    for own in adapted_kernels(config):
        place = names.place_of(".".join((*own.path, own.kernel)), num_dense=config.dense_layers)
        if reason := _find_shared_tensor(own, place):
            if joined == "leave out":
                continue
            raise WeightsError(f"{own.linear.name} has an adapter, and is {reason}.", fix=FIX)
        name = names.full_name(place.name, prefix=names.prefix).removesuffix(_END)
        found.append(AdaptedLayer(kernel=own, tensor=replace(place, name=name)))
    return tuple(found)


def _find_shared_tensor(own: AdaptedKernel, place: TensorPlace) -> str:
    """Return why a kernel has no tensor of its own in the files, "" if it has."""
    if place.num_parts > 1:
        return f"1 of {place.num_parts} parts of {place.name} in the files, which PEFT adapts as one"
    has_all = own.linear.copies > 1 and "{expert}" not in place.name
    return f"that of all experts in {place.name}, which PEFT adapts as one" if has_all else ""


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
