"""Weights are written as they were read, bit for bit, in files that fit on the host; a folder is whole or not there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from trellax.hub import write as hf_write
from trellax.hub.config import read_hub_model
from trellax.hub.read import read_weights
from trellax.hub.tensor_files import INDEX
from trellax.hub.write import write_weights
from trellax.meshes import WeightsError

from .hub import GOLDEN, MODELS, shapes_of


def params_of(name: str, mesh: str = "data=1") -> Any:
    return read_weights(GOLDEN / name, shapes_of(GOLDEN / name, mesh))


def write(name: str, folder: Path, *, mesh: str = "data=1", **options: Any) -> Path:
    model = read_hub_model(GOLDEN / name)
    write_weights(params_of(name, mesh), model.config, folder, architecture=model.architecture, **options)
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: leaf for file in folder.glob("*.safetensors") for name, leaf in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, "tensor=2,pipe=2") for name in MODELS),
        ("mixtral", "tensor=2,expert=2"),
        ("qwen3_moe", "pipe=2,expert=2"),
    ],
)
def test_tensors_are_those_that_transformers_saved(name: str, mesh: str, tmp_path: Path) -> None:
    expected = tensors_of(GOLDEN / name)
    dtype = next(iter(expected.values())).dtype
    written = tensors_of(write(name, tmp_path / "out", mesh=mesh, dtype=dtype.name))
    assert written.keys() == expected.keys()
    assert [key for key in expected if written[key].tobytes() != expected[key].tobytes()] == []
    assert {leaf.dtype for leaf in written.values()} == {dtype}


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_written_weights_are_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / "out", max_file_bytes=10_000)
    params, again = params_of(name), read_weights(folder, shapes_of(folder))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))
    assert read_hub_model(folder).config == read_hub_model(GOLDEN / name).config


def test_no_file_holds_more_than_asked_and_one_is_on_the_host_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    save = hf_write.save_file

    def recorded(tensors: dict[str, np.ndarray], *args: Any, **options: Any) -> None:
        sizes.append(sum(leaf.nbytes for leaf in tensors.values()))
        save(tensors, *args, **options)

    monkeypatch.setattr(hf_write, "save_file", recorded)
    folder = write("llama3", tmp_path / "out", max_file_bytes=6_000)
    index = json.loads((folder / INDEX).read_text())
    assert len(sizes) == len(list(folder.glob("*.safetensors"))) > 3
    assert max(sizes) <= 6_000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert index["weight_map"].keys() == tensors_of(folder).keys()


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    folder = write("qwen3", tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_folder_that_is_there_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    write("llama3", Path("out"))
    before = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    with pytest.raises(WeightsError) as caught:
        write("gpt2", Path("out"))
    golden("errors/hub/weights_already_there.txt", str(caught.value))
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == before


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_write, "save_file", fail)
    with pytest.raises(WeightsError, match="No space left on device"):
        write("llama3", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_and_files_that_belong_to_the_model_are_kept(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    folder = write("llama3", tmp_path / "out", extra_values={"eos_token_id": 7}, extra_files=[tokenizer])
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 7
    assert (folder / "tokenizer.json").read_text() == "{}"
