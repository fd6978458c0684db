"""A folder of gpt-oss as published: kernels of experts in four bits, all other tensors in bfloat16."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from trellax.hub.config import hub_model, read_hub_model
from trellax.hub.mxfp4 import widen
from trellax.hub.write import write_weights

from .hf_doubles import Tensors, merge
from .hub import VOCAB, setup_of, weight_shapes

EXPERTS, D, F = 4, 64, 96
VALUES: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "dtype": "bfloat16",
    "max_position_embeddings": 64,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
}


def write_quantized(folder: Path) -> Tensors:
    """Write the folder, and return the kernels of its experts as they are to be read, by the names of their tensors."""
    config, rng = hub_model(VALUES).config, np.random.default_rng(2)
    draw = lambda path, leaf: jax.device_put(  # noqa: E731
        (rng.standard_normal(leaf.shape) * 0.2 + ("scale" in str(path))).astype("bfloat16"), leaf.sharding
    )
    params = jax.tree_util.tree_map_with_path(draw, weight_shapes(setup_of(config, "data=1")))
    write_weights(params, config, folder, architecture="gpt_oss", dtype="bfloat16")
    expected: Tensors = {}

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            _, columns, rows = tensors.pop(name).shape
            blocks = rng.integers(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=np.uint8)
            scales = rng.integers(121, 126, blocks.shape[:3], dtype=np.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            expected[name] = widen(blocks, scales).swapaxes(1, 2)

    merge(folder, change)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert read_hub_model(folder).config == config
    return expected
