"""Experts are read one by one or stacked, by each device its own alone, and errors name them."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.hub.read import open_weights, read_weights
from trellax.meshes import WeightsError

from .hf_doubles import Tensors, merge, say
from .hub import EXPERTS, GOLDEN, shapes_of
from .test_read import spy

MODULE = dict.fromkeys(EXPERTS, ("mlp", "gate_proj", "up_proj", "down_proj"))
MODULE["mixtral"] = ("block_sparse_moe", "w1", "w3", "w2")
MESH = "tensor=2,expert=2"


def stack(tensors: Tensors, name: str, *, keep: bool = False) -> None:
    """Put all experts of a layer into two tensors, as transformers 5 holds them."""
    module, *linears = MODULE[name]
    routers = [key for key in tensors if key.endswith(f"{module}.gate.weight")]
    for layer in (int(key.split(".")[2]) for key in routers):
        old, new = f"model.layers.{layer}.{module}", f"model.layers.{layer}.mlp"
        count = sum(f"{old}.experts." in key for key in tensors) // 3
        parts = [[f"{old}.experts.{number}.{linear}.weight" for number in range(count)] for linear in linears]
        gate, up, down = (np.stack([tensors[key] for key in keys]) for keys in parts)
        tensors[f"{new}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{new}.experts.down_proj"] = down
        if not keep:
            tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")
            for key in (key for keys in parts for key in keys):
                del tensors[key]


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    """Return a maker of copies of a golden."""
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts_are_those_of_single_files(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(name)
    merge(folder, lambda tensors: stack(tensors, name))
    expected = read_weights(GOLDEN / name, shapes_of(GOLDEN / name, MESH))
    shapes, sizes = shapes_of(folder, MESH), spy(monkeypatch)
    found = read_weights(folder, shapes)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    # A device reads half of the features of each of its own half of the experts, and other devices the rest.
    up = shapes["blocks"].get("experts", shapes["blocks"])["mlp"]["up"]["kernel"]
    layer = math.prod(up.sharding.shard_shape(up.shape)) // up.shape[0]
    assert layer * 4 == math.prod(up.shape[1:])
    assert sizes.count(layer) >= 3 * 2 * 4


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "missing": (
        "mixtral",
        lambda folder: merge(folder, lambda own: own.pop("model.layers.1.block_sparse_moe.experts.3.w1.weight")),
    ),
    "too_few": ("mixtral", say(num_local_experts=5)),
    "too_many": ("qwen3_moe", say(num_local_experts=7)),
    "of_another_width": ("qwen3_moe", say(moe_intermediate_size=8, num_hidden_layers=1)),
    "both_forms": ("mixtral", lambda folder: merge(folder, lambda own: stack(own, "mixtral", keep=True))),
    "stacked_too_few": (
        "qwen3_moe",
        lambda folder: (merge(folder, lambda own: stack(own, "qwen3_moe")), say(num_local_experts=16)(folder)),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_experts_are_named(
    damage: str,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    golden: Callable[[str, str], None],
) -> None:
    name, change = DAMAGES[damage]
    folder = folder_of(name)
    change(folder)
    shapes = shapes_of(folder)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(WeightsError) as caught:
        open_weights(folder.name, shapes)
    golden(f"errors/hub/experts_{damage}.txt", str(caught.value))


@pytest.mark.parametrize("missing", ["dense", "experts"])
def test_a_model_of_the_neighbour_is_not_read(missing: str, folder_of: Callable[[str], Path]) -> None:
    """Mixtral's tensors under the type of Mistral, and the other way about."""
    folder = folder_of("mixtral" if missing == "dense" else "mistral")
    say(model_type="mistral" if missing == "dense" else "mixtral")(folder)
    expected = "mlp.up_proj.weight .* is missing" if missing == "dense" else "experts.0.w1.weight .* is missing"
    with pytest.raises(WeightsError, match=expected):
        open_weights(folder, shapes_of(folder))
