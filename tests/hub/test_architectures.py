"""A new architecture is one value: with it in the list its folders are read and written, without it refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.hub import ARCHITECTURES, read_hub_model, read_weights, write_weights
from trellax.hub.architectures.architecture import Values
from trellax.hub.architectures.llama_family import LlamaFamily
from trellax.hub.config import hub_model
from trellax.hub.config_write import hub_values
from trellax.layers import ModelConfig
from trellax.meshes import WeightsError

from .hub import GOLDEN, shapes_of


def read_window(values: Values, layer: int) -> int:
    return values["reach"]


def write_window(config: ModelConfig) -> dict[str, Any]:
    return {"reach": config.attention_window}


def refuse_experts(values: Values) -> Iterator[str]:
    if values.get("experts"):
        yield "experts: only dense layers are"


NEW = LlamaFamily(
    model_type="newt",
    class_name="NewtForCausalLM",
    max_tokens=99,
    window_of_layer=read_window,
    write_more=write_window,
    refuse_more=refuse_experts,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose config.json says that it is of the new architecture."""
    own = Path(shutil.copytree(GOLDEN / "mistral", tmp_path / "model"))
    values = json.loads((own / "config.json").read_text()) | {"model_type": "newt", "reach": 5}
    del values["sliding_window"], values["max_position_embeddings"]
    (own / "config.json").write_text(json.dumps(values | {"architectures": ["NewtForCausalLM"]}))
    return own


def test_folder_of_a_new_architecture_is_read_and_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match="model_type='newt' is no architecture that trellax has"):
        read_hub_model(folder)
    monkeypatch.setitem(ARCHITECTURES, "newt", NEW)
    model = read_hub_model(folder)
    assert (model.config.attention_window, model.config.max_tokens, model.warnings) == (5, 99, ())
    params = read_weights(folder, shapes_of(folder))
    expected = read_weights(GOLDEN / "mistral", shapes_of(GOLDEN / "mistral"))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True))
    values = write_weights(params, model.config, tmp_path / "back", architecture="newt")
    assert (values["reach"], values["architectures"]) == (5, ["NewtForCausalLM"])
    assert read_hub_model(tmp_path / "back").config == model.config


def test_new_architecture_lists_unsupported_settings_and_fields(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "newt", NEW)
    values = json.loads((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match="experts: only dense layers are"):
        hub_model(values | {"experts": 8})
    config = ModelConfig(vocab_size=64, num_layers=1, hidden_size=8, num_heads=2)
    with pytest.raises(WeightsError, match=r"newt cannot hold this model:\n  model.mlp='gelu', not 'swiglu'"):
        hub_values(config, architecture="newt")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_of_every_architecture_has_one_place_in_its_files(name: str) -> None:
    tensors = ARCHITECTURES[name].tensors
    places = [(place.name, place.part) for place in tensors.places.values()]
    assert len(places) == len(set(places))
    assert tensors.places["head.table"].name == tensors.head
    assert all("{layer}" in place.name for path, place in tensors.places.items() if path.startswith("blocks."))
