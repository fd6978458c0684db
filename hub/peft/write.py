"""Write adapters as a PEFT folder, which `peft.PeftModel.from_pretrained(base, folder)` loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ...layers import ModelConfig
from ...meshes import WeightsError
from ...meshes.files.new_folder import new_folder
from ..adapters import adapted_kernels, node_at
from .names import CONFIG_FILE, FIX, WEIGHTS_FILE, AdaptedLayer, adapted_layers, tensor_ends

_TORCH = {"format": "pt"}


def write_adapters(
    adapters: Any, config: ModelConfig, folder: str | Path, *, base: str, architecture: str | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in float32 as they were trained.

    Args:
        adapters: a tree {"blocks": ...} of arrays [L, ...] that this process can read whole.
        folder: folder to create; it may exist if it is empty.
        base: folder of the weights that they adapt.
        architecture: `model_type` whose names are written; the first that supports the model if left out.

    Raises:
        WeightsError: the folder exists, no architecture supports the model, or PEFT does not have the adapters of a
            layer.
    """
    layers = adapted_layers(config, architecture=architecture)
    _check_experts(config)
    tensors = tensors_of(adapters, layers, tensor_ends(config))
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha or config.lora_rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({own.module for own in layers}),
        "bias": "none",
        "fan_in_fan_out": not layers[0].is_transposed,
        "inference_mode": True,
        "use_dora": config.lora_magnitude == "on",
    }
    with new_folder(folder) as part:
        save_file(tensors, part / WEIGHTS_FILE, metadata=_TORCH)
        (part / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_of(adapters: Any, layers: Sequence[AdaptedLayer], ends: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return the tensors of adapters by the names that PEFT has for them, each layer and expert by itself."""
    tensors: dict[str, np.ndarray] = {}
    for own in layers:
        for name, end in ends.items():
            whole = np.asarray(node_at(adapters, own.kernel.path)[name], np.float32)
            for number in own.numbers(whole.shape):
                tensors[own.tensor_name(number, end)] = np.ascontiguousarray(own.turn(whole[number], name))
    return tensors


def _check_experts(config: ModelConfig) -> None:
    """Raise unless PEFT, which holds gate and up of all experts in one parameter, has the adapters of a mixture.

    What is meant by names of their linear layers it takes for those of experts, also where dense layers and shared
    experts have the same names (its `utils/transformers_weight_conversion.py`, version 0.21).
    """
    if not config.num_experts:
        return
    adapted = {kernel.linear.name: kernel.linear for kernel in adapted_kernels(config)}
    of_experts = {name for name, one in adapted.items() if one.copies > 1}
    others = [name for name in adapted if name.startswith("mlp.") and name not in of_experts]
    whole = {"mlp.experts.down", *(["mlp.experts.gate"] if config.is_gated else []), "mlp.experts.up"}
    problem = ""
    if others:
        problem = f"{', '.join(others)} of a model with experts, whose names PEFT takes for those of experts"
    elif of_experts and config.lora_magnitude == "on":
        problem = f"{', '.join(sorted(of_experts))} with magnitudes"
    elif of_experts not in (set(), whole, {"mlp.experts.down"}):
        known = f"of all of {', '.join(sorted(whole))}, or of mlp.experts.down"
        problem = f"{', '.join(sorted(of_experts))} alone, but {known}"
    if problem:
        raise WeightsError(f"PEFT has no adapters of {problem}.", fix=FIX)
