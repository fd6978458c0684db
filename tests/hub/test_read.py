"""Weights of transformers give its logits on every mesh; each device reads its part alone; damage is found first.

The expected logits were computed by transformers (make_hf_goldens.py). The tolerance is 2e-4 absolute in float32, on
logits of about 5: other orders of addition and other exponentials, which cost 1e-5 here.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from trellax.hub.read import open_weights, read_weights
from trellax.hub.tensor_files import INDEX, TensorFiles
from trellax.meshes import WeightsError

from .hub import CASES, EXPERT_MESHES, GOLDEN, MODELS, shapes_of, wrong_by

TOLERANCE = 2e-4
PIPED = "tensor=2,pipe=2"
LATER = (
    "llama_dynamic",
    "phi4_mini",
    "phi3_short",
    "gpt_oss",
    "olmo3",
    "deepseek_v2",
    "deepseek_v2_lite",
    "dots1",
    "granite",
    "olmo2",
    "smollm3",
    "phi3",
    "gemma2",
)
QUICK = [(name, "tensor=2") for name in MODELS if name not in LATER] + [
    ("llama3", PIPED),
    ("gpt2", PIPED),
    ("qwen3", "pipe=2"),
]
QUICK += [("mixtral", "tensor=2,expert=2"), ("qwen3_moe", "pipe=2,expert=2")]
REST = [case for case in CASES if case not in QUICK]


@pytest.mark.parametrize(("name", "mesh"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_logits_are_those_of_transformers(name: str, mesh: str) -> None:
    assert wrong_by(GOLDEN / name, mesh, np.load(GOLDEN / name / "logits.npy")) < TOLERANCE


def spy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of elements of every read."""
    sizes: list[int] = []
    read = TensorFiles.read

    def recorded(files: TensorFiles, name: str, index: tuple[slice, ...]) -> np.ndarray:
        piece = read(files, name, index)
        sizes.append(piece.size)
        return piece

    monkeypatch.setattr(TensorFiles, "read", recorded)
    return sizes


@pytest.mark.parametrize(
    ("name", "mesh"), [("llama3", PIPED), ("gpt2", PIPED), *(("mixtral", mesh) for mesh in EXPERT_MESHES[1:])]
)
def test_every_device_reads_its_own_slices_alone(name: str, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, sizes = shapes_of(GOLDEN / name, mesh), spy(monkeypatch)
    params = read_weights(GOLDEN / name, shapes)
    leaves = jax.tree.leaves(shapes)
    # Parts that several devices hold are read once.
    parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    different = [
        len({str(index) for index in leaf.sharding.devices_indices_map(leaf.shape).values()}) for leaf in leaves
    ]
    assert sum(sizes) == sum(part * count for part, count in zip(parts, different, strict=True))
    assert max(sizes) <= max(parts)
    assert all(leaf.sharding == one.sharding for leaf, one in zip(leaves, jax.tree.leaves(params), strict=True))
    # Of a parameter that is split over two axes no device reads more than a quarter.
    up = shapes["blocks"]["mlp"]["up"]["kernel"]
    assert math.prod(up.sharding.shard_shape(up.shape)) * 4 == math.prod(up.shape)


def test_opening_reads_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = spy(monkeypatch)
    open_weights(GOLDEN / "llama3", shapes_of(GOLDEN / "llama3"))
    assert sizes == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama3", "qwen2"])  # float32 and bfloat16 on disk
def test_values_are_those_of_the_file_in_the_wanted_type(name: str, dtype: str) -> None:
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), shapes_of(GOLDEN / name)
    )
    query = read_weights(GOLDEN / name, shapes)["blocks"]["attention"]["query"]["kernel"]
    tensors = load_all(GOLDEN / name)
    expected = np.stack([tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].T for layer in range(2)])
    assert query.dtype == dtype
    assert np.array_equal(np.asarray(query), expected.astype(dtype))


def load_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: leaf for file in folder.glob("*.safetensors") for name, leaf in load_file(file).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the Llama 3 golden, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "model"))


def merge(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Write the folder as one file, its tensors changed."""
    tensors = load_all(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_one_file_and_names_without_prefix_are_read_alike(name: str, tmp_path: Path) -> None:
    own = Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))
    expected = read_weights(own, shapes_of(own))

    def strip(tensors: dict[str, np.ndarray]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.").removeprefix("transformer.")] = tensors.pop(key)

    merge(own, strip)
    found = read_weights(own, shapes_of(own))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama3", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
    ],
)
def test_tables_saved_by_older_versions_of_transformers_are_ignored(name: str, extra: str, tmp_path: Path) -> None:
    own = Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))
    merge(own, lambda tensors: tensors.update({extra: np.zeros((1, 2), np.float32)}))
    assert open_weights(own, shapes_of(own)).files.mistakes == ()


def test_index_that_python_does_not_read_is_reported(folder: Path) -> None:
    shapes = shapes_of(folder)
    (folder / INDEX).write_text("[" * 200_000)
    with pytest.raises(WeightsError, match="cannot be read: maximum recursion"):
        open_weights(folder, shapes)


def test_tensor_of_a_layer_too_many_is_reported(tmp_path: Path) -> None:
    own = Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "model"))
    name = "transformer.h.2.attn.c_attn.bias"
    merge(own, lambda tensors: tensors.update({name: np.zeros(48, np.float32)}))
    with pytest.raises(WeightsError, match=f"{name} \\[48\\] is not known"):
        open_weights(own, shapes_of(own))


def truncate(folder: Path) -> None:
    second_file(folder).write_bytes(second_file(folder).read_bytes()[:-100])


def second_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def damage_tensors(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 8), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((16, 32), np.int8)


def drop_all(folder: Path, *, pickle: str | None = None) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if pickle:
        (folder / pickle).write_bytes(b"\x80")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "missing_shard": lambda folder: second_file(folder).unlink(),
    "no_safetensors": lambda folder: second_file(folder).write_bytes(b"<html>not found"),
    "missing_and_truncated": lambda folder: (truncate(folder), sorted(folder.glob("*.safetensors"))[0].unlink()),
    "one_truncated_file": lambda folder: (merge(folder, dict), (folder / "model.safetensors").write_bytes(b"12345678")),
    "tensors": lambda folder: merge(folder, damage_tensors),
    "other_depth": lambda folder: merge(folder, drop_layer),
    "pickle": lambda folder: drop_all(folder, pickle="pytorch_model.bin"),
    "nothing": drop_all,
    "broken_index": lambda folder: (folder / INDEX).write_text("{"),
    "index_of_a_list": lambda folder: (folder / INDEX).write_text("[]"),
}


def drop_layer(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_in_full_before_a_weight_is_read(
    damage: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    golden: Callable[[str, str], None],
) -> None:
    shapes, sizes = shapes_of(folder), spy(monkeypatch)
    DAMAGES[damage](folder)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(WeightsError) as caught:
        read_weights(folder.name, shapes)
    golden(f"errors/hub/weights_{damage}.txt", str(caught.value))
    assert sizes == []
