"""Write adapters as a PEFT folder, which `peft.PeftModel.from_pretrained(base, folder)` loads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ...layers import ModelConfig
from ...meshes.files.new_folder import new_folder
from .names import CONFIG_FILE, WEIGHTS_FILE, adapted_layers, tensor_ends

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
        WeightsError: the folder exists, or no architecture supports the model.
    """
    layers = adapted_layers(config, architecture=architecture)
    tensors: dict[str, np.ndarray] = {}
    for own in layers:
        for name, end in tensor_ends(config).items():
            whole = np.asarray(adapters["blocks"][own.part][own.name][name], np.float32)
            for number, one in enumerate(whole):
                tensors[own.tensor_name(number, end)] = np.ascontiguousarray(one.T)
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
