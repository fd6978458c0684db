"""What files of DeepSeek's family have besides the layers of a model, and what stays in float32."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from trellax.hub.config import read_hub_model
from trellax.hub.read import open_weights, read_weights
from trellax.hub.write import write_weights
from trellax.meshes import WeightsError

from .hf_doubles import Tensors, merge
from .hub import GOLDEN, shapes_of


def add_layer(tensors: Tensors) -> None:
    """Put a layer behind the last, as DeepSeek-V3's files have one that predicts a token more."""
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        tensors[name.replace("layers.2", "layers.3")] = tensors[name].copy()
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((16, 32), np.float32)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_behind_the_last_are_left_out_and_a_line_says_so(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))
    merge(folder, add_layer)
    said: list[str] = []
    read_weights(folder, shapes_of(folder), say=said.append)
    assert len(said) == 1
    assert "tensors of layers behind the last, model.layers.3.eh_proj.weight among them, are left out" in said[0]


def test_layers_behind_the_last_are_refused_where_no_file_has_them(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "deepseek_v2", tmp_path / "model"))
    merge(folder, add_layer)
    with pytest.raises(WeightsError, match=r"model\.layers\.3\.eh_proj\.weight .* is not known"):
        open_weights(folder, shapes_of(folder))


def test_a_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "deepseek_v3", tmp_path / "model"))
    merge(folder, lambda tensors: tensors.pop("model.layers.2.self_attn.kv_b_proj.weight"))
    with pytest.raises(WeightsError, match=r"model\.layers\.2\.self_attn\.kv_b_proj\.weight \[56, 12\] is missing"):
        open_weights(folder, shapes_of(folder))


def test_biases_of_routers_are_written_in_float32(tmp_path: Path) -> None:
    model = read_hub_model(GOLDEN / "deepseek_v3")
    params = read_weights(GOLDEN / "deepseek_v3", shapes_of(GOLDEN / "deepseek_v3"))
    write_weights(params, model.config, tmp_path / "out", architecture="deepseek_v3", dtype="bfloat16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    biases = {name: leaf for name, leaf in written.items() if name.endswith("e_score_correction_bias")}
    assert sorted(biases) == [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    expected = {
        name: leaf for file in (GOLDEN / "deepseek_v3").glob("*.safetensors") for name, leaf in load_file(file).items()
    }
    assert all(np.array_equal(leaf, expected[name]) and leaf.dtype == np.float32 for name, leaf in biases.items())
    assert {leaf.dtype for name, leaf in written.items() if name not in biases} == {np.dtype(ml_dtypes.bfloat16)}
